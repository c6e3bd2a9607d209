"""Pictures as they are seen: one hash each, upright, and files that are cut short refused."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import numpy as np
from PIL import ImageCms, ImageFile, ImageOps
from PIL.Image import Image, alpha_composite, fromarray
from PIL.Image import new as new_image

_reading = RLock()


def image_hash(picture: Image) -> str:
    """SHA-256 over the size and the RGB pixels of a picture, whatever file or mode it came in."""
    seen = picture.convert("RGB")
    total = hashlib.sha256(f"{seen.width}x{seen.height}:".encode())
    total.update(seen.tobytes())
    return total.hexdigest()


@contextmanager
def whole_pictures() -> Iterator[None]:
    """Reading a picture that is cut short is an error within the block, as Pillow has it by default.

    lmms-eval switches that off for the whole process when it is imported: the rest is then filled with grey.
    """
    with _reading:
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def as_seen(picture: Image) -> Image:
    """An opened picture in RGB as a viewer shows it.

    It is turned as its EXIF says; transparency is laid on white; 16 bits are brought to 8, where Pillow's
    own conversion would leave white; CMYK goes through its profile.
    """
    picture.load()
    return _rgb(ImageOps.exif_transpose(picture))


def _rgb(picture: Image) -> Image:
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        white = new_image("RGBA", seen.size, "white")
        return alpha_composite(white, seen).convert("RGB")
    if picture.mode in ("I", "I;16", "I;16B", "F"):
        numbers = np.asarray(picture, dtype=np.float64)
        top = 65535 if numbers.max(initial=0) > 255 else 255
        return fromarray((numbers.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    profile = picture.info.get("icc_profile")
    if picture.mode == "CMYK" and profile:
        return _through_profile(picture, profile)
    return picture.convert("RGB")


def _through_profile(picture: Image, profile: bytes) -> Image:
    """CMYK means nothing without its profile; one that cannot be used is left aside."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        made = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return picture.convert("RGB")
    return made if made is not None else picture.convert("RGB")
