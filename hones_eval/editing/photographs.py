"""Read image files of any common kind as upright RGB, and write images losslessly."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hones_eval.core.images import UNREADABLE, as_displayed, refuse_truncated_images
from hones_eval.editing.problems import RecordError

Pixels = NDArray[np.uint8]
MOST_PIXELS = 120_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Photograph(NamedTuple):
    """A decoded image."""

    pixels: Pixels
    """[H, W, 3], upright."""
    plain: bool
    """Whether the file itself shows exactly these pixels in any reader: 8-bit RGB, not rotated."""


def find(folder: Path, image: str | None, image_id: str) -> Path:
    """Find a record's image: by its path if it has one, else by its id with any common suffix.

    Raises: RecordError saying where it was looked for.
    """
    tried = [folder / image, folder / Path(image).name] if image else []
    tried += [folder / f"{image_id}{suffix}" for suffix in SUFFIXES]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        shown = image or f"{image_id}.jpg (or another suffix)"
        raise RecordError(f"its image {shown} is not in {folder}")
    return found


def read(path: Path) -> Photograph:
    """Read an image: turned as its EXIF says, alpha laid on white, CMYK and greyscale made RGB.

    Raises: RecordError when it is missing, truncated, no image, or larger than 120 megapixels.
    """
    try:
        with refuse_truncated_images(), Image.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise RecordError(f"{path.name} has {opened.width} x {opened.height} pixels; {_LIMIT}")
            plain = opened.mode == "RGB" and opened.getexif().get(0x0112, 1) == 1
            return Photograph(np.asarray(as_displayed(opened)), plain)
    except FileNotFoundError:
        raise RecordError(f"its image {path} does not exist") from None
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise RecordError(f"{path.name} cannot be read as an image: {reason}") from None


_LIMIT = f"at most {MOST_PIXELS // 1_000_000} megapixels can be edited"


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode `[H, W, 3]` as an RGB PNG, or `[H, W]` as a greyscale one."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()
