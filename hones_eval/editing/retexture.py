"""Change the material of a thing: a drawn texture, shaded like the original."""

import cv2
import numpy as np

from hones_eval.editing.masks import Region
from hones_eval.editing.photographs import Pixels
from hones_eval.editing.recolor import blended, lab_to_rgb, rgb_to_lab
from hones_eval.editing.textures import Field, texture

# How much of the old surface's fine relief still shows through, and how strongly light shapes the new one.
GLOSS = {"metal": 1.5, "plastic": 1.3, "wood": 0.9, "brick": 0.75, "stone": 0.75, "fabric": 0.85}


def retexture(image: Pixels, region: Region, material: str, seed: int, colour: str | None = None) -> Pixels:
    """Lay a drawn material over the masked thing, shaded as it was.

    Args:
        image: [H, W, 3].
        region: the thing's soft mask.
        material: one of those that `texture` draws.
        seed: of the texture's noise.
        colour: of a plastic or fabric, if the prompt names one.
    """
    lab = rgb_to_lab(image[region.window.slices])
    rows, columns = np.nonzero(region.alpha > 0.5)
    unit = float(max(np.ptp(rows), np.ptp(columns)) + 1) if len(rows) else float(max(region.alpha.shape))
    height, width = region.alpha.shape
    surface = texture(material, height, width, unit, seed, colour)
    surface[..., 0] += _light(lab[..., 0], region) * GLOSS[material]
    if material in ("metal", "plastic"):
        surface = _shine(surface, lab[..., 0], region)
    surface[..., 0] = surface[..., 0].clip(2, 99)
    return blended(image, region, lab_to_rgb(surface))


def _light(lightness: Field, region: Region) -> Field:
    """Light and shade without the thing's own pattern: its blurred lightness, centred."""
    weight = np.maximum(region.alpha, 1e-3)
    course = _wide(lightness * weight, 0.03) / np.maximum(_wide(weight, 0.03), 1e-6)
    centred = course - np.median(course[region.alpha > 0.5]) if (region.alpha > 0.5).any() else course * 0
    return np.asarray(centred.clip(-30, 30), np.float32)


def _wide(values: Field, share: float) -> Field:
    """Blur by a share of the longer side, on a copy no larger than the blur needs."""
    height, width = values.shape
    scale = min(1.0, 600 / max(height, width))
    size = max(2, round(width * scale)), max(2, round(height * scale))
    small = np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA)) if scale < 1 else values
    blurred = cv2.GaussianBlur(small, (0, 0), max(0.5, share * max(small.shape)))
    return np.asarray(
        cv2.resize(blurred, (width, height), interpolation=cv2.INTER_LINEAR) if scale < 1 else blurred,
        np.float32,
    )


def _shine(surface: Field, lightness: Field, region: Region) -> Field:
    """Add highlights where the thing is brightest and along its upper edge, as on glossy surfaces."""
    inside = region.alpha > 0.5
    depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 5)
    reach = max(3.0, 0.06 * max(region.alpha.shape))
    slope = cv2.Sobel(np.minimum(depth, reach).astype(np.float32), cv2.CV_32F, 0, 1)
    rim, lower = _wide(np.maximum(slope, 0), 0.02), _wide(np.maximum(-slope, 0), 0.02)
    strength = rim / max(float(rim.max()), 1e-6) - 0.6 * lower / max(float(lower.max()), 1e-6)
    lit = surface.copy()
    lit[..., 0] += 22 * strength
    lit[..., 1:] *= (1 - 0.5 * strength.clip(0, 1))[..., None]
    return lit
