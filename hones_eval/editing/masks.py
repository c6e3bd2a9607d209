"""Soft masks of a thing: from its box, cut out by colour, or from a segmenter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from hones_eval.choices import MaskName
from hones_eval.editing.boxes import Window
from hones_eval.editing.photographs import Pixels
from hones_eval.errors import HonesError

Alpha = NDArray[np.float32]
CUT_SIDE = 320


class Region(NamedTuple):
    """A soft mask: `alpha` in 0..1, `[h, w]`, inside `window` and 0 everywhere else."""

    window: Window
    alpha: Alpha
    rough: bool = False
    """Whether the thing could not be separated from its background."""

    def footprint(self, height: int, width: int) -> NDArray[np.bool_]:
        """All pixels of the image that the mask touches, `[H, W]`."""
        full = np.zeros((height, width), bool)
        full[self.window.slices] = self.alpha > 0
        return full


Masker = Callable[[Pixels, Window], Region]


def box_mask(image: Pixels, box: Window) -> Region:
    """The whole box with a soft edge of a few pixels (none at the edge of the image)."""
    feather = max(2, round(0.04 * min(box.width, box.height)))
    window = box.grown(feather, image.shape[1], image.shape[0])
    solid = np.zeros((window.height, window.width), np.uint8)
    solid[_within(box, window)] = 255
    distance = cv2.distanceTransform(255 - solid, cv2.DIST_L2, 5)
    return Region(window, np.clip(1 - distance / (feather + 1), 0, 1).astype(np.float32))


def cut_mask(image: Pixels, box: Window) -> Region:
    """The thing in the box, cut out by its colours (GrabCut, Rother et al. 2004).

    Where that finds next to nothing, as of a bicycle, whatever stands out from the ground behind it counts;
    where that fails too, or finds a part that does not span the box, the whole box.
    """
    context = box.grown(max(12, round(0.35 * max(box.width, box.height))), image.shape[1], image.shape[0])
    crop = image[context.slices]
    scale = min(1.0, CUT_SIDE / max(crop.shape[:2]))
    small = crop if scale == 1 else _resized(crop, scale)
    area = max(1.0, box.width * box.height * scale * scale)
    found = _grab(small, box, context, scale)
    rough = bool(found.sum() < 0.08 * area)
    if rough:
        found = _stand_out(small, box, context, scale)
    if not 0.08 <= float(found.sum()) / area <= 0.97 or not _spans(found, box, scale):
        return box_mask(image, box)._replace(rough=True)
    alpha = cv2.resize(found.astype(np.float32), crop.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    alpha = cv2.GaussianBlur(alpha, (0, 0), max(0.8, 0.7 / scale))
    alpha[alpha < 0.03] = 0
    return Region(context, np.clip(alpha, 0, 1).astype(np.float32), rough)


def _spans(found: NDArray[np.bool_], box: Window, scale: float) -> bool:
    """Whether the found region spans most of the box's width and height, as the thing itself does."""
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    return bool(np.ptp(rows) >= 0.75 * box.height * scale and np.ptp(columns) >= 0.6 * box.width * scale)


def _grab(small: Pixels, box: Window, context: Window, scale: float) -> NDArray[np.bool_]:
    """GrabCut initialized with the box, without small fragments."""
    left, top, width, height = _scaled(small, box, context, scale)
    marks = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)
    inner = marks[top : top + height, left : left + width]
    inner[:] = cv2.GC_PR_BGD
    rows, columns = np.mgrid[0:height, 0:width]
    inner[(2 * (rows + 0.5) / height - 1) ** 2 + (2 * (columns + 0.5) / width - 1) ** 2 <= 0.7] = (
        cv2.GC_PR_FGD
    )
    if (marks == cv2.GC_BGD).sum() < 16:
        return np.asarray(marks == cv2.GC_PR_FGD)
    cv2.setRNGSeed(0)  # its clusters start at random
    no_box = (0, 0, 1, 1)
    cv2.grabCut(np.ascontiguousarray(small), marks, no_box, _model(), _model(), 6, cv2.GC_INIT_WITH_MASK)
    found = np.isin(marks, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    opened = cv2.morphologyEx(found, cv2.MORPH_OPEN, kernel[1:4, 1:4])
    return _without_crumbs(np.asarray(cv2.morphologyEx(opened, cv2.MORPH_CLOSE, kernel)))


def _resized(crop: Pixels, scale: float) -> Pixels:
    size = max(4, round(crop.shape[1] * scale)), max(4, round(crop.shape[0] * scale))
    return np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_AREA), np.uint8)


