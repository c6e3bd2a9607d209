"""A thing at another place, and a stretch of a picture seen in a mirror."""

import cv2
import numpy as np
from numpy.typing import NDArray

from hones_eval.editing.boxes import Window
from hones_eval.editing.fill import fill
from hones_eval.editing.layout import Shift
from hones_eval.editing.masks import Region
from hones_eval.editing.photographs import Pixels

Footprint = NDArray[np.bool_]


def grown(footprint: Footprint, window: Window) -> Footprint:
    """A little more than the thing, so that its soft edge goes with it; more for large things."""
    reach = max(3, round(0.04 * min(window.width, window.height)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return np.asarray(cv2.dilate(footprint.astype(np.uint8), kernel) > 0)


def remove(picture: Pixels, region: Region, box: Window, seed: int) -> tuple[Pixels, Footprint]:
    """Take a thing out and fill its place; the picture and what was filled."""
    hole = grown(region.footprint(*picture.shape[:2]), box)
    return fill(picture, hole, seed), hole


def move(picture: Pixels, region: Region, box: Window, shift: Shift, seed: int) -> tuple[Pixels, Footprint]:
    """Take a thing out, fill its place, and set it down at another; the picture and what was touched."""
    filled, hole = remove(picture, region, box, seed)
    height, width = hole.shape
    window, alpha = _inside(region, shift, width, height)
    thing = picture[window.moved(-shift.dx, -shift.dy).slices].astype(np.float32)
    ground = filled[window.slices].astype(np.float32)
    result = filled.copy()
    mixed = ground + (thing - ground) * alpha[..., None]
    result[window.slices] = mixed.round().clip(0, 255).astype(np.uint8)
    touched = hole.copy()
    touched[window.slices] |= alpha > 0
    return result, touched


def mirror(picture: Pixels, stretch: Window) -> tuple[Pixels, Footprint]:
    """Turn a stretch of a picture left to right, blended in so that no seam shows at its edges."""
    height, width = picture.shape[:2]
    feather = max(3, round(0.06 * min(stretch.width, stretch.height)))
    crop = picture[stretch.slices].astype(np.float32)
    alpha = _feathered(stretch, feather, width, height)
    flipped = _levelled(crop[:, ::-1], crop)
    result = picture.copy()
    result[stretch.slices] = (
        (crop + (flipped - crop) * alpha[..., None]).round().clip(0, 255).astype(np.uint8)
    )
    touched = np.zeros((height, width), bool)
    touched[stretch.slices] = alpha > 0
    return result, touched


def _inside(region: Region, shift: Shift, width: int, height: int) -> tuple[Window, NDArray[np.float32]]:
    """A mask at its new place, cut to the picture."""
    full = region.window.moved(*shift)
    cut = Window(max(0, full.left), max(0, full.top), min(width, full.right), min(height, full.bottom))
    rows = slice(cut.top - full.top, cut.bottom - full.top)
    columns = slice(cut.left - full.left, cut.right - full.left)
    return cut, region.alpha[rows, columns]


def _feathered(stretch: Window, feather: int, width: int, height: int) -> NDArray[np.float32]:
    """1 inside, running out to 0 at those edges that are not the picture's."""
    across = np.minimum(
        _ramp(stretch.width, feather, stretch.left > 0),
        _ramp(stretch.width, feather, stretch.right < width)[::-1],
    )
    down = np.minimum(
        _ramp(stretch.height, feather, stretch.top > 0),
        _ramp(stretch.height, feather, stretch.bottom < height)[::-1],
    )
    return np.asarray(np.minimum(down[:, None], across[None]), np.float32)


def _ramp(length: int, feather: int, soft: bool) -> NDArray[np.float64]:
    if not soft:
        return np.ones(length)
    return np.asarray((np.arange(length) / feather).clip(0, 1))


def _levelled(flipped: NDArray[np.float32], crop: NDArray[np.float32]) -> NDArray[np.float32]:
    """Even out what light falls differently from side to side: columns take on the light that was there."""
    wide = max(3.0, crop.shape[1] / 3)
    difference = cv2.GaussianBlur(crop, (0, 0), wide) - cv2.GaussianBlur(
        np.ascontiguousarray(flipped), (0, 0), wide
    )
    return np.asarray(flipped + 0.5 * difference, np.float32)
