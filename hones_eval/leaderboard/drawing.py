"""Charts as inline SVG. Only numbers enter the markup, so nothing here needs escaping."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from hones_eval.pages.drawing import LEFT, axis_names, heat_map_svg, svg, ticks

Floats = NDArray[np.float64]
WIDTH, HEIGHT, MARGIN = 168, 32, 6
MIDDLE = 11  # height of the line; the ends of the axis are labeled below it


def interval_svg(difference: float, low: float | None, high: float | None, reach: float, css: str) -> Markup:
    """A difference as a dot, its interval as a line, on an axis from `-reach` to `reach` with zero marked."""
    if not np.isfinite(difference) or reach <= 0:
        return Markup("")
    parts = [f'<line class="zero" x1="{_x(0, reach)}" x2="{_x(0, reach)}" y1="2" y2="20"/>']
    parts += [
        f'<text x="{x}" y="{HEIGHT - 1}" text-anchor="{anchor}">{sign}{reach:g}</text>'
        for x, anchor, sign in ((MARGIN, "start", "−"), (WIDTH - MARGIN, "end", "+"))
    ]
    if low is not None and high is not None:
        left, right = _x(low, reach), _x(high, reach)
        parts.append(f'<line class="span" x1="{left}" x2="{right}" y1="{MIDDLE}" y2="{MIDDLE}"/>')
        parts += [f'<line class="span" x1="{x}" x2="{x}" y1="7" y2="15"/>' for x in (left, right)]
    parts.append(f'<circle cx="{_x(difference, reach)}" cy="{MIDDLE}" r="4"/>')
    return Markup(
        f'<svg class="ci {css}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'aria-hidden="true" focusable="false">{"".join(parts)}</svg>'
    )


def _x(value: float, reach: float) -> float:
    inner = WIDTH / 2 - MARGIN
    return round(WIDTH / 2 + inner * max(-1.0, min(1.0, value / reach)), 1)


def heads_svg(scales: Floats) -> Markup:
    """Head scales `[L, H]` as a heat map: one row per layer (last on top), orange below 1, blue above."""
    name = "scales of the heads per layer"
    return heat_map_svg(
        scales.tolist(),
        row="layer",
        column="head",
        name=name,
        label="× {:.3f}".format,
        neutral=1.0,
        largest=18,
    )


def neurons_svg(counts: Sequence[int]) -> Markup:
    """A bar chart of the number of scaled neurons per layer."""
    width, height = max(8, min(26, 700 // max(len(counts), 1))), 110
    most = max([*counts, 1])
    parts: list[str] = []
    for layer, count in enumerate(counts):
        tall = height * count / most
        parts.append(
            f'<rect class="up" x="{layer * width + LEFT}" y="{height - tall + 12:.1f}" width="{width - 2}" '
            f'height="{tall:.1f}"><title>layer {layer}: {count} neurons</title></rect>'
        )
    parts += [
        f'<text x="{k * width + LEFT + width / 2:.1f}" y="{height + 26}" text-anchor="middle">{k}</text>'
        for k in ticks(len(counts))
    ]
    parts.append(f'<text x="{LEFT - 6}" y="20" text-anchor="end">{most}</text>')
    right = len(counts) * width + LEFT
    parts.append(f'<line class="zero" x1="{LEFT - 2}" x2="{right}" y1="{height + 12}" y2="{height + 12}"/>')
    parts += axis_names("layer", "neurons", right, height + 24, height + 40)
    return svg(
        "neurons", "scaled neurons per layer", right + 2, height + 44, [Markup(part) for part in parts]
    )
