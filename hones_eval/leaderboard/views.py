"""Rows of a board as the strings that pages and tables show."""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
from markupsafe import Markup

from hones_eval.leaderboard.board import Board
from hones_eval.leaderboard.drawing import interval_svg
from hones_eval.leaderboard.identity import SPLITS
from hones_eval.leaderboard.pairing import Pair
from hones_eval.leaderboard.rows import Row
from hones_eval.leaderboard.text import number, one_line, probability, slug
from hones_eval.stats.paired import FEW_DIFFERENT, FEW_UNITS

CSS = {"better": "better", "worse": "worse"}
SIGNS = {"better": "▲", "worse": "▼", "no clear difference": "○", "not judged": "–"}
METHODS = {
    "McNemar exact": "right/wrong answers; a fair coin for each answer that changed (McNemar 1947).",
    "Bonett-Price": "95 % interval of a paired difference of proportions (Bonett and Price 2012).",
    "BCa bootstrap": "95 % interval, bias-corrected and accelerated (Efron 1987), from paired resamples.",
    "BCa bootstrap and t": f"with fewer than {FEW_UNITS} examples or images, or fewer than {FEW_DIFFERENT} "
    "that differ: the smallest interval that contains both the BCa and Student's t interval.",
    "sign flips": "paired randomization test: the sign of each difference at random (Fisher 1935).",
    "exchange": "approximate randomization: answers exchanged between the runs (Riezler and Maxwell 2005).",
    "Cohen's g": "effect: the share of changed answers that were gained, minus one half.",
    "Cohen's d_z": "effect: the mean difference over the standard deviation of the differences.",
    "relative change": "effect: the difference over the baseline's value.",
}


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels that distinguish the steerings of a board."""

    ambiguous: frozenset[str]

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Labels":
        """Find the labels that several steerings of a base model share."""
        seen: dict[tuple[str, str], set[object]] = {}
        for pair in pairs:
            steering = pair.steered.steering
            if steering is not None:
                key = (pair.steered.base.name, steering.label)
                seen.setdefault(key, set()).add((steering.identity, pair.steered.seeds))
        return cls(frozenset(label for (_, label), identities in seen.items() if len(identities) > 1))

    def label(self, pair: Pair) -> str:
        """The steering's label, with digest, attach mode and seed where the label alone is ambiguous."""
        steering = pair.steered.steering
        assert steering is not None
        if steering.label not in self.ambiguous:
            return one_line(steering.label, 200)
        last = f"{(steering.digest or steering.path)[:8]} {steering.attach}, seed {pair.steered.seeds[0]}"
        return one_line(f"{steering.label} ({last})", 200)


def pair_id(pair: Pair) -> str:
    """A file name for a comparison, stable for the same runs."""
    run = pair.steered
    assert run.steering is not None
    key = hashlib.sha256(repr(run.key).encode("utf-8", "replace")).hexdigest()[:8]
    return f"{slug(run.task)}-{slug(run.steering.label)}-{key}"


def row_view(row: Row, labels: Labels, reach: float, of: int, page: str) -> dict[str, Any]:
    """The values of a row that the templates show."""
    found, interval, gain = row.comparison, row.comparison.interval, row.gain
    run, flip = row.pair.steered, row.metric.higher_is_better is False
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    drawn = (-high, -low) if flip and low is not None and high is not None else (low, high)
    css = CSS.get(row.verdict, "")
    metric = row.metric.name + (f" ({row.metric.filter})" if row.metric.filter not in ("none", "") else "")
    steering = run.steering
    assert steering is not None
    return {
        "task": one_line(run.task),
        "base": one_line(run.base.name),
        "metric": one_line(metric),
        "steering": labels.label(row.pair),
        "control": steering.is_control,
        "page": page,
        "rank": row.rank,
        "of": of,
        "baseline": number(row.baseline),
        "steered": number(row.steered),
        "baseline_value": _value(row.baseline),
        "steered_value": _value(row.steered),
        "difference": number(found.difference, sign=True),
        "gain_value": _value(gain),
        "interval": "" if interval is None else f"{number(low, sign=True)}, {number(high, sign=True)}",
        "svg": Markup("") if gain is None else interval_svg(gain, drawn[0], drawn[1], reach, css),
        "method": "" if interval is None else interval.method,
        "test": "" if found.test is None else found.test.method,
        "p": probability(row.p_adjusted),
        "p_plain": probability(None if found.test is None else found.test.p),
        "p_value": _value(row.p_adjusted),
        "effect": "" if found.effect is None else number(found.effect.value, 2, sign=True),
        "effect_name": "" if found.effect is None else found.effect.name,
        "gained_lost": "" if row.gained is None else f"{row.gained:,} / {row.lost or 0:,}",
        "net": "" if row.gained is None else row.gained - (row.lost or 0),
        "n": row.n,
        "n_text": f"{row.n:,}",
        "images": "" if row.images is None else f"{row.images:,}",
        "verdict": row.verdict,
        "css": css,
        "sign": SIGNS[row.verdict],
        "flags": row.flags,
        "note": found.note,
    }


def _value(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.6g}"


def row_views(board: Board, paged: Collection[str]) -> list[dict[str, Any]]:
    """Views of all rows, in the board's order; `paged` names the comparisons that have a page."""
    labels = Labels.of([row.pair for row in board.rows])
    reaches = axis_reaches(board.rows)
    sizes = Counter(row.group for row in board.rows if row.rank is not None)
    names = [pair_id(row.pair) for row in board.rows]
    pages = [f"comparisons/{name}.html" if name in paged else "" for name in names]
    return [
        row_view(row, labels, reaches[_axis(row)], sizes[row.group], page)
        for row, page in zip(board.rows, pages, strict=True)
    ]


