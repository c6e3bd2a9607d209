"""Examples whose score changed between two runs, with their texts from the samples files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hones_eval.leaderboard.rows import Row
from hones_eval.leaderboard.samples import Integers, Samples, read_rows
from hones_eval.leaderboard.text import shown, shown_answer


@dataclass(frozen=True)
class Flip:
    """One example that the steering changed.

    `image` is the hash of its first image in the run's manifest, `media` the first entry of `input_media` in
    lmms-eval's sample; both may be empty. `folder` is that of the samples.
    """

    doc_id: int
    side: Literal["gained", "lost", "changed"]
    question: str
    gold: str
    baseline: str
    steered: str
    scores: str
    image: str = ""
    media: str = ""
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that the page needs, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("image", "media", "folder")}


@dataclass(frozen=True)
class Flips:
    """The flips listed on a page, and the total counts."""

    metric: str
    listed: tuple[Flip, ...]
    gained: int
    lost: int
    changed: int


def flips_of(rows: Sequence[Row], most: int) -> Flips:
    """Examples that flipped by the first metric with a score per example, or by their answers.

    Args:
        rows: the rows of one pair of runs.
        most: how many to list; gained and lost alternate, each in the order of `doc_id`.
    """
    row = next((row for row in rows if row.gained is not None), rows[0])
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
            image=_shown_image(after, int(place)) or _shown_image(before, int(place)),
            media=_first_media(new) or _first_media(old),
            folder=after.path.parent,
        )


def _first_media(sample: Mapping[str, Any]) -> str:
    media = sample.get("input_media")
    return media[0] if isinstance(media, list) and media and isinstance(media[0], str) else ""


def _shown_image(samples: Samples, place: int) -> str:
    """The hash of the first image, if a manifest records it."""
    if samples.shown is None or samples.images is None:
        return ""
    return next(iter(samples.images[place]), "")


def _in_turns(first: Iterator[Flip], second: Iterator[Flip]) -> Iterator[Flip]:
    while True:
        turn = [*islice(first, 1), *islice(second, 1)]
        if not turn:
            return
        yield from turn
