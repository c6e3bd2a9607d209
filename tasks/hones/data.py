"""Reads a folder of images with annotations in the unified COCO format, as the HONES release has them.

`HONES_EVAL_DATA` names the folder, or the one JSON file in it. The file holds `{"data": [entry, ...]}`; an
entry has `image_info.file_name` and, for each task, one of `vqa`, `captions`, `ocr`, `grounding`. Images
lie beside the file or in `images/` beside it. Boxes are `[x, y, width, height]` in pixels.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from hones_eval.errors import TaskError

VARIABLE = "HONES_EVAL_DATA"


class Entry(NamedTuple):
    """One image with its annotations, and the name that messages use."""

    name: str
    content: dict[str, Any]
    image: Path

    def need(self, *keys: str) -> Any:
        """Give `content[key][key]...`; a missing or empty value is an error that names file and entry."""
        found: Any = self.content
        for depth, key in enumerate(keys, start=1):
            if not isinstance(found, dict) or found.get(key) in (None, "", []):
                raise TaskError(f"{self.name}: it has no {'.'.join(keys[:depth])}")
            found = found[key]
        return found

    def need_box(self, *keys: str) -> list[float]:
        """Give a box [x, y, width, height] of four numbers with a positive area."""
        found = self.need(*keys)
        numbers = isinstance(found, list) and all(isinstance(match, int | float) for match in found)
        if not numbers or len(found) != 4 or min(found[2:]) <= 0:
            raise TaskError(f"{self.name}: its {'.'.join(keys)} is not a box [x, y, width, height]: {found}")
        return [float(match) for match in found]


def entries(low: float = 0.0, high: float = 1.0) -> list[Entry]:
    """Give the entries whose image falls into a share of all images, [low, high) of [0, 1).

    An image's place is a hash of its file's name: shares that do not overlap never share an image, and a
    image stays in its share when others come and go.

    Raises: TaskError when the data is missing or malformed, an image is missing, or no entry is left.
    """
    path = annotation_file()
    everything = [_entry(path, number, content) for number, content in enumerate(_content(path))]
    kept = [entry for entry in everything if low <= place(entry.image.name) < high]
    if not kept:
        raise TaskError(
            f"{path} has {len(everything)} entries and none of them falls into this split "
            f"({low:.0%} to {high:.0%} of the images); add images or use the task without a suffix"
        )
    return kept


def annotation_file() -> Path:
    """Find the annotation file that `HONES_EVAL_DATA` names."""
    path = named_by(VARIABLE, "a folder of images with one JSON file of annotations, or the file")
    if path.is_file():
        return path
    found = [item for item in sorted(path.glob("*.json")) if _is_unified(item)]
    if len(found) != 1:
        names = ", ".join(match.name for match in found) or "none"
        raise TaskError(
            f'{VARIABLE}={path}: it should hold one JSON file {{"data": [...]}} of annotations, and has '
            f"{names}; name the file itself"
        )
    return found[0]


def named_by(variable: str, what: str) -> Path:
    """The folder or file that an environment variable names. Raises: TaskError when there is none."""
    given = os.environ.get(variable)
    if not given:
        raise TaskError(f"set {variable} to {what}")
    path = Path(given).expanduser()
    if not path.exists():
        raise TaskError(f"{variable}={given}: there is no such file or folder")
    return path


def place(file_name: str) -> float:
    """Where an image falls in [0, 1), from the hash of its file's name."""
    return int.from_bytes(hashlib.sha256(file_name.encode()).digest()[:6]) / 2**48


def _is_unified(path: Path) -> bool:
    content = read_json(path)
    data = content.get("data") if isinstance(content, dict) else None
    return isinstance(data, list) and bool(data) and isinstance(data[0], dict) and "image_info" in data[0]


def _content(path: Path) -> list[Any]:
    content = read_json(path)
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list) or not data:
        raise TaskError(f'{path} is not of the form {{"data": [entry, ...]}} with at least one entry')
    return data


def read_json(path: Path) -> Any:
    """A file's JSON. Raises: TaskError when it is not."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} is not valid JSON: {error}") from None


def _entry(path: Path, number: int, content: Any) -> Entry:
    name = f"{path}, entry {number}"
    if not isinstance(content, dict):
        raise TaskError(f"{name}: it is not an object")
    file_name = Path(str(Entry(name, content, path).need("image_info", "file_name"))).name
    for folder in (path.parent, path.parent / "images"):
        if (folder / file_name).is_file():
            return Entry(f"{name} ({file_name})", content, folder / file_name)
    raise TaskError(
        f"{name}: its image {file_name} is neither in {path.parent} nor in {path.parent / 'images'}"
    )
