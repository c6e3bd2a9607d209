"""Image reading: a hash per image, EXIF rotation, conversion to RGB, and no silently truncated files."""

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import numpy as np
from PIL import ImageCms, ImageFile, ImageOps
from PIL.Image import DecompressionBombError, Image, alpha_composite, fromarray
from PIL.Image import new as new_image

_pillow_setting = RLock()
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError, ArithmeticError),
    *(struct.error, zlib.error, DecompressionBombError),
)
"""The errors by which Pillow's decoders refuse a damaged file; each format has its own."""


def image_hash(image: Image) -> str:
    """SHA-256 over the size and the RGB pixels of an image, independent of its file format and mode."""
    rgb = image.convert("RGB")
    total = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode())
    total.update(rgb.tobytes())
    return total.hexdigest()


@contextmanager
def refuse_truncated_images() -> Iterator[None]:
    """Raise an error for truncated image files within the block, as Pillow does by default.

    lmms-eval switches this error off for the whole process when it is imported. Pillow then fills the
    missing part of an image with grey.
    """
    with _pillow_setting:
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def as_displayed(image: Image) -> Image:
    """Convert an opened image to RGB as an image viewer displays it.

    The EXIF rotation is applied, transparency is laid on white, CMYK goes through its colour profile, and 16
    bits per channel are scaled to 8 (Pillow's own conversion clips them, which gives a white image).
    """
    image.load()
    return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: Image) -> Image:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = new_image("RGBA", rgba.size, "white")
        return alpha_composite(white, rgba).convert("RGB")
    if image.mode in ("I", "I;16", "I;16B", "F"):
        values = np.asarray(image, dtype=np.float64)
        maximum = 65535 if values.max(initial=0) > 255 else 255
        return fromarray((values.clip(0, maximum) * (255 / maximum)).round().astype(np.uint8)).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and profile:
        return _through_profile(image, profile)
    return image.convert("RGB")


def _through_profile(image: Image, profile: bytes) -> Image:
    """Convert CMYK to sRGB through its colour profile; an unusable profile is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
    return converted if converted is not None else image.convert("RGB")
