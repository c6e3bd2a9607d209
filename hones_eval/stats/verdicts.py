"""One rule for verdicts: the same tests, intervals and corrections wherever two conditions are compared.

A row compares one condition with its baseline on the same examples, by the tests and intervals of
`stats.paired` and `stats.corpus`. Rows that are reported together are judged together:

1. Under ten independent units there is no verdict ("too few").
2. The p-values are corrected over all rows of the report (Holm; Benjamini-Hochberg by option).
3. "better" or "worse" needs a corrected p below 0.05 and a 95 % interval that excludes zero.
4. Interval and test never disagree in print: an interval that excludes zero although its own test has
   p >= 0.05 is extended to zero.
5. Intervals stay inside the range of the metric.
6. Every row states the smallest true gain it would have found with probability 0.8.
7. Several draws of one thing are pooled: every example counts once, with its mean over the draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hones_eval.choices import Correction
from hones_eval.stats import power
from hones_eval.stats.corpus import compare_corpus
from hones_eval.stats.paired import (
    Comparison,
    Floats,
    Integers,
    Interval,
    bonett_price,
    cluster_sums,
    compare_graded,
    compare_right_wrong,
    holm,
)

ALPHA = 0.05
FEWEST_UNITS = 10
CORRECTIONS: dict[Correction, str] = {"holm": "Holm", "benjamini_hochberg": "Benjamini-Hochberg"}
"""The names of the corrections in reports."""
Verdict = Literal["better", "worse", "no clear difference", "too few"]


@dataclass(frozen=True)
class Contrast:
    """One condition compared with its baseline, positive where it is better, before correction."""

    comparison: Comparison
    units: int
    """Independent units: examples, or images where several examples share one."""
    detectable: Callable[[float], float | None]
    """The smallest true gain that the test finds with probability 0.8 at a two-sided level."""


@dataclass(frozen=True)
class Judged:
    """A contrast with its verdict among the `rows` that are reported together."""

    gain: float
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None
    verdict: Verdict
    detectable: float | None
    units: int
    rows: int
    test: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {name: value for name, value in vars(self).items() if value != ""}

    @property
    def sentence(self) -> str:
        """The verdict in words, with its p-value."""
        if self.verdict == "too few":
            return f"too few: {self.units} independent examples"
        if self.p is None or self.p_adjusted is None:
            return f"{self.verdict}{f' ({self.note})' if self.note else ''}"
        after = f"p = {self.p_adjusted:.2g} after correction over {self.rows} rows" if self.rows > 1 else ""
        if self.p < ALPHA <= self.p_adjusted:
            return f"{self.verdict}: p = {self.p:.2g} alone, not after correction over {self.rows} rows"
        return f"{self.verdict}: {after or f'p = {self.p:.2g}'}"


def contrasts_of_values(
    baseline: Floats,
    conditions: Floats,
    clusters: Integers | None = None,
    *,
    sign: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
    resamples: int = 9999,
) -> list[Contrast]:
    """Compare a metric that is a mean over examples.

    Args:
        baseline: each example's value without a change `[n]`.
        conditions: each example's value under each of `m` conditions `[n, m]`.
        clusters: a number per example `[n]`, the same for examples that share images; None if none do.
        sign: 1 if higher values are better, -1 if lower values are.
        scale: what the mean is multiplied by: 1, or 100 for percent.
        seed: of the resamples.
        resamples: of the bootstrap and the randomization test.

    Answers that are right or wrong on independent examples: McNemar's exact test and the interval of Bonett
    and Price. All others: sign flips, and the BCa interval joined with the t interval.
    """
    if clusters is not None and len(np.unique(clusters)) == len(clusters):
        clusters = None
    everything = np.column_stack([baseline, conditions])
    span = scale * _range(everything)
    if clusters is None and bool(np.isin(everything, (0, 1)).all()):
        if sign < 0:
            baseline, conditions = 1 - baseline, 1 - conditions
        return [_right_wrong(baseline, column, scale) for column in conditions.T]
    differences = sign * scale * (conditions - baseline[:, None])
    sums, sizes = cluster_sums(differences, clusters)
    compared = compare_graded(differences, clusters, seed=seed, resamples=resamples)
    return [_graded(comparison, sums[:, k], sizes, span) for k, comparison in enumerate(compared)]


def contrast_of_corpus(
    metric: Callable[[list[Any]], float],
    baseline: Sequence[Any],
    condition: Sequence[Any],
    clusters: Integers | None = None,
    *,
    sign: float = 1.0,
    seed: int = 0,
    resamples: int = 199,
    most: int = 999,
) -> Contrast:
    """Compare a metric that only a whole corpus has, such as BLEU-4, by computing it on resamples.

    The arguments are those of `contrasts_of_values` and `stats.corpus.compare_corpus`.
    """
    if clusters is not None and len(np.unique(clusters)) == len(clusters):
        clusters = None
    found = compare_corpus(metric, baseline, condition, clusters, seed=seed, resamples=resamples, most=most)
    if sign < 0:
        found = _negated(found)
    units = len(baseline) if clusters is None else len(np.unique(clusters))
    base, value = metric(list(baseline)), metric(list(condition))
    span = 1.0 if min(base, value) >= 0 and max(base, value) <= 1 else None
    if all(one == other for one, other in zip(baseline, condition, strict=True)) and span:
        found = replace(found, interval=_of_no_change(units, span), note="")
    error = None if found.interval is None else (found.interval.high - found.interval.low) / (2 * 1.96)

    def detectable(alpha: float) -> float | None:
        return None if error is None else power.detectable_mean(error, units, alpha)

    return Contrast(_inside(found, span), units, detectable)


def judge(
    contrasts: Sequence[Contrast], correction: Correction = "holm", alpha: float = ALPHA
) -> list[Judged]:
    """Give every contrast of one report its verdict, corrected over those that have a test.

    Args:
        contrasts: all rows that are reported together.
        correction: `holm` bounds the probability of any false verdict; `benjamini_hochberg` the expected
            share of false verdicts among all verdicts.
        alpha: the level.
    """
    tested = [k for k, row in enumerate(contrasts) if row.comparison.test and row.units >= FEWEST_UNITS]
    p = [test.p for k in tested if (test := contrasts[k].comparison.test) is not None]
    adjusted = corrected(p, correction)
    by_row = dict(zip(tested, adjusted, strict=True))
    return [_judged(row, by_row.get(k), len(tested), alpha) for k, row in enumerate(contrasts)]


def corrected(p: Sequence[float], correction: Correction) -> list[float]:
    """Adjust p-values that are reported together."""
    return holm(p) if correction == "holm" else benjamini_hochberg(p)


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjust p-values for the false discovery rate (Benjamini and Hochberg 1995)."""
    order = np.argsort(p, kind="stable")[::-1]
    adjusted = np.empty(len(p))
    smallest = 1.0
    for place, k in enumerate(order):
        smallest = min(smallest, p[k] * len(p) / (len(p) - place))
        adjusted[k] = smallest
    return [float(value) for value in adjusted]


