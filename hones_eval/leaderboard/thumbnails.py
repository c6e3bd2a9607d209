"""Thumbnails of the images of changed examples, as data URIs."""

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from hones_eval.core.images import image_hash
from hones_eval.leaderboard.flips import Flip
from hones_eval.leaderboard.lmms_tasks import TaskImages

SIDE, MOST = 160, 200  # pixels of the longer side; images per page


class Thumbnails:
    """Finds images of examples in the samples or the task's data set, and keeps each thumbnail once."""

    def __init__(self, tasks: TaskImages | None) -> None:
        """`tasks` gives images that are not in the samples; None disables that."""
        self._tasks = tasks
        self._kept: dict[str, str] = {}

    def of(self, task: str, flips: Sequence[Flip]) -> dict[int, str]:
        """Data URIs by `doc_id`, for the first `MOST` examples that have an image.

        An image that cannot be found or read, or is not the one that the run's manifest tells, is left out:
        the page then shows the example without it.
        """
        found: dict[int, str] = {}
        for flip in flips[: 2 * MOST]:
            if len(found) == MOST:
                break
            key = flip.image or f"{task} {flip.doc_id}"
            if key not in self._kept:
                self._kept[key] = self._thumbnail(task, flip)
            if self._kept[key]:
                found[flip.doc_id] = self._kept[key]
        return found

    def _thumbnail(self, task: str, flip: Flip) -> str:
        if flip.media:
            return _from_media(flip.media)
        image = None if self._tasks is None else self._tasks.first(task, flip.doc_id)
        if image is None or (flip.image and image_hash(image) != flip.image):
            return ""
        return data_uri(image)


def data_uri(image: Image.Image) -> str:
    """An image as a JPEG of at most `SIDE` pixels a side, in a data URI."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _from_media(media: str) -> str:
    """A small copy of what lmms-eval notes of a sample's image: the image as a data URI, or its path."""
    content = _content(media)
    if content is None:
        return ""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return data_uri(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""


def _content(media: str) -> bytes | None:
    if media.startswith("data:image/"):
        try:
            return base64.b64decode(media.partition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            return None
    path = Path(media.removeprefix("file://"))
    try:
        return path.read_bytes() if path.is_absolute() and path.is_file() else None
    except OSError:
        return None
