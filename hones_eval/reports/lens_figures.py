"""Figures of the logit lens: an example's image next to the likeliest token of every layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from hones_eval.core.figure import colors_of, is_dark
from hones_eval.engine.activations import VIEWS
from hones_eval.methods.lens import Seen
from hones_eval.reports.figures import kind_of
from hones_eval.reports.trace_figures import plain

TITLES = {
    "attention": "attention output",
    "after_attention": "residual after attention",
    "ffn": "FFN output",
    "block": "block output",
}
MOST_POSITIONS = 16
SIDE_BY_SIDE = 5  # positions up to which the four views are in one row


def lens_figure(
    seen: Seen, top: Sequence[Sequence[Sequence[str]]], images: Sequence[Image.Image], prompt: str
) -> Figure:
    """Likeliest tokens as text, their probability as colour: views side by side, layers upwards.

    Args:
        seen: the example; of more than 16 positions the last 16 are drawn.
        top: the likeliest token's text by view, layer and position.
        images: the example's images; the first is drawn.
        prompt: the text under the image.
    """
    values = seen.readout.top_probabilities[..., 0].numpy()
    label = "probability of the likeliest token"
    return _figure(seen, values, top, images, prompt, label, colors_of(values, reach=1.0))


def difference_figure(
    seen: Seen, top: Sequence[Sequence[Sequence[str]]], images: Sequence[Image.Image], prompt: str
) -> Figure:
    """The model's minus the other model's probability of the answer as colour; `top` is text in the cells."""
    assert seen.other is not None
    values = (seen.readout.answer - seen.other.answer).numpy()
    label = f"probability of {plain(seen.answer)}: model minus other (blue: the model's is larger)"
    return _figure(seen, values, top, images, prompt, label, colors_of(values))


def mean_figure(means: dict[str, NDArray[np.float64]], examples: int) -> Figure:
    """Mean probability of the answer and mean entropy by layer at the last position, two axes per view."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.subplots(2, len(VIEWS), sharex=True, sharey="row", squeeze=False)
    for column, view in enumerate(VIEWS):
        for axes, name in zip(grid[:, column], ("answer", "entropy"), strict=True):
            for number, (key, label) in enumerate(((name, "model"), (f"other_{name}", "other"))):
                if key in means:
                    color, marker = kind_of(number)
                    axes.plot(means[key][column], marker=marker, markersize=4, color=color, label=label)
            axes.grid(alpha=0.25, linewidth=0.5)
        grid[0, column].set_title(TITLES[view], fontsize=9)
        grid[1, column].set_xlabel("layer", fontsize=9)
    grid[0, 0].set_ylabel("probability of the answer", fontsize=9)
    grid[1, 0].set_ylabel("entropy (nats)", fontsize=9)
    if "other_answer" in means:
        grid[0, 0].legend(fontsize=8)
    figure.suptitle(f"last position, mean over {examples} examples", fontsize=10)
    return figure


def _figure(
    seen: Seen,
    values: NDArray[Any],
    top: Sequence[Sequence[Sequence[str]]],
    images: Sequence[Image.Image],
    prompt: str,
    label: str,
    colors: dict[str, Any],
) -> Figure:
    shown = min(len(seen.positions), MOST_POSITIONS)
    layers = values.shape[1]
    down = 1 if shown <= SIDE_BY_SIDE else 2 if shown <= 2 * SIDE_BY_SIDE - 2 else len(VIEWS)
    width, height = max(1.5, 0.62 * shown), max(3.6, 1.4 + 0.27 * layers)
    size = (3.6 + len(VIEWS) // down * width, down * height)
    figure = Figure(figsize=size, layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[2.6, size[0] - 2.6])
    _draw_image(halves[0].subplots(), images, prompt, seen.answer)
    rows = halves[1].subplots(down, len(VIEWS) // down, sharex=True, sharey=True, squeeze=False)
    grid = rows.flatten()
    for place, (axes, view) in enumerate(zip(grid, VIEWS, strict=True)):
        image = axes.imshow(values[place, :, -shown:], **colors, origin="lower", aspect="auto")
        _write_tokens(axes, values[place, :, -shown:], [row[-shown:] for row in top[place]], colors)
        axes.set_xticks(
            range(shown), [plain(token) for token in seen.tokens[-shown:]], rotation=90, fontsize=7
        )
        axes.set_title(TITLES[view], fontsize=9)
    grid[0].set_yticks(range(layers))
    for axes in rows[:, 0]:
        axes.set_ylabel("layer", fontsize=9)
    halves[1].colorbar(image, ax=rows, label=label, shrink=0.9)
    return figure


def _write_tokens(
    axes: Axes, values: NDArray[Any], top: Sequence[Sequence[str]], colors: dict[str, Any]
) -> None:
    for layer, row in enumerate(top):
        for place, token in enumerate(row):
            dark = is_dark(values[layer, place], colors)
            shown = plain(token.strip() or token)[:9]
            axes.text(
                place, layer, shown, ha="center", va="center", fontsize=6, color="white" if dark else "black"
            )


def _draw_image(axes: Axes, images: Sequence[Image.Image], prompt: str, answer: str) -> None:
    if images:
        axes.imshow(np.asarray(images[0].convert("RGB")))
    axes.set_axis_off()
    words, lines = plain_line(prompt).split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 34:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    axes.set_title("\n".join([*lines[:8], f"answer: {plain(answer)}"]), fontsize=8, loc="left")


def plain_line(text: str) -> str:
    """A whole text that a figure can show on one line."""
    shown = " ".join(text.split()).replace("$", r"\$")
    return "".join(character if character.isprintable() else "·" for character in shown)
