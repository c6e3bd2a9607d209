"""Another colour for a thing, with its light and shade kept.

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


def recolor(picture: Pixels, region: Region, colour: str) -> Pixels:
    """Paint the masked thing in a colour of `COLOURS`.

    Args:
        picture: [H, W, 3].
        region: the thing's soft mask.
        colour: the new colour's name.
    """
    crop = picture[region.window.slices]
    painted = lab_to_rgb(repaint(rgb_to_lab(crop), region.alpha, COLOURS[colour]))
    return blended(picture, region, painted)


def repaint(lab: Lab, alpha: NDArray[np.float32], home: Colour) -> Lab:
    """Give the colour's home to a Lab image `[h, w, 3]`, for what `alpha` masks."""
    inside = alpha > 0.5 if (alpha > 0.5).any() else alpha > 0
    lightness = lab[..., 0]
    low, middle, high = (float(one) for one in np.quantile(lightness[inside], (0.03, 0.5, 0.97)))
    wanted = float(np.clip(middle, home.dark, home.light))
    span = max(high - low, 1.0)
    # Dark things show their folds in few levels, and bright colours need more of them to look lit.
    gain = np.clip((6 + 0.35 * wanted) / span, 0.6, 2.2) if abs(wanted - middle) > 5 else 1.0
    shaded = wanted + (lightness - middle) * gain
    shaded = np.where(shaded > 94, 94 + (shaded - 94) * 0.3, shaded).clip(2, 99)
    # In the dark and towards white there is little room for colour.
    room = np.clip(shaded / wanted, 0.25, 1.25) * np.clip((103 - shaded) / (103 - wanted), 0.1, 1.15)
    own = 0.12 * (lab[..., 1:] - np.median(lab[..., 1:][inside], axis=0))
    hue = np.stack([home.a * room, home.b * room], axis=-1) + own
    return np.concatenate([shaded[..., None], hue], axis=-1).astype(np.float32)


def blended(picture: Pixels, region: Region, painted: Pixels) -> Pixels:
    """The picture with `painted`, `[h, w, 3]`, laid over its window as thickly as the mask says."""
    crop = picture[region.window.slices].astype(np.float32)
    alpha = region.alpha[..., None]
    mixed = crop + (painted.astype(np.float32) - crop) * alpha
    result = picture.copy()
    result[region.window.slices] = mixed.round().clip(0, 255).astype(np.uint8)
    return result


def rgb_to_lab(pixels: Pixels) -> Lab:
    """CIE Lab with L in 0..100."""
    return np.asarray(cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB))


def lab_to_rgb(lab: Lab) -> Pixels:
    """The nearest displayable colours."""
    rgb = cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_LAB2RGB)
    return (np.asarray(rgb) * 255).round().clip(0, 255).astype(np.uint8)
