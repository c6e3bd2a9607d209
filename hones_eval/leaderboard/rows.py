"""Rows of a board: each metric of each pair of runs, compared on the same examples."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hones_eval.choices import Correction
from hones_eval.leaderboard.captions import is_caption_metric
from hones_eval.leaderboard.lmms_tasks import find_aggregation
from hones_eval.leaderboard.metrics import (
    Corpus,
    Scores,
    caption_form,
    check_aggregation,
    corpus_of,
    scores_of,
)
from hones_eval.leaderboard.pairing import Pair
from hones_eval.leaderboard.reading import Metric
from hones_eval.leaderboard.reuse import reused_examples
from hones_eval.leaderboard.samples import Floats, Integers
from hones_eval.stats.clusters import by_images
from hones_eval.stats.corpus import compare_corpus
from hones_eval.stats.paired import Comparison, compare_graded, compare_right_wrong
from hones_eval.stats.verdicts import ALPHA

Verdict = Literal["better", "worse", "no clear difference", "not judged"]
CORPUS_RESAMPLES = 999  # resamples of a corpus metric, which is computed again for each


@dataclass(frozen=True, eq=False)
class Row:
    """One metric of one task with one steering, compared with its baseline."""

    pair: Pair
    metric: Metric
    baseline: float
    steered: float
    n: int
    images: int | None
    kind: str
    comparison: Comparison
    gained: int | None = None
    lost: int | None = None
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    p_adjusted: float | None = None
    correction: Correction = "holm"
    reach: float | None = None
    rank: int | None = None

    @property
    def gain(self) -> float | None:
        """The difference, positive if steered is better; None if the metric has no better direction."""
        if self.metric.higher_is_better is None:
            return None
        return self.comparison.difference * (1 if self.metric.higher_is_better else -1)

    @property
    def verdict(self) -> Verdict:
        """Whether steering helped: needs an adjusted p below 0.05, and an interval that excludes zero."""
        if self.p_adjusted is None or self.gain is None:
            return "not judged"
        interval = self.comparison.interval
        if self.p_adjusted >= ALPHA or (interval is not None and interval.low <= 0 <= interval.high):
            return "no clear difference"
        return "better" if self.gain > 0 else "worse"

    @property
    def units(self) -> int:
        """The number of independent units: examples, or images where several examples share one."""
        return self.n if self.images is None else self.images

    @property
    def why_not_judged(self) -> str:
        """Why the row has no verdict; empty where it has one."""
        if self.verdict != "not judged":
            return ""
        if self.gain is None:
            return f"it is not known whether more {self.metric.name} is better"
        return self.comparison.note or "there is no test"

    @property
    def detectable(self) -> float | None:
        """The difference that a test of this size finds in 4 of 5 cases, from the width of the 95 % interval.

        A 95 % interval is 2 * 1.96 standard errors wide; 80 % power needs a difference of 1.96 + 0.84.
        """
        interval = self.comparison.interval
        if interval is None or interval.low is None or interval.high is None or interval.high <= interval.low:
            return None
        return (interval.high - interval.low) / (2 * 1.96) * (1.96 + 0.84)

    def record(self) -> dict[str, Any]:
        """The row as a JSON-ready mapping."""
        steering, interval = self.pair.steered.steering, self.comparison.interval
        return {
            "task": self.pair.steered.task,
            "metric": self.metric.name,
            "steering": steering.label if steering else None,
            "baseline": self.baseline,
            "steered": self.steered,
            "difference": self.comparison.difference,
            "interval": None if interval is None else [interval.low, interval.high],
            f"p_{self.correction}": self.p_adjusted,
            "verdict": self.verdict,
        }

    @property
    def group(self) -> tuple[str, str, str, str]:
        """Rows with the same group are ranked against each other."""
        run = self.pair.steered
        return (run.base.name, run.task, self.metric.name, self.metric.filter)


def compare_pairs(pairs: Sequence[Pair], seed: int, resamples: int, include_path: Path | None) -> list[Row]:
    """Compare every metric of every pair.

    Graded metrics that share a baseline are compared together, so that they share one set of resamples.
    """
    rows: list[Row] = []
    graded: dict[tuple[object, ...], list[tuple[int, Floats, Integers | None]]] = defaultdict(list)
    for pair in pairs:
        flags = reused_examples(pair.steered)
        for metric in pair.steered.metrics:
            row, scores, clusters = _row(pair, metric, flags)
            corpus = None
            if scores.kind == "corpus":
                row, scores, clusters, corpus = _of_corpus(row, clusters)
            if scores.kind == "right/wrong" and clusters is None:
                row = _with(row, _scaled(compare_right_wrong(*_columns(scores)), scores.scale), scores)
            elif scores.kind in ("right/wrong", "graded"):
                before, after = _columns(scores)
                row = _with(row, row.comparison, scores)
                key = (id(pair.baseline), metric.name, metric.filter, scores.scale, clusters is None)
                graded[key].append((len(rows), (after - before) * scores.scale, clusters))
            elif corpus is not None:
                row = replace(row, comparison=_corpus(row, corpus, clusters, seed, resamples, include_path))
            rows.append(row)
    for jobs in graded.values():
        columns = np.column_stack([difference for _, difference, _ in jobs])
        found = compare_graded(columns, jobs[0][2], seed=seed, resamples=resamples)
        for (place, _, _), comparison in zip(jobs, found, strict=True):
            rows[place] = replace(rows[place], comparison=comparison)
    return [sensible(row) for row in rows]


def per_example(pair: Pair, metric: Metric) -> tuple[Floats, Integers | None] | None:
    """Each example's difference [n] and its image's number; None for a metric without a value per example."""
    _, scores, clusters = _row(pair, metric, ())
    if scores.kind not in ("right/wrong", "graded"):
        return None
    before, after = _columns(scores)
    return (after - before) * scores.scale, clusters


def sensible(row: Row) -> Row:
    """No test of a single unit, and an interval that agrees with the test and stays in the metric's range."""
    found = row.comparison
    if row.units < 2 and (found.test or found.interval):
        unit = "example" if row.images is None else "image"
        return replace(row, comparison=Comparison(found.difference, None, None, None, f"only one {unit}"))
    ends = found.interval
    if ends is not None and found.test is not None and found.test.p >= ALPHA:
        ends = replace(ends, low=min(ends.low, 0.0), high=max(ends.high, 0.0))
        row = replace(row, comparison=replace(found, interval=ends))
        found = row.comparison
    if ends is None or row.reach is None or (ends.low >= -row.reach and ends.high <= row.reach):
        return row
    ends = replace(ends, low=max(ends.low, -row.reach), high=min(ends.high, row.reach))
    note = f"the interval is cut at ±{row.reach:g}, the largest possible difference"
    note = "; ".join(text for text in (found.note, note) if text)
    return replace(row, comparison=replace(found, interval=ends, note=note))


