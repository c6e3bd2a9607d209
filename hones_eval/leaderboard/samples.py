"""A samples file of lmms-eval as arrays of hashes and scores; texts stay on disk."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hones_eval.leaderboard.sample_lines import Lines, read_lines

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Samples:
    """The examples of one task (and one filter) of one run, ordered by `doc_id`.

    `prompts` and `answers` are hashes, equal within one process only for equal texts. `values` holds a score
    per example for every metric, NaN where the samples hold no number; `items` names the metrics whose
    entries are not plain numbers, and may be the input of a corpus metric. `images` tells which examples
    share an image; `shown` hashes prompt and images as the model got them, if a run manifest records them.
    """

    path: Path
    doc_ids: Integers
    offsets: Integers
    prompts: Integers
    answers: Integers
    empty_answers: int
    values: Mapping[str, Floats]
    items: frozenset[str] = frozenset()
    images: tuple[tuple[str, ...], ...] | None = None
    shown: Integers | None = None

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.doc_ids)


def read_samples(path: Path, metrics: Sequence[str], filters: int = 1) -> tuple[list[Samples], list[str]]:
    """Read a samples file.

    Args:
        path: the `*_samples_<task>.jsonl` file.
        metrics: names of the metrics to take a value of from each line.
        filters: how many filters the task has; lmms-eval appends one unnamed block of lines per filter.

    Returns: one `Samples` per filter, in file order, and sentences that say what is wrong with the file.
    """
    lines = read_lines(path, tuple(metrics))
    problems = []
    if lines.broken:
        problems.append(
            f"{path.name} has {len(lines.broken)} lines that are not samples "
            f"(first: line {lines.broken[0]}): the file is truncated or damaged"
        )
    ids = lines.rows["doc_id"]
    turn = _occurrence(ids)
    blocks = int(turn.max()) + 1 if len(turn) else 0
    if blocks > filters:
        problems.append(
            f"{path.name} holds {int((turn >= filters).sum())} examples more than once: "
            "two runs were written to one file; run them again into separate folders"
        )
    found = []
    for k in range(min(blocks, filters)):
        places = np.flatnonzero(turn == k)
        places = places[np.argsort(ids[places], kind="stable")]
        found.append(_block(path, lines, places, metrics))
    return found, problems


def _occurrence(doc_ids: Integers) -> Integers:
    """For each position, how many times its value occurs before it."""
    order = np.argsort(doc_ids, kind="stable")
    ordered = doc_ids[order]
    starts = (
        np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
    )
    lengths = np.diff(np.r_[starts, len(ordered)])
    turn = np.empty(len(doc_ids), dtype=np.int64)
    turn[order] = np.arange(len(doc_ids)) - np.repeat(starts, lengths)
    return turn


def _block(path: Path, lines: Lines, places: Integers, metrics: Sequence[str]) -> Samples:
    rows = lines.rows[places]
    images = [lines.images[place] for place in places.tolist()]
    known = [image for image in images if image is not None]
    return Samples(
        path=path,
        doc_ids=rows["doc_id"].copy(),
        offsets=lines.offsets[places],
        prompts=rows["prompt"].copy(),
        answers=rows["answer"].copy(),
        empty_answers=int(rows["empty"].sum()),
        values={name: rows["values"][:, k].copy() for k, name in enumerate(metrics)},
        items=lines.items,
        images=tuple(known) if len(known) == len(places) else None,
    )


def read_rows(samples: Samples, places: Sequence[int] | Integers) -> Iterator[dict[str, Any]]:
    """Read the full lines of the examples at `places` of `samples` again, in that order."""
    with samples.path.open("rb") as file:
        for place in places:
            file.seek(int(samples.offsets[place]))
            yield json.loads(file.readline())
