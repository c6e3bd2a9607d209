"""The examples whose score changed between two runs, with their texts read again from the samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from hones_eval.leaderboard.board import Row
from hones_eval.leaderboard.samples import Integers, Samples, read_rows
from hones_eval.leaderboard.text import shown, shown_answer


@dataclass(frozen=True)
class Flip:
    """One example that the steering changed.

    `picture` is the hash that the run's manifest gives its first picture, `media` what lmms-eval's sample
    holds of it; both may be empty.
    """

    doc_id: int
    side: Literal["gained", "lost", "changed"]
    question: str
    gold: str
    baseline: str
    steered: str
    scores: str
    picture: str = ""
    media: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping of what the page needs."""
        return {name: value for name, value in vars(self).items() if name not in ("picture", "media")}


@dataclass(frozen=True)
class Flips:
    """The flips that a page shows, and how many there are in all."""

    metric: str
    listed: tuple[Flip, ...]
    gained: int
    lost: int
    changed: int


def flips_of(rows: Sequence[Row], most: int) -> Flips:
    """The examples that flipped by the first metric that has a score for each example; else by their answers.

    Args:
        rows: the rows of one pair of runs.
        most: how many to list; gained and lost take turns, each in the order of `doc_id`.
    """
    row = next((one for one in rows if one.gained is not None), rows[0])
    before = row.pair.baseline.samples[row.metric.filter]
    after = row.pair.steered.samples[row.metric.filter]
    name = row.metric.name
    if row.gained is None:
        places = np.flatnonzero(before.answers != after.answers)
        listed = tuple(_flips(before, after, places[:most], name, "changed"))
        return Flips("", listed, 0, 0, len(places))
    change = after.values[name] - before.values[name]
    if row.metric.higher_is_better is False:
        change = -change
    up, down = np.flatnonzero(change > 0), np.flatnonzero(change < 0)
    keep_up = min(len(up), max(most // 2, most - len(down)))
    gained = _flips(before, after, up[:keep_up], name, "gained")
    lost = _flips(before, after, down[: most - keep_up], name, "lost")
    return Flips(name, tuple(_in_turns(gained, lost)), len(up), len(down), 0)


def _flips(
    before: Samples, after: Samples, places: Integers, name: str, side: Literal["gained", "lost", "changed"]
) -> Iterator[Flip]:
    pairs = zip(places, read_rows(before, places), read_rows(after, places), strict=True)
    for place, old, new in pairs:
        scores = (
            "" if side == "changed" else f"{before.values[name][place]:g} → {after.values[name][place]:g}"
        )
        yield Flip(
            doc_id=int(before.doc_ids[place]),
            side=side,
            question=shown(old.get("input")),
            gold=shown(old.get("target")),
            baseline=shown_answer(old.get("filtered_resps")),
            steered=shown_answer(new.get("filtered_resps")),
            scores=scores,
            picture=_shown_picture(after, int(place)) or _shown_picture(before, int(place)),
            media=str(next(iter(new.get("input_media") or old.get("input_media") or ()), "")),
        )


def _shown_picture(samples: Samples, place: int) -> str:
    """The first picture's hash, where a manifest tells it."""
    if samples.shown is None or samples.pictures is None:
        return ""
    return next(iter(samples.pictures[place]), "")


def _in_turns(first: Iterator[Flip], second: Iterator[Flip]) -> Iterator[Flip]:
    while True:
        turn = [*islice(first, 1), *islice(second, 1)]
        if not turn:
            return
        yield from turn
