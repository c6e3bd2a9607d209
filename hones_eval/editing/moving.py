"""Move a thing within an image, or mirror a part of the image."""

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
    """Grow a mask to include the soft edge of the thing, more for thicker things, and its frame.

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


def remove(image: Pixels, region: Region, seed: int) -> tuple[Pixels, Footprint]:
    """Remove a thing and fill its region. Returns the image and the filled mask."""
    hole = grown(region.footprint(*image.shape[:2]))
    return fill(image, hole, seed), hole


def move(image: Pixels, region: Region, shift: Shift, seed: int) -> tuple[Pixels, Footprint]:
    """Move a thing and fill its old region. Returns the image and the mask of changed pixels."""
    filled, hole = remove(image, region, seed)
    height, width = hole.shape
    window, alpha = _inside(region, shift, width, height)
    thing = image[window.moved(-shift.dx, -shift.dy).slices].astype(np.float32)
    ground = filled[window.slices].astype(np.float32)
    result = filled.copy()
    mixed = ground + (thing - ground) * alpha[..., None]
    result[window.slices] = mixed.round().clip(0, 255).astype(np.uint8)
    touched = hole.copy()
    touched[window.slices] |= alpha > 0
    return result, touched


def mirror(image: Pixels, stretch: Window) -> tuple[Pixels, Footprint]:
    """Mirror a part of an image left to right, blended at its edges so that no seam is visible."""
    height, width = image.shape[:2]
    feather = max(3, round(0.06 * min(stretch.width, stretch.height)))
    crop = image[stretch.slices].astype(np.float32)
    alpha = _feathered(stretch, feather, width, height)
    flipped = _levelled(crop[:, ::-1], crop)
    result = image.copy()
    result[stretch.slices] = (
        (crop + (flipped - crop) * alpha[..., None]).round().clip(0, 255).astype(np.uint8)
    )
    touched = np.zeros((height, width), bool)
    touched[stretch.slices] = alpha > 0
    return result, touched


def best_stretch(image: Pixels, union: Window) -> Window:
    """Choose the part to mirror around two things: the one whose seams match best.

    Up and down it may reach to the image's edge, where there is no seam; sideways by a fifth of the width.
    """
    height, width = image.shape[:2]
    small, scale = _seam_copy(image)
    steps = [round(share * union.width) for share in (0.03, 0.06, 0.09, 0.12, 0.16, 0.2)]
    lefts = sorted({max(0, union.left - step) for step in steps})
    rights = sorted({min(width, union.right + step) for step in steps})
    tops = sorted({max(0, union.top - round(share * union.height)) for share in (0.04, 0.1, 0.2)} | {0})
    bottoms = sorted(
        {min(height, union.bottom + round(s * union.height)) for s in (0.04, 0.1, 0.2)} | {height}
    )
    stretches = [Window(a, b, c, d) for a in lefts for b in tops for c in rights for d in bottoms]
    return min(stretches, key=lambda stretch: _seam(small, stretch, scale, width, height))


def _seam_copy(image: Pixels) -> tuple[NDArray[np.float32], float]:
    scale = min(1.0, 400 / max(image.shape[:2]))
    size = max(2, round(image.shape[1] * scale)), max(2, round(image.shape[0] * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.float32), scale


def _seam(small: NDArray[np.float32], stretch: Window, scale: float, width: int, height: int) -> float:
    """Sum of colour differences along the seams, plus a small cost per mirrored pixel."""
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
    """A shifted mask, clipped to the image."""
    full = region.window.moved(*shift)
    cut = Window(max(0, full.left), max(0, full.top), min(width, full.right), min(height, full.bottom))
    rows = slice(cut.top - full.top, cut.bottom - full.top)
    columns = slice(cut.left - full.left, cut.right - full.left)
    return cut, region.alpha[rows, columns]


def _feathered(stretch: Window, feather: int, width: int, height: int) -> NDArray[np.float32]:
    """1 inside, falling to 0 at the edges that are not edges of the image."""
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
    """Match the lightness of each mirrored column to the original one, so that the light is consistent."""
    wide = max(3.0, crop.shape[1] / 3)
    difference = cv2.GaussianBlur(crop, (0, 0), wide) - cv2.GaussianBlur(
        np.ascontiguousarray(flipped), (0, 0), wide
    )
    return np.asarray(flipped + 0.5 * difference, np.float32)
