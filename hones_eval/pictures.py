"""One hash a picture, so that splits can be kept apart and runs compared by what they showed."""

import hashlib

from PIL.Image import Image


def image_hash(picture: Image) -> str:
    """SHA-256 over the size and the RGB pixels of a picture, whatever file or mode it came in."""
    seen = picture.convert("RGB")
    total = hashlib.sha256(f"{seen.width}x{seen.height}:".encode())
    total.update(seen.tobytes())
    return total.hexdigest()
