"""Examples of two runs side by side: answers, scores and boxes, from the samples files."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hones_eval.leaderboard.rows import Row
from hones_eval.leaderboard.samples import Samples, read_rows
from hones_eval.leaderboard.text import number, shown, shown_answer

Side = Literal["gained", "lost", "changed", "same"]
SIDES: tuple[Side, ...] = ("gained", "lost", "changed", "same")
Box = tuple[float, float, float, float]

_NUMBER = r"-?\d+(?:\.\d+)?"
_FOUR_NUMBERS = re.compile(rf"[\s\[(]*{_NUMBER}(?:[\s,]+{_NUMBER}){{3}}[\s\])]*")


@dataclass(frozen=True)
class Example:
    """One example, answered without and with the steering.

    `side`: whether the score rose or fell; else whether the answer is another one.
    `scores`: the metrics with a score per example, each with the baseline's and the steered score.
    `boxes`: whose box (gold, baseline, steered), and left, top, right, bottom as the texts have them.
    `image`: the hash of its first image in the run's manifest; `media`: the first entry of `input_media` in
    lmms-eval's sample; both may be empty. `folder` is that of the samples.
    """

    doc_id: int
    side: Side
    question: str
    gold: str
    baseline: str
    steered: str
    scores: tuple[tuple[str, str, str], ...] = ()
    boxes: Mapping[str, Box] = field(default_factory=dict)
    image: str = ""
    media: str = ""
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The texts that the page needs, ready for JSON."""
        kept = ("doc_id", "side", "question", "gold", "baseline", "steered")
        return {name: getattr(self, name) for name in kept} | {
            "scores": "; ".join(f"{name} {before} → {after}" for name, before, after in self.scores)
        }


@dataclass(frozen=True)
class Examples:
    """The examples listed on a page, and how many there are of each side."""

    metric: str
    listed: tuple[Example, ...]
    counts: Mapping[Side, int]


def examples_of(rows: Sequence[Row], most: int) -> Examples:
    """All examples of one pair of runs, those that changed first.

    Whether an example gained or lost is told by the first metric with a score per example.

    Args:
        rows: the rows of one pair of runs.
        most: how many to list. Gained and lost alternate, then come other answers with the same score, then
            the same answers, each in the order of `doc_id`.
    """
    row = next((row for row in rows if row.gained is not None), rows[0])
    before = row.pair.baseline.samples[row.metric.filter]
    after = row.pair.steered.samples[row.metric.filter]
    sides = _sides(row, before, after)
    counts = Counter(sides)
    places = _changed_first(sides)[:most]
    metrics = [other.metric.name for other in rows if other.metric.filter == row.metric.filter]
    listed = tuple(_read(before, after, places, [sides[place] for place in places], metrics))
    name = row.metric.name if row.gained is not None else ""
    return Examples(name, listed, {side: counts[side] for side in SIDES})


def _sides(row: Row, before: Samples, after: Samples) -> list[Side]:
    """The side of every example."""
    other_answer = before.answers != after.answers
    if row.gained is None:
        return ["changed" if other else "same" for other in other_answer]
    change = after.values[row.metric.name] - before.values[row.metric.name]
    if row.metric.higher_is_better is False:
        change = -change
    return [
        "gained" if gain > 0 else "lost" if gain < 0 else "changed" if other else "same"
        for gain, other in zip(change, other_answer, strict=True)
    ]


def _changed_first(sides: Sequence[Side]) -> list[int]:
    """Positions of examples in the order of the page."""
    seen: Counter[Side] = Counter()
    keys = []
    for place, side in enumerate(sides):
        group = SIDES.index(side) if side in ("changed", "same") else 0
        turn = seen[side] if group == 0 else 0
        keys.append((group, turn, SIDES.index(side), place))
        seen[side] += 1
    return [place for *_, place in sorted(keys)]


def _read(
    before: Samples, after: Samples, places: Sequence[int], sides: Sequence[Side], metrics: Sequence[str]
) -> Iterator[Example]:
    pairs = zip(places, sides, read_rows(before, places), read_rows(after, places), strict=True)
    has_boxes = any("iou" in name.lower() for name in metrics)
    for place, side, old, new in pairs:
        texts = {
            "gold": shown(old.get("target")),
            "baseline": shown_answer(old.get("filtered_resps")),
            "steered": shown_answer(new.get("filtered_resps")),
        }
        yield Example(
            doc_id=int(before.doc_ids[place]),
            side=side,
            question=shown(old.get("input")),
            scores=tuple(_scores(before, after, place, metrics)),
            boxes=_boxes(texts) if has_boxes else {},
            image=_shown_image(after, place) or _shown_image(before, place),
            media=_first_media(new) or _first_media(old),
            folder=after.path.parent,
            **texts,
        )


def _scores(
    before: Samples, after: Samples, place: int, metrics: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    for name in metrics:
        pair: list[NDArray[np.float64]] = [
            run.values[name][place] for run in (before, after) if name in run.values
        ]
        if len(pair) == 2 and np.isfinite(pair).all():
            first, second = (number(float(value), 3).rstrip("0").rstrip(".") for value in pair)
            yield shown(name, 80), first, second


def _boxes(texts: Mapping[str, str]) -> dict[str, Box]:
    """The boxes in the texts of an example, if its gold answer is a box: four numbers and nothing else."""
    if not _FOUR_NUMBERS.fullmatch(texts["gold"]):
        return {}
    found = {whose: [float(text) for text in re.findall(_NUMBER, told)[:4]] for whose, told in texts.items()}
    return {
        whose: (box[0], box[1], box[2], box[3])
        for whose, box in found.items()
        if len(box) == 4 and box[0] < box[2] and box[1] < box[3]
    }


def _first_media(sample: Mapping[str, Any]) -> str:
    media = sample.get("input_media")
    return media[0] if isinstance(media, list) and media and isinstance(media[0], str) else ""


def _shown_image(samples: Samples, place: int) -> str:
    """The hash of the first image, if a manifest records it."""
    if samples.shown is None or samples.images is None:
        return ""
    return next(iter(samples.images[place]), "")
