"""Change the colour of a thing, keeping its light and shade.

Works in CIE Lab, where lightness and colour are apart: the lightness keeps its course and only moves into
the range that the colour's name is used for (a black shirt cannot be yellow and stay as dark); the hue is
the new colour's, as strong as the light allows.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from hones_eval.editing.masks import Region
from hones_eval.editing.photographs import Pixels
from hones_eval.editing.vocabulary import COLOURS, Colour

Lab = NDArray[np.float32]
VIVID = 0.85


def recolor(image: Pixels, region: Region, colour: str) -> Pixels:
    """Paint the masked thing in a colour of `COLOURS`.

    Args:
        image: [H, W, 3].
        region: the thing's soft mask.
        colour: the new colour's name.
    """
    crop = image[region.window.slices]
    painted = lab_to_rgb(repaint(rgb_to_lab(crop), region.alpha, COLOURS[colour]))
    return blended(image, region, painted)


def toned(image: Pixels, region: Region, was: str) -> Region:
    """Restrict a mask to the thing's own colour: the jacket, not the person who wears it.

    Returns the whole mask if less than a tenth of it would remain.
    """
    home = COLOURS[was]
    lab = cv2.GaussianBlur(rgb_to_lab(image[region.window.slices]), (0, 0), 1)
    chroma, strength = np.hypot(lab[..., 1], lab[..., 2]), float(np.hypot(home.a, home.b))
    if strength > 20:
        angle = np.arctan2(lab[..., 2], lab[..., 1]) - np.arctan2(home.b, home.a)
        alike = (np.abs((angle + np.pi) % (2 * np.pi) - np.pi) < 0.95) & (chroma > 0.2 * strength)
    else:
        alike = (chroma < strength + 16) & (lab[..., 0] > home.dark - 20) & (lab[..., 0] < home.light + 20)
    small, large = (cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)) for size in (3, 7))
    solid = cv2.morphologyEx(alike.astype(np.uint8), cv2.MORPH_OPEN, small)
    solid = cv2.morphologyEx(solid, cv2.MORPH_CLOSE, large)
    soft = cv2.GaussianBlur(solid.astype(np.float32), (0, 0), 0.8) * region.alpha
    soft[soft < 0.03] = 0
    if (soft > 0.5).sum() < 0.1 * (region.alpha > 0.5).sum():
        return region
    return Region(region.window, soft.astype(np.float32))


def spread(image: Pixels, region: Region) -> Region:
    """Extend a mask to adjoining pixels of the same colour: a box drawn by hand may cut off a sleeve.

    It reaches at most a third of the thing's size further, and never jumps a gap.
    """
    inside = region.alpha > 0.5
    if not inside.any():
        return region
    rows, columns = np.nonzero(inside)
    reach = max(4, int(max(np.ptp(rows), np.ptp(columns))) // 3)
    window = region.window.grown(reach, image.shape[1], image.shape[0])
    alpha = np.zeros((window.height, window.width), np.float32)
    alpha[region.window.moved(-window.left, -window.top).slices] = region.alpha
    lab = rgb_to_lab(image[window.slices])
    core = lab[alpha > 0.5]
    middle = np.median(core, axis=0)
    width = np.maximum(np.median(np.abs(core - middle), axis=0) * 2.5, (5, 3, 3))
    alike = (np.abs(cv2.GaussianBlur(lab, (0, 0), 1) - middle) <= width).all(-1) | (alpha > 0.5)
    near = cv2.dilate((alpha > 0.5).astype(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)) > 0
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    solid = cv2.morphologyEx((alike & near).astype(np.uint8), cv2.MORPH_OPEN, kernel)
    _, pieces = cv2.connectedComponents(solid)
    wanted = np.isin(pieces, np.unique(pieces[(alpha > 0.5) & (pieces > 0)])) & (pieces > 0)
    grown = cv2.GaussianBlur(wanted.astype(np.float32), (0, 0), 1.0)
    grown[grown < 0.03] = 0
    return Region(window, np.maximum(alpha, grown).astype(np.float32))


def repaint(lab: Lab, alpha: NDArray[np.float32], home: Colour) -> Lab:
    """Shift the masked pixels of a Lab image `[h, w, 3]` to a colour."""
    inside = alpha > 0.5 if (alpha > 0.5).any() else alpha > 0
    lightness = lab[..., 0]
    low, middle, high = (float(value) for value in np.quantile(lightness[inside], (0.03, 0.5, 0.97)))
    wanted = float(np.clip(middle, home.dark, home.light))
    span = max(high - low, 1.0)
    # Dark things show their folds in few levels of lightness; bright colours need more to look lit.
    gain = np.clip((6 + 0.5 * wanted) / span, 0.6, 3.0) if abs(wanted - middle) > 5 else 1.0
    shaded = wanted + (lightness - middle) * gain
    shaded = np.where(shaded > 94, 94 + (shaded - 94) * 0.3, shaded).clip(2, 99)
    # Near black and near white only weak colours can be displayed.
    room = np.clip(shaded / wanted, 0.25, 1.25) * np.clip((103 - shaded) / (103 - wanted), 0.1, 1.15)
    own = 0.12 * (lab[..., 1:] - np.median(lab[..., 1:][inside], axis=0))
    hue = VIVID * np.stack([home.a * room, home.b * room], axis=-1) + own
    return np.concatenate([shaded[..., None], hue], axis=-1).astype(np.float32)


def blended(image: Pixels, region: Region, painted: Pixels) -> Pixels:
    """The image with `painted`, `[h, w, 3]`, blended into its window by the mask."""
    crop = image[region.window.slices].astype(np.float32)
    alpha = region.alpha[..., None]
    mixed = crop + (painted.astype(np.float32) - crop) * alpha
    result = image.copy()
    result[region.window.slices] = mixed.round().clip(0, 255).astype(np.uint8)
    return result


def rgb_to_lab(pixels: Pixels) -> Lab:
    """CIE Lab with L in 0..100."""
    return np.asarray(cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB))


def lab_to_rgb(lab: Lab) -> Pixels:
    """The nearest displayable colours."""
    rgb = cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_LAB2RGB)
    return (np.asarray(rgb) * 255).round().clip(0, 255).astype(np.uint8)
