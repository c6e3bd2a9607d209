"""Small copies of the pictures that changed examples show, as text that a page can hold."""

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from hones_eval.leaderboard.pairing import Pair

SIDE, MOST = 160, 200  # pixels of the longer side; pictures on one page
FOLDER = "hones_pictures"


class Thumbnails:
    """Finds pictures where a run's logs have them, and keeps each small copy once."""

    def __init__(self) -> None:
        """Start with none."""
        self._kept: dict[str, str] = {}

    def of(self, pair: Pair, wanted: Mapping[str, int]) -> dict[str, str]:
        """Data URIs by picture, for at most `MOST` of the wanted pictures (name or hash, to `doc_id`).

        A picture that cannot be found or read is left out: the page then shows the example without it.
        """
        found: dict[str, str] = {}
        for name in wanted:
            if len(found) == MOST:
                break
            if name not in self._kept:
                self._kept[name] = _thumbnail(name, pair.steered.results_path.parent)
            if self._kept[name]:
                found[name] = self._kept[name]
        return found


def _thumbnail(name: str, folder: Path) -> str:
    content = _content(name, folder)
    if content is None:
        return ""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            small = picture.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return data_uri(small)


def data_uri(picture: Image.Image) -> str:
    """A picture as a JPEG of at most `SIDE` pixels a side, in a data URI."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _content(name: str, folder: Path) -> bytes | None:
    if name.startswith("data:image/"):
        try:
            return base64.b64decode(name.partition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            return None
    for base in (folder / FOLDER, folder.parent / FOLDER):
        for suffix in (".jpg", ".png", ".webp"):
            if name.isalnum() and (base / f"{name}{suffix}").is_file():
                return (base / f"{name}{suffix}").read_bytes()
    path = Path(name.removeprefix("file://"))
    return path.read_bytes() if len(name) < 1000 and path.is_absolute() and path.is_file() else None
