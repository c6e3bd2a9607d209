"""How a metric is compared: by its value per example, or by recomputing it on the whole corpus."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hones_eval.leaderboard.captions import caption_scores, corpus_function
from hones_eval.leaderboard.reading import Metric, Run
from hones_eval.leaderboard.samples import Floats, Integers, read_rows

Kind = Literal["right/wrong", "graded", "corpus", "none"]
SLOW_SECONDS = 0.1  # of processor time per value of a corpus metric; resampling computes about 4,000 values


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
    """Decide how to compare a metric; `values` are those reported by the baseline and the steered run."""
    samples = baseline.samples[metric.filter], steered.samples[metric.filter]
    columns = tuple(block.values[metric.name] for block in samples)
    corpus = any(metric.name in block.items for block in samples)
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
    """The factor from the means to the reported values; None if no known factor fits.

    It is 1, or 100 for percent; OCRBench counts correct answers and divides by 1,000, however many ran.
    """
    for scale in (1.0, 100.0, len(columns[0]) / 1000):
        if all(
            _agrees(float(column.mean()) * scale, value)
            for column, value in zip(columns, values, strict=True)
        ):
            return scale
    return None


@dataclass(frozen=True, eq=False)
class Corpus:
    """The input of a corpus metric: one item per example that has the metric.

    `kept` `[n]` are the positions of those examples in the samples; in MME each metric has its own.
    `function` is None if the task's own aggregation is used.
    """

    baseline: list[Any]
    steered: list[Any]
    kept: Integers
    function: Callable[[list[Any]], float] | None = None

    @property
    def runs(self) -> tuple[list[Any], list[Any]]:
        """The items of both runs."""
        return self.baseline, self.steered


def corpus_of(metric: Metric, baseline: Run, steered: Run) -> Corpus | str:
    """Read the entries of a metric from the samples again, or say why they do not match."""
    before, after = _entries(metric, baseline), _entries(metric, steered)
    if [item is None for item in before] != [item is None for item in after]:
        return f"{metric.name} is listed for other examples in the baseline"
    kept = [k for k, item in enumerate(before) if item is not None]
    return Corpus([before[k] for k in kept], [after[k] for k in kept], np.array(kept, dtype=np.int64))


def _entries(metric: Metric, run: Run) -> list[Any]:
    samples = run.samples[metric.filter]
    return [row.get(metric.name) for row in read_rows(samples, np.arange(len(samples)))]


def caption_form(metric: Metric, corpus: Corpus, values: tuple[float, float]) -> Scores | Corpus | str:
    """A caption metric as scores per example or counts per example, or the reason why not."""
    before, after = (caption_scores(metric.name, items) for items in corpus.runs)
    for found in (before, after):
        if isinstance(found, str):
            return found
    if isinstance(before, list) and isinstance(after, list):
        return replace(corpus, baseline=before, steered=after, function=corpus_function(metric.name))
    assert isinstance(before, np.ndarray)
    assert isinstance(after, np.ndarray)
    for column, reported in zip((before, after), values, strict=True):
        if not _agrees(float(column.mean()), reported):
            return _other_value(float(column.mean()), reported)
    return Scores("graded", before, after)


def check_aggregation(
    function: Callable[[list[Any]], float], items: Sequence[list[Any]], values: Sequence[float]
) -> str:
    """Why a metric cannot be recomputed on resamples (wrong value, or too slow); empty if it can."""
    for listed, reported in zip(items, values, strict=True):
        found = function(list(listed))
        if not _agrees(found, reported):
            return _other_value(found, reported)
    took = min(_processor_seconds(function, items[0]) for _ in range(3))
    return f"computing it once takes {took:.1f} s, too long to resample" if took > SLOW_SECONDS else ""


def _agrees(found: float, reported: float) -> bool:
    return math.isclose(found, reported, rel_tol=1e-6, abs_tol=1e-9)


def _other_value(found: float, reported: float) -> str:
    return f"computing it again gives {found:.6g} and not the reported {reported:.6g}"


def _processor_seconds(function: Callable[[list[Any]], float], items: list[Any]) -> float:
    """Processor time rather than wall time, so that a busy machine produces the same board."""
    began = time.thread_time()
    function(list(items))
    return time.thread_time() - began
