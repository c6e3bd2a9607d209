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


def grown(footprint: Footprint) -> Footprint:
    """More than the thing by its soft edge, the thicker it is the more; and by a frame, where it is framed.

    What has four straight sides, such as a mirror, is cut out without its frame.
    """
    rows, columns = np.flatnonzero(footprint.any(1)), np.flatnonzero(footprint.any(0))
    if not len(rows):
        return footprint.copy()
    bounds = Window(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    thing = footprint[bounds.slices]
    thickness = float(cv2.distanceTransform(np.pad(thing.astype(np.uint8), 1), cv2.DIST_L2, 3).max())
    reach = max(3, round((0.3 if _is_four_sided(thing) else 0.18) * thickness))
    window = bounds.grown(reach + 1, footprint.shape[1], footprint.shape[0])
    away = cv2.distanceTransform((~footprint[window.slices]).astype(np.uint8), cv2.DIST_L2, 5)
    larger = footprint.copy()
    larger[window.slices] |= away <= reach
    return larger


def remove(picture: Pixels, region: Region, seed: int) -> tuple[Pixels, Footprint]:
    """Take a thing out and fill its place; the picture and what was filled."""
    hole = grown(region.footprint(*picture.shape[:2]))
    return fill(picture, hole, seed), hole


def move(picture: Pixels, region: Region, shift: Shift, seed: int) -> tuple[Pixels, Footprint]:
    """Take a thing out, fill its place, and set it down at another; the picture and what was touched."""
    filled, hole = remove(picture, region, seed)
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


def best_stretch(picture: Pixels, union: Window) -> Window:
    """Choose how far beyond two things to mirror: where the two sides of each seam are most alike.

    Up and down it may reach to the picture's edge, where there is no seam; sideways by a fifth of the width.
    """
    height, width = picture.shape[:2]
    small, scale = _seam_copy(picture)
    steps = [round(share * union.width) for share in (0.03, 0.06, 0.09, 0.12, 0.16, 0.2)]
    lefts = sorted({max(0, union.left - step) for step in steps})
    rights = sorted({min(width, union.right + step) for step in steps})
    tops = sorted({max(0, union.top - round(share * union.height)) for share in (0.04, 0.1, 0.2)} | {0})
    bottoms = sorted(
        {min(height, union.bottom + round(s * union.height)) for s in (0.04, 0.1, 0.2)} | {height}
    )
    stretches = [Window(a, b, c, d) for a in lefts for b in tops for c in rights for d in bottoms]
    return min(stretches, key=lambda one: _seam(small, one, scale, width, height))


def _seam_copy(picture: Pixels) -> tuple[NDArray[np.float32], float]:
    scale = min(1.0, 400 / max(picture.shape[:2]))
    size = max(2, round(picture.shape[1] * scale)), max(2, round(picture.shape[0] * scale))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.float32), scale


def _seam(small: NDArray[np.float32], stretch: Window, scale: float, width: int, height: int) -> float:
    """Sum of colour differences along the seams, with a little for each pixel that the mirror touches."""
    left, top = int(stretch.left * scale), int(stretch.top * scale)
    right = min(small.shape[1], max(left + 2, int(stretch.right * scale))) - 1
    bottom = min(small.shape[0], max(top + 2, int(stretch.bottom * scale))) - 1
    upright = np.abs(small[top : bottom + 1, left] - small[top : bottom + 1, right]).sum()
    total = float(upright) * ((stretch.left > 0) + (stretch.right < width))
    for row, seen in ((top, stretch.top > 0), (bottom, stretch.bottom < height)):
        if seen:
            line = small[row, left : right + 1]
            total += float(np.abs(line - line[::-1]).sum())
    return float(total + 0.1 * (right - left) * (bottom - top))


def _is_four_sided(thing: Footprint) -> bool:
    rows, columns = np.nonzero(thing)
    if not len(rows):
        return False
    hull = cv2.convexHull(np.stack([columns, rows], axis=1).astype(np.int32))
    corners = cv2.approxPolyDP(hull, 0.04 * cv2.arcLength(hull, True), True)
    return len(corners) <= 4 and len(rows) >= 0.95 * float(cv2.contourArea(hull))


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
