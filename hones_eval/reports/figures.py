"""Figures as PNG files, drawn without a window and without matplotlib's global state."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hones_eval.core.artifact import write_bytes
from hones_eval.core.figure import BLUE, GREY, KINDS, MARKERS, ORANGE, ShownFigure, colors_of, is_dark

Floats = NDArray[np.float64]

WIDEST = 13.0  # inches: a page shows them at 100 pixels an inch, so that text of 8 points stays readable


def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all; the same numbers give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def drops(report: Mapping[str, Any]) -> ShownFigure:
    """Losses by masking the selected banks, with their intervals, and the random ones (HONES 3).

    Orange is a loss, blue a gain.
    """
    shown = ["metric"] if report["sites"] == "neurons" else ["metric", "probability", "accuracy"]
    figure = ShownFigure(figsize=(3.6 * len(shown), 3.2), layout="constrained")
    chosen = list(report["beyond_random"])
    random = [bank for name, bank in report["banks"].items() if name not in chosen]
    for axes, what in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for place, name in enumerate(chosen):
            drop = report["banks"][name][f"{what}_drop"]
            axes.bar(place, drop["value"], 0.6, color=ORANGE if drop["value"] > 0 else BLUE)
            if drop["low"] is not None:
                axes.plot([place, place], [drop["low"], drop["high"]], color="black", linewidth=1.2)
        values = [bank[f"{what}_drop"]["value"] for bank in random]
        axes.bar(len(chosen), np.mean(values), 0.6, color=GREY)
        places = len(chosen) + (np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1))
        axes.plot(places, values, "o", color="black", markersize=3)
        axes.set_xticks(range(len(chosen) + 1), [*chosen, f"random ({len(values)})"])
        axes.axhline(0, color="black", linewidth=0.6)
        name = report["metric"] if what == "metric" else what
        axes.set_ylabel(f"drop of {name}")
        axes.set_title(f"unedited {report['baseline'][what]:.3g}", fontsize=9)
    count, sizes = report["examples"]["count"], [report["bank_sizes"][name] for name in chosen]
    masked = " or ".join(str(size) for size in dict.fromkeys(sizes))
    title = f"Loss by masking {masked} {report['sites']}, {count} examples, 95 % intervals"
    figure.suptitle(fill(title, 36 * len(shown)), fontsize=9)
    return figure


def layer_curves(counts: Mapping[str, Sequence[int]]) -> Figure:
    """Selected neurons in each layer, a line per task: the layers that tasks prefer (HONES 3)."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, values) in enumerate(counts.items()):
        color, marker = kind_of(number)
        axes.plot(range(len(values)), values, marker=marker, markersize=4, color=color, label=name)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("selected neurons")
    axes.set_title(f"Selected neurons by layer ({sum(next(iter(counts.values()), ()))} per task)", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def matrix(
    values: Floats, rows: Sequence[str], columns: Sequence[str], title: str, label: str, *, loss: bool = False
) -> Figure:
    """A heat map with its numbers; NaN cells stay empty. `loss`: values above 0 are losses."""
    width = min(WIDEST, 1.6 + 0.9 * len(columns))
    figure = Figure(figsize=(width, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = colors_of(values, loss=loss)
    image = axes.imshow(values, **colors, aspect="auto")
    size = 10 if width < WIDEST else 8
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            shown = f"{0.0 if abs(value) < 0.005 else value:.2f}"
            color = "white" if is_dark(value, colors) else "black"
            axes.text(j, i, shown, ha="center", va="center", color=color, fontsize=size)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def heat_maps(scores: Mapping[str, Floats], label: str) -> Figure:
    """Scores [L, H] of several rankings, three in a row, each on its own scale, zero in white.

    Blue is a head that matters, orange one whose edit helps.
    """
    across = min(3, len(scores))
    down = -(-len(scores) // across)
    figure = Figure(figsize=(3.4 * across, 3.0 * down), layout="constrained")
    every = figure.subplots(down, across, squeeze=False).flatten()
    for axes in every[len(scores) :]:
        axes.set_axis_off()
    for axes, (name, values) in zip(every, scores.items(), strict=False):
        image = axes.imshow(values, **colors_of(values), origin="lower", aspect="auto")
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(name, fontsize=9)
        figure.colorbar(image, ax=axes, label=label)
    return figure


def bars(values: Mapping[str, int], label: str) -> Figure:
    """Named counts as horizontal bars, the first on top."""
    room = min(8.0, 0.08 * max(map(len, values), default=0))  # inches that the longest name takes
    figure = Figure(figsize=(3.5 + room, 0.8 + 0.3 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(values)), list(values.values()), color=GREY)
    for place, value in enumerate(values.values()):
        axes.text(value, place, f" {value}", va="center", fontsize=8)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the numbers
    axes.set_xlabel(label)
    return figure


def gains(panels: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]], label: str) -> Figure:
    """Changes with their intervals by panel, row and kind: a marker per kind, side by side in its row.

    Every dot is a mapping with `value`, `low` and `high`; the last two may be None.
    """
    rows = max(len(panel) for panel in panels.values())
    kinds = list(dict.fromkeys(kind for panel in panels.values() for row in panel.values() for kind in row))
    size = (min(WIDEST, 1.6 + 3.6 * len(panels)), 1.2 + 0.14 * rows * (len(kinds) + 1))
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axes, (title, panel) in zip(every, panels.items(), strict=True):
        for place, dots in enumerate(panel.values()):
            for kind, dot in dots.items():
                number = kinds.index(kind)
                height = place + 0.8 * ((number + 0.5) / len(kinds) - 0.5)
                color, marker = kind_of(number)
                if dot["low"] is not None:
                    axes.plot([dot["low"], dot["high"]], [height, height], color=color, linewidth=1.2)
                axes.plot(dot["value"], height, marker, color=color, markersize=4, label=kind)
        for place in range(1, len(panel)):
            axes.axhline(place - 0.5, color=GREY, linewidth=0.4)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_yticks(range(len(panel)), list(panel))
        axes.set_ylim(len(panel) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=9)
    shown = dict(zip(*reversed(every[0].get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside right center", fontsize=8)
    return figure


def matrices(
    values: Mapping[str, Floats], rows: Sequence[str], columns: Sequence[str], label: str, across: int = 3
) -> Figure:
    """Heat maps of equal rows and columns on one scale of colors, with their numbers; NaN stays empty.

    As many of them, up to `across`, are in a row as a page is wide.
    """
    across = max(1, min(across, len(values), int((WIDEST - 1.8) / (0.52 * len(columns)))))
    down = -(-len(values) // across)
    size = (1.8 + 0.52 * len(columns) * across, 1.4 + (0.36 * len(rows) + 0.3) * down)
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    colors = colors_of(np.stack(list(values.values())))
    for axes, (name, matrix) in zip(every, values.items(), strict=False):
        image = axes.imshow(matrix, **colors, aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                shown = "0" if abs(value) < 5e-4 else f"{value:+.3f}"
                color = "white" if is_dark(value, colors) else "black"
                axes.text(j, i, shown, ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_title(name, fontsize=9)
    for axes in every[len(values) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=every.tolist(), label=label, shrink=0.8)
    return figure


def kind_of(number: int) -> tuple[str, str]:
    """The color and the marker of a line that is neither a gain nor a loss, by its number."""
    return KINDS[number % len(KINDS)], MARKERS[number % len(MARKERS)]
