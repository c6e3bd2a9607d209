"""Lines of samples files as rows of a table; a line seen before is not parsed again."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hones_eval import limits
from hones_eval.errors import HonesError

CHUNK = 1 << 22  # bytes of lines in memory at once, since a line may hold whole images
LONG_LINE = 8192  # bytes; longer lines are not cached
MOST_LINES = 1 << 16  # before the cache is cleared; a steered run repeats most lines of its baseline
Images = tuple[str, ...] | None

_decode = json.JSONDecoder().decode


class Lines(NamedTuple):
    """The readable lines of one samples file.

    `rows` `[n]` has the fields doc_id, prompt, answer, empty and values `[m]`, one value per metric;
    `offsets` `[n]` are the starts of the lines; `broken` lists the numbers of lines that are not samples.
    """

    rows: NDArray[Any]
    items: frozenset[str]
    images: tuple[Images, ...]
    offsets: NDArray[np.int64]
    broken: list[int]


def read_lines(path: Path, metrics: tuple[str, ...]) -> Lines:
    """Read the lines of a samples file."""
    return _table(metrics).read(path)


@lru_cache(maxsize=64)
def _table(metrics: tuple[str, ...]) -> "_Table":
    return _Table(metrics)


class _Table:
    """The rows of all lines read so far, and the position of each cached line's row."""

    def __init__(self, metrics: tuple[str, ...]) -> None:
        self._metrics = metrics
        plain = [("doc_id", "i8"), ("prompt", "i8"), ("answer", "i8"), ("empty", "?")]
        self._kind = np.dtype([*plain, ("values", "f8", (len(metrics),))])
        self._clear()

    def _clear(self) -> None:
        self._places: dict[bytes, int] = {}
        self._rows = np.empty(0, self._kind)
        self._items: list[frozenset[str]] = []
        self._images: list[Images] = []

    def read(self, path: Path) -> Lines:
        """Read a file; lines that are new to the table are added to it."""
        if len(self._rows) > MOST_LINES:
            self._clear()
        kept: list[int] = []
        offsets: list[int] = []
        broken: list[int] = []
        number, offset = 0, 0
        with path.open("rb") as file:
            while lines := _chunk(file):
                for line, place in zip(lines, self._places_of(lines), strict=True):
                    number += 1
                    if place is not None:
                        kept.append(place)
                        offsets.append(offset)
                    elif line.strip():
                        broken.append(number)
                    offset += len(line)
        return Lines(
            rows=self._rows[kept],
            items=frozenset().union(*{self._items[place] for place in kept}),
            images=tuple([self._images[place] for place in kept]),
            offsets=np.array(offsets, dtype=np.int64),
            broken=broken,
        )

    def _places_of(self, lines: Sequence[bytes]) -> list[int | None]:
        """Positions of the lines' rows, after adding new ones; None for lines that are not samples."""
        places = list(map(self._places.get, lines))
        rows: list[tuple[Any, ...]] = []
        for k in [k for k, place in enumerate(places) if place is None]:
            try:
                row, items, images = _row(lines[k], self._metrics)
            except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
                continue
            places[k] = len(self._rows) + len(rows)
            rows.append(row)
            self._items.append(items)
            self._images.append(images)
            if len(lines[k]) < LONG_LINE and len(self._places) < MOST_LINES:
                self._places[lines[k]] = len(self._rows) + len(rows) - 1
        if rows:
            self._rows = np.concatenate([self._rows, np.array(rows, dtype=self._kind)])
        return places


def _chunk(file: BinaryIO) -> list[bytes]:
    """The next lines, about `CHUNK` bytes. Raises: HonesError for a line beyond the limit."""
    lines, size = [], 0
    while size < CHUNK and (line := file.readline(limits.SAMPLE_LINE_BYTES + 1)):
        if len(line) > limits.SAMPLE_LINE_BYTES:
            raise HonesError(f"a line is longer than {limits.SAMPLE_LINE_BYTES:,} bytes")
        lines.append(line)
        size += len(line)
    return lines


def _doc_id(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limits.INTEGER:
        raise ValueError("doc_id is not a document number")
    return value


def _row(line: bytes, metrics: tuple[str, ...]) -> tuple[tuple[Any, ...], frozenset[str], Images]:
    sample = _decode(line.decode("utf-8-sig"))
    doc_id, answer, media = _doc_id(sample["doc_id"]), sample.get("filtered_resps"), sample.get("input_media")
    values = [sample.get(name) for name in metrics]
    row = (
        doc_id,
        hash((str(sample.get("input")), str(sample.get("target")))),
        hash(answer if isinstance(answer, str) else json.dumps(answer)),
        answer in ("", [""], []),
        tuple([_number(value) for value in values]),
    )
    items = frozenset(n for n, value in zip(metrics, values, strict=True) if isinstance(value, dict | list))
    return row, items, _media_key(media) if media else None


def _media_key(media: Sequence[object]) -> tuple[str, ...]:
    """Short keys that are equal for equal media, which may be whole images as data URIs."""
    return tuple(
        hashlib.blake2b(str(entry).encode("utf-8", "replace"), digest_size=16).hexdigest() for entry in media
    )


def _number(value: object) -> float:
    """The score in a metric's entry: a number, a mapping's `score`, or a printed numpy number."""
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, int | float):
        return float(value) if abs(value) < 1e300 else float("nan")
    return _printed_number(value) if isinstance(value, str) else float("nan")


def _printed_number(text: str) -> float:
    """A number from text: lmms-eval writes numpy's float32 and bool as text."""
    if text in ("True", "False"):
        return float(text == "True")
    try:
        return float(text) if len(text) < 40 else float("nan")
    except ValueError:
        return float("nan")
