"""Boxes in pixels, and their parts inside an image."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from hones_eval.editing.problems import RecordError


class Box(NamedTuple):
    """A rectangle: left and top edge, width and height, in pixels of the upright image."""

    x: float
    y: float
    w: float
    h: float

    @classmethod
    def of(cls, value: object) -> Self:
        """From `{"x", "y", "w", "h"}` or `[x, y, width, height]`.

        Raises: RecordError when it is neither, is not finite, or has no area.
        """
        try:
            numbers = [value[key] for key in "xywh"] if isinstance(value, Mapping) else list(_sequence(value))
            box = cls(*(float(number) for number in numbers))
        except (KeyError, TypeError, ValueError):
            raise RecordError(f"its box {value!r} is not of the form x, y, w, h") from None
        if not all(math.isfinite(edge) for edge in box):
            raise RecordError(f"its box {value!r} is not finite")
        if box.w <= 0 or box.h <= 0:
            raise RecordError(f"its box {_shown(box)} has no area")
        return box

    def inside(self, width: int, height: int) -> "Window":
        """Clip to an image of `width` x `height` pixels, and round outwards.

        Raises: RecordError when no pixel is left.
        """
        left, top = max(0, math.floor(self.x)), max(0, math.floor(self.y))
        right, bottom = min(width, math.ceil(self.x + self.w)), min(height, math.ceil(self.y + self.h))
        if left >= right or top >= bottom:
            raise RecordError(f"its box {_shown(self)} lies outside the image of {width} x {height}")
        return Window(left, top, right, bottom)


class Window(NamedTuple):
    """A rectangle of whole pixels inside an image: edges `left`, `top` and, exclusive, `right`, `bottom`."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Pixels across."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Pixels down."""
        return self.bottom - self.top

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of an image array `[H, W, ...]`."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def grown(self, margin: int, width: int, height: int) -> "Window":
        """Grow by `margin` pixels on every side, up to the edge of the image."""
        return Window(
            max(0, self.left - margin),
            max(0, self.top - margin),
            min(width, self.right + margin),
            min(height, self.bottom + margin),
        )

    def moved(self, dx: int, dy: int) -> "Window":
        """Shift by `dx` pixels to the right and `dy` down."""
        return Window(self.left + dx, self.top + dy, self.right + dx, self.bottom + dy)

    def joined(self, other: "Window") -> "Window":
        """The smallest window that contains both."""
        return Window(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )

    def overlaps(self, other: "Window") -> bool:
        """Whether a pixel is in both."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def _sequence(value: object) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise ValueError
    return list(value)


def _shown(box: Box) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"
