"""Figures of causal tracing: curves by layer, heat maps by token role, and one pair's own tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from hones_eval.choices import What
from hones_eval.core.figure import colors_of
from hones_eval.methods.tracing import Traced
from hones_eval.reports.figures import WIDEST, kind_of
from hones_eval.reports.trace_tables import MEASURES, Curve, RoleMap, changes, recovered

TITLES = {
    "probability_change": "change of the answer's probability",
    "logit_change": "change of the answer's logit",
    "recovered": "recovered share of the logit difference",
}
WHERE = {
    "image": "residual stream, image tokens",
    "text": "residual stream, text tokens",
    "last": "residual stream, last token",
    "attention": "attention output, one token",
    "ffn": "FFN output, one token",
}
MOST_PAIR_TOKENS = 60


def layer_curves(curves: Mapping[str, Mapping[What, Curve]]) -> Figure:
    """Curves by what was put back and by category: a row of axes for each what, a line for each category."""
    whats = list(dict.fromkeys(what for found in curves.values() for what in found))
    figure = Figure(figsize=(11, 0.6 + 2.7 * len(whats)), layout="constrained")
    grid = figure.subplots(len(whats), len(MEASURES), squeeze=False, sharex=True)
    for row, what in zip(grid, whats, strict=True):
        for axes, measure in zip(row, MEASURES, strict=True):
            for number, (category, found) in enumerate(curves.items()):
                _line(axes, found[what], measure, category, kind_of(number))
            axes.axhline(0, color="black", linewidth=0.6)
            axes.grid(alpha=0.25, linewidth=0.5)
            undefined = sum(getattr(found[what], measure) is None for found in curves.values())
            if undefined:
                _say_undefined(axes, undefined, len(curves))
        row[0].set_ylabel(WHERE[what], fontsize=9)
    for axes, measure in zip(grid[0], MEASURES, strict=True):
        axes.set_title(TITLES[measure], fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("layer that reads it (last: final norm)", fontsize=9)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _line(axes: Axes, found: Curve, measure: str, label: str, kind: tuple[str, str]) -> None:
    values = getattr(found, measure)
    if values is None:
        return
    places = range(len(values))
    color, marker = kind
    axes.plot(places, values, marker=marker, markersize=4, linewidth=1.3, color=color, label=label)
    errors = {"probability_change": found.probability_error, "logit_change": found.logit_error}.get(measure)
    if errors is not None:
        low, high = (np.add(values, sign * 1.96 * np.asarray(errors)) for sign in (-1, 1))
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    step = max(1, len(values) // 8)
    axes.set_xticks(range(0, len(values), step))


def _say_undefined(axes: Axes, undefined: int, of: int) -> None:
    """In the middle where there is no line, else above all lines."""
    if undefined == of:
        axes.text(0.5, 0.5, "not defined", transform=axes.transAxes, ha="center", color="grey")
        axes.set_yticks([])
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))  # room for a line of text
    note = f"not defined for {undefined} of {of}"
    axes.text(0.98, 0.97, note, transform=axes.transAxes, ha="right", va="top", color="grey", fontsize=8)


def role_figure(found: RoleMap, title: str) -> Figure:
    """Heat maps [roles, layers] of the three measures, in the order of the prompt; grey is undefined."""
    layers = len(found.probability_change[0])
    undefined = [float("nan")] * layers
    shown = {
        "probability_change": found.probability_change,
        "logit_change": found.logit_change,
        "recovered": [undefined if row is None else row for row in found.recovered],
    }
    width, height = max(2.4, 0.28 * layers), 0.24 * len(found.roles)
    side_by_side = 2.2 + len(shown) * width <= WIDEST
    down, across = (1, len(shown)) if side_by_side else (len(shown), 1)
    size = (min(WIDEST, 2.2 + across * width), 0.5 + down * (0.8 + height))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for axes, (name, values) in zip(grid, shown.items(), strict=True):
        _heat_map(figure, axes, np.asarray(values), TITLES[name])
    labels = [f"{role}  ({count})" for role, count in zip(found.roles, found.pairs, strict=True)]
    for axes in grid[: 1 if side_by_side else None]:
        axes.set_yticks(range(len(labels)), [plain(label) for label in labels], fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def pair_figure(pair: Traced, what: What, images: Sequence[Sequence[Image.Image]], measure: str) -> Figure:
    """One pair: its images, and the heat map [tokens, layers] with its own tokens as labels."""
    values = recovered(pair, what) if measure == "recovered" else changes(pair, what)[..., 0]
    if values is None:
        values, measure = changes(pair, what)[..., 0], "probability_change"
    first = max(0, len(pair.tokens) - MOST_PAIR_TOKENS)
    cells = values[first:].numpy()
    height = max(3.4, 1.2 + 0.2 * len(cells))
    figure = Figure(figsize=(5.6 + max(2.0, 0.26 * cells.shape[1]), height), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[2.4, 3.2 + max(2.0, 0.26 * cells.shape[1])])
    left, right = halves
    for axes, shown, name, answer in zip(
        left.subplots(2, 1), images, ("clean", "edited"), pair.answers, strict=True
    ):
        if shown:
            axes.imshow(np.asarray(shown[0].convert("RGB")))
        axes.set_title(f"{name}: {plain(answer)}", fontsize=9)
        axes.set_axis_off()
    axes = right.subplots()
    _heat_map(right, axes, cells, TITLES[measure])
    axes.set_yticks(range(len(cells)), [plain(token) for token in pair.tokens[first:]], fontsize=7)
    right.suptitle(f"{plain(pair.key)}: {WHERE[what]}", fontsize=9)
    return figure


def _heat_map(figure: Any, axes: Axes, values: NDArray[np.float64], title: str) -> None:
    colors = colors_of(values)
    image = axes.imshow(values, **colors, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 8)))
    axes.set_xlabel("layer", fontsize=9)
    axes.set_title(title, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.9)


def plain(text: str) -> str:
    """Text that a figure can show: white space made visible, no mathematics, nothing unprintable."""
    shown = text.replace("\n", "⏎").replace("$", r"\$")
    shown = "".join(character if character.isprintable() else "·" for character in shown)
    return shown if len(shown) <= 28 else shown[:27] + "…"
