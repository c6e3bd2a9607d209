"""Checks of an edit: it changed something inside its mask, and nothing outside."""

import io
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hones_eval.core.images import refuse_truncated_images
from hones_eval.editing.photographs import Pixels
from hones_eval.editing.recolor import rgb_to_lab

Footprint = NDArray[np.bool_]
BAND = 512
WINDOW = 11
SIGMA = 1.5


class Bounds(NamedTuple):
    """The limits that an accepted edit respects."""

    psnr: float = 30.0
    """Smallest PSNR outside the mask, in decibels."""
    ssim: float = 0.95
    """Smallest SSIM outside the mask."""
    change: float = 3.0
    """Smallest mean CIE76 difference inside the mask; about 2 is just visible."""


class Verdict(NamedTuple):
    """The measurements of an edit, and the reasons to reject it."""

    psnr_outside: float | None
    """In decibels; None if no pixel outside changed, or there is none."""
    ssim_outside: float | None
    """None if no window of pixels lies wholly outside the mask."""
    change_inside: float
    mask_share: float
    """Share of the image's pixels that the mask touches."""
    reasons: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        """Whether there is no reason to reject the edit."""
        return not self.reasons


def judge(clean: Pixels, edited: Pixels, mask: Footprint, bounds: Bounds) -> Verdict:
    """Compare an edited image with the clean one, inside and outside the mask.

    Args:
        clean: [H, W, 3].
        edited: [H, W, 3]; another size is a reason to reject.
        mask: [H, W], where the edit was allowed to change something.
        bounds: the limits.
    """
    share = float(mask.mean())
    if edited.shape != clean.shape:
        seen, wanted = (f"{pixels.shape[1]} x {pixels.shape[0]}" for pixels in (edited, clean))
        return Verdict(None, None, 0.0, share, (f"the edited image is {seen}, the clean image {wanted}",))
    psnr, ssim = psnr_outside(clean, edited, mask), ssim_outside(clean, edited, mask)
    change = change_inside(clean, edited, mask)
    reasons = []
    if psnr is not None and psnr < bounds.psnr:
        reasons.append(f"outside the mask the PSNR is {psnr:.1f} dB, below {bounds.psnr:g}")
    if ssim is not None and ssim < bounds.ssim:
        reasons.append(f"outside the mask the SSIM is {ssim:.3f}, below {bounds.ssim:g}")
    if change < bounds.change:
        reasons.append(f"inside the mask the mean change is {change:.2f}, below {bounds.change:g}")
    return Verdict(psnr, ssim, change, share, tuple(reasons))


def sound(content: bytes, width: int, height: int) -> str | None:
    """Decode an encoded image; returns the problem, or None."""
    try:
        with refuse_truncated_images(), Image.open(io.BytesIO(content)) as opened:
            opened.load()
            mode, size = opened.mode, opened.size
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        return f"the edited image cannot be decoded: {' '.join(str(error).split())}"
    if mode != "RGB" or size != (width, height):
        return f"the edited image is {mode}, {size[0]} x {size[1]}, but should be RGB, {width} x {height}"
    return None


def psnr_outside(clean: Pixels, edited: Pixels, mask: Footprint) -> float | None:
    """Peak signal-to-noise ratio in decibels over the pixels outside; None if they are all the same."""
    total, count = 0.0, 0
    for top in range(0, len(clean), BAND):
        band = slice(top, top + BAND)
        outside = ~mask[band]
        count += 3 * int(outside.sum())
        if not np.array_equal(clean[band], edited[band]):
            difference = clean[band][outside].astype(np.int64) - edited[band][outside]
            total += float((difference**2).sum())
    return 10 * float(np.log10(255.0**2 * count / total)) if total else None


def ssim_outside(clean: Pixels, edited: Pixels, mask: Footprint) -> float | None:
    """Structural similarity (Wang et al. 2004, Gaussian windows of 11) over windows wholly outside."""
    kernel = np.ones((WINDOW, WINDOW), np.uint8)
    far = cv2.dilate(mask.astype(np.uint8), kernel) == 0
    total, count, reach = 0.0, 0, WINDOW
    for top in range(0, len(clean), BAND):
        low, high = max(0, top - reach), min(len(clean), top + BAND + reach)
        chosen = far[top : top + BAND]
        if not chosen.any():
            continue
        count += int(chosen.sum()) * 3
        if np.array_equal(clean[low:high], edited[low:high]):
            total += int(chosen.sum()) * 3
            continue
        band = _ssim_map(clean[low:high], edited[low:high])[top - low :][: len(chosen)]
        total += float(band[chosen].sum(dtype=np.float64))
    return total / count if count else None


def _ssim_map(clean: Pixels, edited: Pixels) -> NDArray[Any]:
    """SSIM of every pixel's window and channel, `[h, w, 3]`."""
    x, y = clean.astype(np.float64), edited.astype(np.float64)

    def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(
            cv2.GaussianBlur(values, (WINDOW, WINDOW), SIGMA, borderType=cv2.BORDER_REFLECT_101)
        )

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )  # fmt: skip


def change_inside(clean: Pixels, edited: Pixels, mask: Footprint) -> float:
    """Mean CIE76 colour difference over the pixels of the mask; 0 if it is empty."""
    total, count = 0.0, 0
    for top in range(0, len(clean), BAND):
        inside = mask[top : top + BAND]
        if inside.any():
            before, after = (rgb_to_lab(pixels[top : top + BAND]) for pixels in (clean, edited))
            total += float(np.linalg.norm(before - after, axis=-1)[inside].sum(dtype=np.float64))
            count += int(inside.sum())
    return total / count if count else 0.0
