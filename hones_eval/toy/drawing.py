"""Draw a scene graph as an image, with numpy alone: the same pixels on every machine.

The word is set in Pillow's built-in bitmap font, so no font of the system is used.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hones_eval.toy.scenes import SIDE, Box, Scene, Thing

RGB = {
    "red": (225, 45, 45),
    "green": (40, 170, 70),
    "blue": (60, 100, 245),
    "yellow": (240, 220, 50),
    "purple": (175, 70, 205),
    "white": (245, 245, 245),
}
BLUE_BOX = (0, 60, 255)
BACKGROUND = (28, 28, 32)
_SUBPIXELS = 4
_GROOVE = 0.3  # brightness of the dark part of a texture


@dataclass(frozen=True)
class Paper:
    """Background and font of an image: background `[64, 64, 3]` (default: one colour)."""

    background: NDArray[np.float32] | None = None
    scalable_font: bool = False


def draw(scene: Scene, paper: Paper | None = None) -> NDArray[np.uint8]:
    """Draw a scene as `[64, 64, 3]` in 0..255."""
    paper = paper or Paper()
    canvas = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    canvas[:] = BACKGROUND if paper.background is None else paper.background
    for thing in scene.things:
        _paint(canvas, thing)
    _write(canvas, scene.word, scene.word_box, paper.scalable_font)
    return np.rint(canvas).astype(np.uint8)


def to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """Convert pixels `[64, 64, 3]` to an RGB Pillow image."""
    return Image.fromarray(pixels)


def _paint(canvas: NDArray[np.float32], thing: Thing) -> None:
    left, top, right, bottom = thing.box
    cover, shade = _stencil(thing.shape, thing.texture, right - left, bottom - top)
    patch = canvas[top:bottom, left:right]
    patch += cover * (shade * np.asarray(RGB[thing.color], dtype=np.float32) - patch)


@cache
def _stencil(
    shape: str, texture: str, width: int, height: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Coverage and brightness of a shape in its box, each `[height, width, 1]` in 0..1."""
    inside = _inside(shape, *_unit_grid(width, height)).astype(np.float32)
    cover = inside.reshape(height, _SUBPIXELS, width, _SUBPIXELS).mean(axis=(1, 3))
    y, x = np.mgrid[:height, :width]
    lit = {
        "solid": np.ones((height, width), dtype=bool),
        "striped": y // 2 % 2 == 0,
        "dotted": (y // 2 % 2 == 0) | (x // 2 % 2 == 0),
    }[texture]
    shade = np.where(lit, 1.0, _GROOVE).astype(np.float32)
    return cover[:, :, None], shade[:, :, None]


def _unit_grid(width: int, height: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres of the subpixels of a box, as x and y in -1..1."""
    x = (np.arange(width * _SUBPIXELS) + 0.5) / (width * _SUBPIXELS) * 2 - 1
    y = (np.arange(height * _SUBPIXELS) + 0.5) / (height * _SUBPIXELS) * 2 - 1
    return x[None, :], y[:, None]


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    radius = np.sqrt(x**2 + y**2)
    if shape == "circle":
        return radius <= 1
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.55)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 1
    if shape == "triangle":
        return np.abs(x) <= (y + 1) / 2
    if shape == "cross":
        return np.minimum(np.abs(x), np.abs(y)) <= 0.33
    fifth = 2 * np.pi / 5
    from_tip = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2) / (fifth / 2)
    return radius <= 0.36 + 0.7 * (1 - from_tip) ** 1.6


def _write(canvas: NDArray[np.float32], word: str, box: Box, scalable_font: bool) -> None:
    left, top, right, bottom = box
    canvas[top:bottom, left:right] = BLUE_BOX
    canvas[top + 2 : bottom - 2, left + 2 : right - 2] = 255
    ink = _ink(word, right - left - 4, bottom - top - 4, scalable_font)
    canvas[top + 2 : bottom - 2, left + 2 : right - 2] *= 1 - ink[:, :, None]


@cache
def _ink(word: str, width: int, height: int, scalable_font: bool) -> NDArray[np.float32]:
    """Darkness of the word set in the middle of a box, `[height, width]` in 0..1."""
    font = ImageFont.load_default(size=9) if scalable_font else ImageFont.load_default_imagefont()
    page = Image.new("L", (width, height))
    pen = ImageDraw.Draw(page)
    left, top, right, bottom = pen.textbbox((0, 0), word, font=font)
    corner = (round((width - right - left) / 2), round((height - bottom - top) / 2))
    pen.text(corner, word, fill=255, font=font)
    return np.asarray(page).astype(np.float32) / np.float32(255)
