"""Charts as inline SVG. Only numbers enter the markup, so nothing here needs escaping."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

Floats = NDArray[np.float64]
WIDTH, HEIGHT, MARGIN = 168, 32, 6
LEFT = 46  # left margin of the charts of scales, for the axis and its name
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
    """Head scales `[L, H]` as a heat map: one row per layer (last on top), amber below 1, blue above."""
    layers, heads = scales.shape
    size = max(6, min(18, 720 // max(heads, 1)))
    reach = max(float(np.abs(scales - 1).max()), 1e-9)
    cells = []
    for layer, head in zip(*np.nonzero(np.ones_like(scales)), strict=True):
        value = float(scales[layer, head])
        strength = 0.0 if value == 1 else 0.25 + 0.75 * abs(value - 1) / reach
        side = "up" if value > 1 else "down" if value < 1 else "same"
        x, y = head * size + LEFT, (layers - 1 - layer) * size
        box = f'x="{x}" y="{y}" width="{size - 1}" height="{size - 1}"'
        opacity = f' style="opacity:{strength:.2f}"' if strength else ""
        title = f"<title>layer {layer}, head {head}: × {value:.3f}</title>" if strength else ""
        cells.append(f'<rect class="{side}" {box}{opacity}>{title}</rect>')
    labels = [
        f'<text x="{LEFT - 6}" y="{(layers - 1 - k) * size + size * 0.75:.1f}" text-anchor="end">{k}</text>'
        for k in _ticks(layers)
    ]
    labels += [
        f'<text x="{k * size + LEFT + size / 2:.1f}" y="{layers * size + 13}" text-anchor="middle">{k}</text>'
        for k in _ticks(heads)
    ]
    width, height = heads * size + LEFT, layers * size
    names = _axis_names("head", "layer", width, height, height + 28)
    return _svg("heads", "scales of the heads per layer", width + 2, height + 32, [*labels, *names, *cells])


def neurons_svg(counts: Sequence[int]) -> Markup:
    """A bar chart of the number of scaled neurons per layer."""
    width, height = max(8, min(26, 700 // max(len(counts), 1))), 110
    most = max([*counts, 1])
    parts = []
    for layer, count in enumerate(counts):
        tall = height * count / most
        parts.append(
            f'<rect class="up" x="{layer * width + LEFT}" y="{height - tall + 12:.1f}" width="{width - 2}" '
            f'height="{tall:.1f}"><title>layer {layer}: {count} neurons</title></rect>'
        )
    parts += [
        f'<text x="{k * width + LEFT + width / 2:.1f}" y="{height + 26}" text-anchor="middle">{k}</text>'
        for k in _ticks(len(counts))
    ]
    parts.append(f'<text x="{LEFT - 6}" y="20" text-anchor="end">{most}</text>')
    right = len(counts) * width + LEFT
    parts.append(f'<line class="zero" x1="{LEFT - 2}" x2="{right}" y1="{height + 12}" y2="{height + 12}"/>')
    parts += _axis_names("layer", "neurons", right, height + 24, height + 40)
    return _svg("neurons", "scaled neurons per layer", right + 2, height + 44, parts)


def _axis_names(across: str, up: str, right: int, height: int, bottom: int) -> list[str]:
    middle = height / 2
    return [
        f'<text class="axis" x="{(LEFT + right) / 2:.1f}" y="{bottom}" text-anchor="middle">{across}</text>',
        f'<text class="axis" x="12" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle:.1f})">{up}</text>',
    ]


def _ticks(count: int) -> range:
    return range(0, count, max(1, -(-count // 16)))


def _svg(css: str, name: str, width: int, height: int, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{name}">{"".join(parts)}</svg>'
    )
