"""One samples file of lmms-eval as arrays: hashes and scores stay in memory, texts stay on disk."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
LONG_LINE = 8192  # bytes; longer lines are not remembered


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


class _Line(NamedTuple):
    """What is kept of one line of a samples file."""

    doc_id: int
    prompt: int
    answer: int
    empty: bool
    values: tuple[float, ...]
    items: frozenset[str]
    pictures: tuple[str, ...] | None


def read_samples(path: Path, metrics: Sequence[str], filters: int = 1) -> tuple[list[Samples], list[str]]:
    """Read a samples file.

    Args:
        path: the `*_samples_<task>.jsonl` file.
        metrics: names of the metrics to take a value of from each line.
        filters: how many filters the task has; lmms-eval appends one block of lines a filter, unnamed.

    Returns: one `Samples` a filter, in file order, and what is wrong with the file, in words.
    """
    lines, offsets, problems = _read_lines(path, tuple(metrics))
    ids = np.array([line.doc_id for line in lines], dtype=np.int64)
    turn = _occurrence(ids)
    blocks = int(turn.max()) + 1 if len(turn) else 0
    if blocks > filters:
        problems.append(
            f"{path.name} holds {int((turn >= filters).sum())} examples more than once: "
            "two runs were written to one file; run them again, apart"
        )
    found = []
    for k in range(min(blocks, filters)):
        places = np.flatnonzero(turn == k)
        places = places[np.argsort(ids[places], kind="stable")]
        chosen = [lines[place] for place in places.tolist()]
        found.append(_block(path, chosen, np.array(offsets, dtype=np.int64)[places], metrics))
    return found, problems


def _read_lines(path: Path, metrics: tuple[str, ...]) -> tuple[list[_Line], list[int], list[str]]:
    """The lines of a file, where each begins, and what is wrong."""
    lines: list[_Line] = []
    offsets: list[int] = []
    broken: list[int] = []
    offset = 0
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            try:
                lines.append((_line if len(content) < LONG_LINE else _line.__wrapped__)(content, metrics))
                offsets.append(offset)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                if content.strip():
                    broken.append(number)
            offset += len(content)
    problems = []
    if broken:
        problems.append(
            f"{path.name} has {len(broken)} lines that are not samples (first: line {broken[0]}): "
            "the file is truncated or damaged"
        )
    return lines, offsets, problems


_decode = json.JSONDecoder().decode


@lru_cache(maxsize=1 << 16)  # a steered run repeats most lines of its baseline to the letter
def _line(content: bytes, metrics: tuple[str, ...]) -> _Line:
    row = _decode(content.decode())
    answer = row.get("filtered_resps")
    media = row.get("input_media")
    values = [row.get(name) for name in metrics]
    return _Line(
        doc_id=int(row["doc_id"]),
        prompt=hash((str(row.get("input")), str(row.get("target")))),
        answer=hash(answer if isinstance(answer, str) else json.dumps(answer)),
        empty=answer in ("", [""], []),
        values=tuple([_number(value) for value in values]),
        items=frozenset(
            n for n, value in zip(metrics, values, strict=True) if isinstance(value, dict | list)
        ),
        pictures=_media_key(media) if media else None,
    )


def _media_key(media: Sequence[object]) -> tuple[str, ...]:
    """Short names that are equal for equal media, which may be whole pictures as data URIs."""
    return tuple(
        hashlib.blake2b(str(one).encode("utf-8", "replace"), digest_size=16).hexdigest() for one in media
    )


def _number(value: object) -> float:
    """The score in a metric's entry: a number, a mapping's `score`, or numpy's number that was printed."""
    if isinstance(value, dict):
        value = value.get("score")
    if isinstance(value, int | float):
        return float(value)
    return _printed_number(value) if isinstance(value, str) else float("nan")


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


def _block(path: Path, lines: Sequence[_Line], offsets: Integers, metrics: Sequence[str]) -> Samples:
    ids, prompts, answers, empty, values, items, pictures = zip(*lines, strict=True)
    table = np.array(values, dtype=np.float64).reshape(len(lines), len(metrics))
    known = [one for one in pictures if one is not None]
    return Samples(
        path=path,
        doc_ids=np.array(ids, dtype=np.int64),
        offsets=offsets,
        prompts=np.array(prompts, dtype=np.int64),
        answers=np.array(answers, dtype=np.int64),
        empty_answers=sum(empty),
        values={name: table[:, k].copy() for k, name in enumerate(metrics)},
        items=frozenset().union(*set(items)),
        pictures=tuple(known) if len(known) == len(lines) else None,
    )


def read_rows(samples: Samples, places: Sequence[int] | Integers) -> Iterator[dict[str, Any]]:
    """Read whole lines again, for the examples at `places` of `samples`, in the order asked."""
    with samples.path.open("rb") as file:
        for place in places:
            file.seek(int(samples.offsets[place]))
            yield json.loads(file.readline())