def tested_rows(board: Board) -> int:
    """The number of rows that were corrected together."""
    return sum(row.p_adjusted is not None for row in board.rows)


def summary(row: Row, tested: int) -> str:
    """A row in words: how many examples changed, and whether that can be chance."""
    found, words = row.comparison, []
    if row.gained is not None:
        ups, downs = ("right", "wrong") if row.kind == "right/wrong" else ("better", "worse")
        words.append(
            f"By {one_line(row.metric.name)}, {row.gained:,} of {row.n:,} examples became {ups} "
            f"and {row.lost or 0:,} became {downs}."
        )
    if row.verdict == "not judged":
        return " ".join([*words, f"Not judged: {found.note}." if found.note else "Not judged."])
    interval, p = found.interval, probability(row.p_adjusted)
    rows = f"{tested:,} row{'' if tested == 1 else 's'}"
    if row.verdict in CSS:
        words.append(f"Steering made it {row.verdict}: p is {p} after correction for {rows}.")
    elif interval is not None and (interval.low > 0 or interval.high < 0):
        words.append(
            f"The interval excludes zero, but among {rows} some do by chance: p is {p} after "
            "correction, not significant."
        )
    else:
        words.append(f"No clear difference: p is {p} after correction for {rows}.")
    return " ".join(words)


def axis_reaches(rows: Sequence[Row]) -> dict[object, float]:
    """The reach of the drawn axes, one per metric and task, so that small intervals stay readable."""
    reaches: dict[object, float] = {}
    for row in rows:
        interval = row.comparison.interval
        ends = [row.comparison.difference, *(() if interval is None else (interval.low, interval.high))]
        far = max((abs(end) for end in ends if np.isfinite(end)), default=0.0)
        reaches[_axis(row)] = max(reaches.get(_axis(row), 0.0), far)
    return {axis: _round_up(reach) for axis, reach in reaches.items()}


def _axis(row: Row) -> object:
    return (row.pair.steered.task, row.metric.name)


def _round_up(value: float) -> float:
    """The next larger round number, for the label of an axis."""
    if value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(
        next(
            step * power
            for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
            if value <= step * power * (1 + 1e-9)
        )
    )


def clearest_first(rows: Sequence[Row]) -> list[int]:
    """Positions of rows by p-value, smallest first; ties keep the board's order."""

    def key(place: int) -> tuple[float, float]:
        row = rows[place]
        test = row.comparison.test
        return (2.0, 2.0) if row.p_adjusted is None or test is None else (row.p_adjusted, test.p)

    return sorted(range(len(rows)), key=key)


def with_pages(rows: Sequence[Row], most: int | None) -> frozenset[str]:
    """Names of the comparisons that get a page: the `most` with the smallest p-values, or all."""
    names = dict.fromkeys(pair_id(rows[place].pair) for place in clearest_first(rows))
    return frozenset(islice(names, most))


def matrix_view(board: Board, views: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The gain of each steering (down) on each task (across), by its first metric; None for one task."""
    tasks = sorted({row.pair.steered.task for row in board.rows})
    if len(tasks) < 2:
        return None
    first = {row.pair.steered.task: row.pair.steered.metrics[0].name for row in board.rows}
    lines: dict[tuple[str, str, bool], dict[str, dict[str, Any]]] = {}
    for row, view in zip(board.rows, views, strict=True):
        task = row.pair.steered.task
        if row.metric.name == first[task] and row.gain is not None:
            gain = number(row.gain, 3, sign=True)
            steering = row.pair.steered.steering
            home = steering is not None and SPLITS.sub("", task) in steering.meant_for
            cell = {
                "gain": gain,
                "css": view["css"],
                "sign": view["sign"] if view["css"] else "",
                "zero": row.gain == 0,
                "home": home,
                "page": view["page"],
                "label": f"{view['steering']} on {view['task']}: {gain}, {row.verdict}",
            }
            lines.setdefault((view["base"], view["steering"], view["control"]), {})[task] = cell
    prefix = common_prefix(tasks)
    return {
        "prefix": one_line(prefix),
        "columns": [
            {"task": one_line(task.removeprefix(prefix)), "metric": one_line(first[task])} for task in tasks
        ],
        "lines": [
            {
                "base": base,
                "steering": steering,
                "control": control,
                "cells": [cells.get(task) for task in tasks],
            }
            for (base, steering, control), cells in sorted(lines.items())
        ],
        "several_bases": len({base for base, *_ in lines}) > 1,
    }


def common_prefix(names: Sequence[str]) -> str:
    """The common prefix of names, up to an underscore: `scenes_` of `scenes_ocr` and `scenes_caption`."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(names), max(names), strict=False))
    head, underscore, _ = "".join(letter for letter, _ in same).rpartition("_")
    return head + underscore


def method_views(board: Board) -> list[dict[str, str]]:
    """The methods used on this board, with descriptions."""
    found = [row.comparison for row in board.rows]
    used = {comparison.interval.method for comparison in found if comparison.interval} | {
        comparison.test.method for comparison in found if comparison.test
    }
    used |= {comparison.effect.name for comparison in found if comparison.effect}
    return [
        {"name": name, "text": text}
        for name, text in METHODS.items()
        if any(method.startswith(name) for method in used)
    ]