def _reach(name: str, scale: float, *values: Floats) -> float | None:
    """The largest possible difference of a metric from 0 to 1; None for metrics with other bounds."""
    if "cider" in name.lower() or not all(((part >= 0) & (part <= 1)).all() for part in values):
        return None
    return scale


def _row(pair: Pair, metric: Metric, flags: tuple[str, ...]) -> tuple[Row, Scores, Integers | None]:
    before = next(
        (m for m in pair.baseline.metrics if (m.name, m.filter) == (metric.name, metric.filter)), None
    )
    samples = pair.steered.samples[metric.filter]
    clusters = _clusters(pair, metric.filter)
    values = (before.value if before else None, metric.value)
    if values[0] is None or values[1] is None:
        scores = Scores("none", note="the reported value is not a number")
    else:
        scores = scores_of(metric, pair.baseline, pair.steered, (values[0], values[1]))
    baseline, steered = (float("nan") if value is None else value for value in values)
    row = Row(
        pair=pair,
        metric=metric,
        baseline=baseline,
        steered=steered,
        n=len(samples),
        images=None if clusters is None else len(np.unique(clusters)),
        kind=scores.kind,
        comparison=Comparison(steered - baseline, None, None, None, scores.note),
        flags=flags,
        notes=(*pair.notes, *pair.steered.notes),
    )
    return row, scores, clusters


