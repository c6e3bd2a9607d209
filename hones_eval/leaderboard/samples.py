"""One samples file of lmms-eval as arrays: hashes and scores stay in memory, texts stay on disk."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
RESERVED = frozenset({"doc_id", "target", "input", "resps", "filtered_resps", "token_counts", "doc_hash"})


@dataclass(frozen=True, eq=False)
class Samples:
    """The examples of one task (and one filter) of one run, ordered by `doc_id`.

    `prompts` and `answers` are hashes, equal within one process only for equal texts. `values` holds a score
    per example for every metric, NaN where the samples hold no number; `items` names the metrics whose
    entries are not plain numbers, and may be the input of a corpus metric. `pictures` tells which examples
    share a picture; `shown` hashes prompt and pictures as the model got them, where a run manifest has them.
    """

    path: Path
    doc_ids: Integers
    offsets: Integers
    prompts: Integers
    answers: Integers
    empty_answers: int
    values: Mapping[str, Floats]
    items: frozenset[str] = frozenset()
    pictures: tuple[tuple[str, ...], ...] | None = None
    shown: Integers | None = None

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.doc_ids)


@dataclass
class _Columns:
    doc_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    empty: list[bool] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    corpus: set[str] = field(default_factory=set)
    pictures: dict[int, tuple[str, ...]] = field(default_factory=dict)


def read_samples(path: Path, metrics: Sequence[str], filters: int = 1) -> tuple[list[Samples], list[str]]:
    """Read a samples file.

    Args:
        path: the `*_samples_<task>.jsonl` file.
        metrics: names of the metrics to take a value of from each line.
        filters: how many filters the task has; lmms-eval appends one block of lines a filter, unnamed.

    Returns: one `Samples` a filter, in file order, and what is wrong with the file, in words.
    """
    columns, problems = _read_columns(path, metrics)
    order = np.asarray(columns.doc_ids, dtype=np.int64)
    turn = _occurrence(order)
    blocks = int(turn.max()) + 1 if len(turn) else 0
    if blocks > filters:
        problems.append(
            f"{path.name} holds {int((turn >= filters).sum())} examples more than once: "
            "two runs were written to one file; run them again, apart"
        )
    return [_block(path, columns, order, turn == k, metrics) for k in range(min(blocks, filters))], problems


def _read_columns(path: Path, metrics: Sequence[str]) -> tuple[_Columns, list[str]]:
    columns = _Columns()
    problems: list[str] = []
    broken: list[int] = []
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not _take(line, offset, metrics, columns):
                broken.append(number)
            offset += len(line)
    if broken:
        problems.append(
            f"{path.name} has {len(broken)} lines that are not samples (first: line {broken[0]}): "
            "the file is truncated or damaged"
        )
    return columns, problems


def _take(line: bytes, offset: int, metrics: Sequence[str], columns: _Columns) -> bool:
    try:
        row = json.loads(line)
        doc_id = int(row["doc_id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    answer = row.get("filtered_resps")
    columns.doc_ids.append(doc_id)
    columns.offsets.append(offset)
    columns.prompts.append(hash((str(row.get("input")), str(row.get("target")))))
    columns.answers.append(hash(answer) if isinstance(answer, str) else hash(json.dumps(answer)))
    columns.empty.append(answer in ("", [""], []))
    columns.values.append([_number(row.get(name), name, columns.corpus) for name in metrics])
    if media := row.get("input_media"):
        columns.pictures[len(columns.doc_ids) - 1] = _media_key(media)
    return True


def _media_key(media: Sequence[object]) -> tuple[str, ...]:
    """Short names that are equal for equal media, which may be whole pictures as data URIs."""
    return tuple(
        hashlib.blake2b(str(one).encode("utf-8", "replace"), digest_size=16).hexdigest() for one in media
    )


def _number(value: object, name: str, corpus: set[str]) -> float:
    """The score in a metric's entry: a number, a mapping's `score`, or numpy's number that was printed."""
    if isinstance(value, Mapping):
        corpus.add(name)
        value = value.get("score")
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        return _printed_number(value)
    if isinstance(value, list):
        corpus.add(name)
    return float("nan")


def _printed_number(text: str) -> float:
    """lmms-eval writes numpy's float32 and bool as their text; nothing else is a number."""
    if text in ("True", "False"):
        return float(text == "True")
    try:
        return float(text) if len(text) < 40 else float("nan")
    except ValueError:
        return float("nan")


def _occurrence(doc_ids: Integers) -> Integers:
    """For each place, how many times its value stood before it."""
    order = np.argsort(doc_ids, kind="stable")
    ordered = doc_ids[order]
    starts = (
        np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
    )
    lengths = np.diff(np.r_[starts, len(ordered)])
    turn = np.empty(len(doc_ids), dtype=np.int64)
    turn[order] = np.arange(len(doc_ids)) - np.repeat(starts, lengths)
    return turn


def _block(
    path: Path, columns: _Columns, ids: Integers, kept: NDArray[np.bool_], names: Sequence[str]
) -> Samples:
    places = np.flatnonzero(kept)
    places = places[np.argsort(ids[places], kind="stable")]
    table = np.asarray(columns.values, dtype=np.float64).reshape(len(ids), len(names))
    pictures = None
    if len(columns.pictures) == len(ids):
        pictures = tuple(columns.pictures[int(place)] for place in places)
    return Samples(
        path=path,
        doc_ids=ids[places],
        offsets=np.asarray(columns.offsets, dtype=np.int64)[places],
        prompts=np.asarray(columns.prompts, dtype=np.int64)[places],
        answers=np.asarray(columns.answers, dtype=np.int64)[places],
        empty_answers=int(np.asarray(columns.empty, dtype=bool)[places].sum()),
        values={name: table[places, k] for k, name in enumerate(names)},
        items=frozenset(columns.corpus),
        pictures=pictures,
    )


def read_rows(samples: Samples, places: Sequence[int] | Integers) -> Iterator[dict[str, Any]]:
    """Read whole lines again, for the examples at `places` of `samples`, in the order asked."""
    with samples.path.open("rb") as file:
        for place in places:
            file.seek(int(samples.offsets[place]))
            yield json.loads(file.readline())
