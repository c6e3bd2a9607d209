"""How a metric of lmms-eval is compared: by its value for each example, or over the whole corpus again."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hones_eval.leaderboard.reading import Metric, Run
from hones_eval.leaderboard.samples import Floats, read_rows

Kind = Literal["right/wrong", "graded", "corpus", "none"]
SLOW_SECONDS = 0.1  # of processor, for one value of a corpus metric; resampling takes four thousand


@dataclass(frozen=True, eq=False)
class Scores:
    """A metric of two runs, ready to be compared.

    `kind` says how: `right/wrong` and `graded` by `baseline` and `steered` `[n]` times `scale`, `corpus` by
    computing the metric again, `none` not at all, for the reason in `note`.
    """

    kind: Kind
    baseline: Floats | None = None
    steered: Floats | None = None
    scale: float = 1.0
    note: str = ""


def scores_of(metric: Metric, baseline: Run, steered: Run, values: tuple[float, float]) -> Scores:
    """Decide how to compare a metric; `values` are what the baseline and the steered run report."""
    samples = baseline.samples[metric.filter], steered.samples[metric.filter]
    columns = tuple(one.values[metric.name] for one in samples)
    corpus = any(metric.name in one.items for one in samples)
    if not all(np.isfinite(column).all() for column in columns):
        if corpus:
            return Scores("corpus")
        return Scores("none", note=_not_numbers(metric.name, samples[0].doc_ids, columns))
    scale = _scale(columns, values)
    if scale is None:
        return Scores("corpus")
    kind: Kind = "right/wrong" if all(np.isin(column, (0, 1)).all() for column in columns) else "graded"
    return Scores(kind, columns[0], columns[1], scale)


def _not_numbers(name: str, doc_ids: Any, columns: Sequence[Floats]) -> str:
    bad = np.flatnonzero(~np.isfinite(np.sum(columns, axis=0)))
    return f"{name} is not a number for {len(bad):,} examples (first: doc_id {doc_ids[bad[0]]})"


def _scale(columns: Sequence[Floats], values: Sequence[float]) -> float | None:
    """What the means are multiplied by to give the reported values (1 or 100); None if neither does."""
    for scale in (1.0, 100.0):
        if all(
            math.isclose(column.mean() * scale, value, rel_tol=1e-6, abs_tol=1e-9)
            for column, value in zip(columns, values, strict=True)
        ):
            return scale
    return None


def corpus_items(metric: Metric, run: Run) -> list[Any]:
    """What `process_results` returned for the metric, for every example, read again from the samples."""
    samples = run.samples[metric.filter]
    return [row.get(metric.name) for row in read_rows(samples, np.arange(len(samples)))]


def check_aggregation(
    function: Callable[[list[Any]], float], items: Sequence[list[Any]], values: Sequence[float]
) -> str:
    """Why a recomputed metric cannot be used: it does not give the reported values, or takes too long."""
    for listed, reported in zip(items, values, strict=True):
        found = function(list(listed))
        if not math.isclose(found, reported, rel_tol=1e-6, abs_tol=1e-9):
            return f"computing it again gives {found:.6g} and not the reported {reported:.6g}"
    took = min(_processor_seconds(function, items[0]) for _ in range(3))
    return f"computing it once takes {took:.1f} s, too long to resample" if took > SLOW_SECONDS else ""


def _processor_seconds(function: Callable[[list[Any]], float], items: list[Any]) -> float:
    """Not the time on the clock, so that a busy machine makes the same board; nor a first call's loading."""
    began = time.thread_time()
    function(list(items))
    return time.thread_time() - began
