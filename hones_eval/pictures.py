"""Pictures as they are: one hash each, and files that are cut short refused."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from PIL import ImageFile
from PIL.Image import Image

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
