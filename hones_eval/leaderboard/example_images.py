"""Images of examples for the pages: a thumbnail in the page, and a larger one in a file that it links to."""

import base64
import binascii
import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hones_eval import limits
from hones_eval.core.files import read_bounded
from hones_eval.core.images import UNREADABLE, as_displayed, image_hash
from hones_eval.errors import HonesError
from hones_eval.leaderboard.examples import Box, Example
from hones_eval.leaderboard.lmms_tasks import TaskImages

SIDE, FULL_SIDE = 160, 1600  # pixels of the longer side, of a thumbnail and of an image in a file
MOST = 200  # images per page
SHOWN = (128, 160)  # width and height that a thumbnail has on the page, at most
FOLDER = "images"  # of the files, beside the pages
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # decoders for files from outside


@dataclass(frozen=True)
class EncodedImage:
    """An image of an example, encoded anew, so that nothing but its pixels gets into a page.

    `uri`: the thumbnail as a data URI.
    `size`: width and height of the image itself, in pixels.
    `file`: of the image at up to `FULL_SIDE` pixels, relative to the page; empty if there is none.
    """

    uri: str
    size: tuple[int, int]
    file: str = ""

    def to_json(self) -> dict[str, Any]:
        """What the page needs: the thumbnail, its size on the page, and the file."""
        scale = min(SHOWN[0] / self.size[0], SHOWN[1] / self.size[1])
        width, height = (max(1, round(side * scale)) for side in self.size)
        return {"uri": self.uri, "width": width, "height": height, "file": self.file}


class ExampleImages:
    """Finds images of examples in the samples or the task's data set, and encodes each once."""

    def __init__(
        self, tasks: TaskImages | None, save: Callable[[str, bytes], None] | None = None, most: int = MOST
    ) -> None:
        """Look into samples and, with `tasks`, into data sets.

        Args:
            tasks: gives images that are not in the samples; None disables that.
            save: writes a file beside the pages, given its name and content; None for thumbnails alone.
            most: how many images a page may have.
        """
        self._tasks, self._save, self._most = tasks, save, most
        self._kept: dict[str, EncodedImage | None] = {}

    def of(self, task: str, examples: Sequence[Example]) -> dict[int, EncodedImage]:
        """Images by `doc_id`, for the first examples that have one.

        An image that cannot be found or read, or is not the one that the run's manifest tells, is left out:
        the page then shows the example without it.
        """
        found: dict[int, EncodedImage] = {}
        for example in examples[: 2 * self._most]:
            if len(found) == self._most:
                break
            key = example.image or f"{task} {example.doc_id}"
            if key not in self._kept:
                image = self._find(task, example)
                self._kept[key] = None if image is None else self._encoded(image)
            encoded = self._kept[key]
            if encoded is not None:
                found[example.doc_id] = encoded
        return found

    def _find(self, task: str, example: Example) -> Image.Image | None:
        if example.media:
            return _from_media(example)
        image = None if self._tasks is None else self._tasks.first(task, example.doc_id)
        if image is None or (example.image and image_hash(image) != example.image):
            return None
        return image.convert("RGB")

    def _encoded(self, image: Image.Image) -> EncodedImage:
        """Encode the pixels alone: metadata, such as the place of a photograph, does not get into a page."""
        small = base64.b64encode(_jpeg(image, SIDE, 80)).decode()
        name = ""
        if self._save is not None and max(image.size) > SIDE:
            larger = _jpeg(image, FULL_SIDE, 88)
            name = f"{FOLDER}/{hashlib.sha256(larger).hexdigest()[:20]}.jpg"
            self._save(name, larger)
        return EncodedImage(f"data:image/jpeg;base64,{small}", image.size, name)


def _jpeg(image: Image.Image, side: int, quality: int) -> bytes:
    small, out = image.copy(), io.BytesIO()
    small.info = {}
    small.thumbnail((side, side))
    small.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()


def boxes_on(example: Example, image: EncodedImage) -> list[dict[str, Any]]:
    """The boxes of an example in shares of the image's sides.

    Boxes are in pixels, or in shares if no number of the gold box exceeds 1. Those outside are left out.
    """
    if "gold" not in example.boxes:
        return []
    width, height = (1, 1) if max(example.boxes["gold"]) <= 1 else image.size
    shares: Mapping[str, Box] = {
        whose: (left / width, top / height, right / width, bottom / height)
        for whose, (left, top, right, bottom) in example.boxes.items()
    }
    return [
        {"whose": whose, "x": box[0], "y": box[1], "width": box[2] - box[0], "height": box[3] - box[1]}
        for whose, box in shares.items()
        if min(box) >= -0.01 and max(box) <= 1.01
    ]


def _from_media(example: Example) -> Image.Image | None:
    """The image of the media in a sample: an image in a data URI, or the path of one.

    Logs come from anyone, and pages are made to be published. So a file is shown only if it lies in the
    folder of the samples, or if it is the image whose hash the run's manifest recorded.
    """
    content, inside = _content(example.media, example.folder)
    if content is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > limits.IMAGE_PIXELS:
                    return None
                if not inside and (not example.image or image_hash(image) != example.image):
                    return None
                return as_displayed(image)
    except UNREADABLE:
        return None


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