def _judged(row: Contrast, p_adjusted: float | None, rows: int, alpha: float) -> Judged:
    comparison = row.comparison
    p = None if comparison.test is None else comparison.test.p
    interval = comparison.interval
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    if low is not None and high is not None and p is not None and p >= alpha:
        low, high = min(low, 0.0), max(high, 0.0)
    verdict: Verdict = "no clear difference"
    if row.units < FEWEST_UNITS:
        verdict = "too few"
    elif p_adjusted is not None and p_adjusted < alpha and low is not None and high is not None:
        if low > 0:
            verdict = "better"
        elif high < 0:
            verdict = "worse"
    return Judged(
        gain=comparison.difference,
        low=low,
        high=high,
        p=p,
        p_adjusted=p_adjusted,
        verdict=verdict,
        detectable=row.detectable(alpha / max(1, rows)),
        units=row.units,
        rows=rows,
        test="" if comparison.test is None else comparison.test.method,
        note=comparison.note,
    )


def _right_wrong(baseline: Floats, condition: Floats, scale: float) -> Contrast:
    found = compare_right_wrong(baseline, condition)
    n, changed = len(baseline), float((baseline != condition).mean())
    if scale != 1 and found.interval is not None:
        interval = replace(found.interval, low=scale * found.interval.low, high=scale * found.interval.high)
        found = replace(found, difference=scale * found.difference, interval=interval)

    def detectable(alpha: float) -> float | None:
        smallest = power.detectable_right_wrong(n, changed, alpha)
        return None if smallest is None else scale * smallest

    return Contrast(found, n, detectable)


def _graded(found: Comparison, sums: Floats, sizes: Floats, span: float) -> Contrast:
    units = len(sums)
    if not sums.any():
        found = replace(found, interval=_of_no_change(units, span), note="")
    residuals = sums - sums.sum() / sizes.sum() * sizes
    error = float(np.sqrt(units / max(1, units - 1) * (residuals**2).sum()) / sizes.sum())

    def detectable(alpha: float) -> float | None:
        # If few units differ, their spread says little. The gain that changes some units by the whole range
        # of the metric is then the smallest that could be found.
        by_error = power.detectable_mean(error, units, alpha)
        by_changes = power.detectable_right_wrong(units, 0.0, alpha)
        known = [by_error] if error > 0 else [] if by_changes is None else [span * by_changes]
        return max((value for value in known if value is not None), default=None)

    return Contrast(_inside(found, span), units, detectable)


def _range(values: Floats) -> float:
    """The width of the metric's range: 1 for values in [0, 1], else what was seen."""
    low, high = float(values.min()), float(values.max())
    return 1.0 if low >= 0 and high <= 1 else high - low


def _of_no_change(units: int, span: float) -> Interval:
    """The interval where no unit changed: the Bonett-Price interval of no change, times the range."""
    ends = bonett_price(0, 0, units)
    return Interval(span * ends.low, span * ends.high, "Bonett-Price, times the metric's range")


def _inside(found: Comparison, span: float | None) -> Comparison:
    """Cut the interval at the largest difference that the metric's range allows."""
    if found.interval is None or not span:
        return found
    ends = found.interval
    return replace(found, interval=replace(ends, low=max(-span, ends.low), high=min(span, ends.high)))


def _negated(found: Comparison) -> Comparison:
    interval = found.interval
    if interval is not None:
        interval = replace(interval, low=-interval.high, high=-interval.low)
    return replace(found, difference=-found.difference, interval=interval)
