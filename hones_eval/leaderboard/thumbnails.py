"""Thumbnails of the images of changed examples, as data URIs."""

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hones_eval import limits
from hones_eval.core.files import read_bounded
from hones_eval.core.images import UNREADABLE, image_hash
from hones_eval.errors import HonesError
from hones_eval.leaderboard.flips import Flip
from hones_eval.leaderboard.lmms_tasks import TaskImages

SIDE, MOST = 160, 200  # pixels of the longer side; images per page
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # decoders for files from outside


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
            return _from_media(flip)
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


def _from_media(flip: Flip) -> str:
    """A thumbnail of the media in a sample: an image in a data URI, or the path of one.

    Logs come from anyone, and pages are made to be published. So a file is shown only if it lies in the
    folder of the samples, or if it is the image whose hash the run's manifest recorded.
    """
    content, inside = _content(flip.media, flip.folder)
    if content is None:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > limits.IMAGE_PIXELS:
                    return ""
                if not inside and (not flip.image or image_hash(image) != flip.image):
                    return ""
                return data_uri(image)
    except UNREADABLE:
        return ""


def _content(media: str, folder: Path | None) -> tuple[bytes | None, bool]:
    """The bytes of an image, and whether it is part of the logs: in the sample itself or in its folder."""
    if media.startswith("data:image/"):
        if len(media) > limits.IMAGE_BYTES:
            return None, True
        try:
            return base64.b64decode(media.partition(",")[2], validate=True), True
        except (binascii.Error, ValueError):
            return None, True
    try:
        path = Path(media.removeprefix("file://"))
        if not path.is_absolute():
            return None, False
        path = path.resolve()
        inside = folder is not None and path.is_relative_to(folder.resolve())
        return read_bounded(path, limits.IMAGE_BYTES), inside
    except (HonesError, OSError, ValueError, RuntimeError):
        return None, False
