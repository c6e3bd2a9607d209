"""Figures that notebooks show without `import matplotlib.pyplot`, and the meaning of their colors."""

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8c8c8c"
"""A gain, a loss, and neither."""
KINDS = ("#000000", "#117733", "#aa4499", "#999933", "#882255", "#44aa99", "#661100", "#888888")
"""Colors of lines that are neither gains nor losses, each with a marker of `MARKERS`."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_GAIN = LinearSegmentedColormap.from_list(
    "gain", [ORANGE, "#ffffff", BLUE], N=257
)  # an odd number: 0 is white
_LOSS = LinearSegmentedColormap.from_list("loss", [BLUE, "#ffffff", ORANGE], N=257)
_MORE = LinearSegmentedColormap.from_list("more", ["#ffffff", BLUE])
_MORE_LOSS = LinearSegmentedColormap.from_list("more loss", ["#ffffff", ORANGE])


class ShownFigure(Figure):
    """A matplotlib figure that is its own image in notebooks, whichever backend is active."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image, format="png", dpi=100)
        return image.getvalue()


def colors_of(values: ArrayLike, *, loss: bool = False, reach: float | None = None) -> dict[str, Any]:
    """`cmap`, `vmin` and `vmax` of a heat map: blue for gains, orange for losses, white for 0.

    Where nothing is below 0 the scale begins at 0, since one with two sides would use half of its colors.

    Args:
        values: of the heat map; NaN and infinity are ignored.
        loss: whether values above 0 are losses, such as drops of a metric.
        reach: the end of the scale; by default the largest absolute value.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if reach is None:
        reach = float(np.abs(known).max(initial=0.0))
    reach = reach or 1.0
    if known.min(initial=0.0) >= 0:
        return {"cmap": _MORE_LOSS if loss else _MORE, "vmin": 0.0, "vmax": reach}
    return {"cmap": _LOSS if loss else _GAIN, "vmin": -reach, "vmax": reach}


def is_dark(value: float, colors: dict[str, Any]) -> bool:
    """Whether white text has more contrast on this value's color than black text."""
    share = (value - colors["vmin"]) / (colors["vmax"] - colors["vmin"])
    red, green, blue = (
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4
        for part in colors["cmap"](share)[:3]
    )
    # Relative luminance by WCAG; at 0.18 the contrasts with black and with white are equal.
    return bool(0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18)