def _stand_out(small: Pixels, box: Window, context: Window, scale: float) -> NDArray[np.bool_]:
    """Find thin things: pixels that differ from a wide median of the image, by Otsu's threshold."""
    left, top, width, height = _scaled(small, box, context, scale)
    wide = max(5, min(width, height) // 2 | 1)
    ground = cv2.medianBlur(small, min(wide, 255))
    lab = [cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).astype(np.float32) for pixels in (small, ground)]
    distance = np.linalg.norm(lab[0] - lab[1], axis=2).clip(0, 255).astype(np.uint8)
    inner = distance[top : top + height, left : left + width]
    level, _ = cv2.threshold(np.ascontiguousarray(inner), 0, 255, cv2.THRESH_OTSU)
    found = np.zeros(small.shape[:2], np.uint8)
    found[top : top + height, left : left + width] = inner > level
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    return np.asarray(cv2.morphologyEx(found, cv2.MORPH_CLOSE, kernel) > 0)


def _scaled(small: Pixels, box: Window, context: Window, scale: float) -> tuple[int, int, int, int]:
    """Left, top, width and height of the box in the small image."""
    left, top = round((box.left - context.left) * scale), round((box.top - context.top) * scale)
    width, height = max(2, round(box.width * scale)), max(2, round(box.height * scale))
    return left, top, min(width, small.shape[1] - left), min(height, small.shape[0] - top)


def _without_crumbs(found: NDArray[Any]) -> NDArray[np.bool_]:
    """Drop pieces smaller than a twelfth of the largest one; fill holes smaller than that."""
    for value in (1, 0):
        count, labels, stats, _ = cv2.connectedComponentsWithStats((found == value).astype(np.uint8))
        if count <= 1:
            continue
        areas = stats[1:, cv2.CC_STAT_AREA]
        least = (areas.max() if value else int((found == 1).sum())) / 12
        for piece in np.flatnonzero(areas < least):
            found[labels == piece + 1] = 1 - value
    return np.asarray(found == 1)


def _model() -> NDArray[np.float64]:
    return np.zeros((1, 65), np.float64)


def _within(box: Window, window: Window) -> tuple[slice, slice]:
    return box.moved(-window.left, -window.top).slices


class Segmenter:
    """Masks by a promptable segmenter of the SAM family, from any transformers checkpoint."""

    def __init__(self, checkpoint: str, device: str = "auto") -> None:
        """Load the checkpoint.

        Raises: HonesError when it cannot be loaded as a mask generator.
        """
        import torch
        from transformers import AutoModelForMaskGeneration, AutoProcessor

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._model = AutoModelForMaskGeneration.from_pretrained(checkpoint).to(device).eval()
            self._processor = AutoProcessor.from_pretrained(checkpoint)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise HonesError(
                f"{checkpoint} cannot be loaded as a segmenter of the SAM family: {reason}"
            ) from error
        self._device = device

    def __call__(self, image: Pixels, box: Window) -> Region:
        """Segment the thing in the box; the most likely mask, clipped to slightly more than the box."""
        import torch

        context = box.grown(max(8, max(box.width, box.height) // 2), image.shape[1], image.shape[0])
        crop = np.ascontiguousarray(image[context.slices])
        corners = [float(edge) for edge in box.moved(-context.left, -context.top)]
        inputs = self._processor(images=crop, input_boxes=[[corners]], return_tensors="pt").to(self._device)
        with torch.inference_mode():
            outputs = self._model(**inputs, multimask_output=False)
        sizes = [inputs["original_sizes"].cpu()]
        sizes += [inputs["reshaped_input_sizes"].cpu()] if "reshaped_input_sizes" in inputs else []
        masks = self._processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        found = masks[0].reshape(-1, *crop.shape[:2])[0].numpy().astype(np.float32)
        limit = np.zeros_like(found)
        limit[_within(box.grown(max(2, max(box.width, box.height) // 20), *image.shape[1::-1]), context)] = 1
        alpha = cv2.GaussianBlur(found * limit, (0, 0), 0.8)
        alpha[alpha < 0.03] = 0
        return Region(context, alpha.astype(np.float32))


def masker(name: MaskName, segmenter: str | None = None, device: str = "auto") -> Masker:
    """Return the function that makes masks by this method."""
    if name == "segmenter":
        if segmenter is None:
            raise HonesError(
                "--mask segmenter needs a checkpoint, for example --segmenter facebook/sam-vit-base"
            )
        return Segmenter(segmenter, device)
    return {"cut": cut_mask, "box": box_mask}[name]