def _clusters(pair: Pair, filter_name: str) -> Integers | None:
    """A number for each example's image, if examples share images; None if each has its own."""
    both = pair.baseline.samples[filter_name], pair.steered.samples[filter_name]
    images = next((samples.images for samples in both if samples.images is not None), None)
    if images is None:
        return None
    clusters = _clusters_of(images)
    return None if len(np.unique(clusters)) == len(clusters) else clusters


@lru_cache(maxsize=8)  # the rows of a board mostly have the same examples
def _clusters_of(images: tuple[tuple[str, ...], ...]) -> Integers:
    return by_images(images)


def _columns(scores: Scores) -> tuple[Floats, Floats]:
    assert scores.baseline is not None
    assert scores.steered is not None
    return scores.baseline, scores.steered


def _with(row: Row, comparison: Comparison, scores: Scores) -> Row:
    before, after = _columns(scores)
    up, down = int((after > before).sum()), int((after < before).sum())
    if row.metric.higher_is_better is False:
        up, down = down, up
    reach = _reach(row.metric.name, scores.scale, before, after)
    return replace(row, comparison=comparison, gained=up, lost=down, reach=reach)


def _scaled(comparison: Comparison, scale: float) -> Comparison:
    if scale == 1 or comparison.interval is None:
        return comparison
    ends = comparison.interval
    ends = replace(ends, low=ends.low * scale, high=ends.high * scale)
    return replace(comparison, difference=comparison.difference * scale, interval=ends)


def _of_corpus(row: Row, clusters: Integers | None) -> tuple[Row, Scores, Integers | None, Corpus | None]:
    """A corpus metric over the examples that have it; caption metrics as scores or counts per example."""
    metric, pair, values = row.metric, row.pair, (row.baseline, row.steered)
    corpus = corpus_of(metric, pair.baseline, pair.steered)
    if isinstance(corpus, Corpus):
        if clusters is not None:
            clusters = clusters[corpus.kept]
            row = replace(row, images=len(np.unique(clusters)))
        reach = _reach(metric.name, 1.0, np.array(values))
        row = replace(row, n=len(corpus.kept), reach=reach)
        if not is_caption_metric(metric.name, corpus.baseline):
            return row, Scores("corpus"), clusters, corpus
        form = caption_form(metric, corpus, values)
        if isinstance(form, Scores):
            return replace(row, kind=form.kind), form, clusters, None
        if isinstance(form, Corpus):
            return row, Scores("corpus"), clusters, form
        corpus = form
    comparison = replace(row.comparison, note=f"no interval: {corpus}")
    return replace(row, comparison=comparison), Scores("none"), clusters, None


def _corpus(
    row: Row,
    corpus: Corpus,
    clusters: Integers | None,
    seed: int,
    resamples: int,
    include_path: Path | None,
) -> Comparison:
    function = corpus.function or find_aggregation(row.pair.steered.task, row.metric.name, include_path)
    if isinstance(function, str):
        return replace(row.comparison, note=f"no per-example value, no interval: {function}")
    if problem := check_aggregation(function, corpus.runs, (row.baseline, row.steered)):
        return replace(row.comparison, note=f"no interval: {problem}")
    draws = min(resamples, CORPUS_RESAMPLES)
    return compare_corpus(function, *corpus.runs, clusters, seed=seed, resamples=draws, most=resamples)
