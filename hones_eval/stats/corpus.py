"""Paired comparison of corpus metrics, such as BLEU-4 or F1, which are recomputed on resamples."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hones_eval.stats.paired import (
    Comparison,
    Effect,
    Integers,
    Test,
    are_few,
    bca_ends,
    both,
    checked_interval,
    t_of_jackknife,
)


def compare_corpus(
    metric: Callable[[list[Any]], float],
    baseline: Sequence[Any],
    steered: Sequence[Any],
    clusters: Integers | None = None,
    *,
    seed: int = 0,
    resamples: int = 999,
    most: int = 9999,
    level: float = 0.95,
) -> Comparison:
    """Compare a metric of the whole corpus, such as BLEU-4 or F1, by computing it on resampled examples.

    Args:
        metric: the metric of a list of items; NaN if it is undefined.
        baseline: the items of the baseline, one per example.
        steered: the items of the steered run, in the same order.
        clusters: the image of each example `[n]`, if examples share images.
        seed: of the resamples and exchanges.
        resamples: of the bootstrap, and of the test.
        most: the largest number of exchanges in the test. If none of the first `resamples` exchanges differs
            as much as the runs do, the test ends at the first that does (Besag and Clifford 1991).
        level: of the interval.

    Interval: BCa bootstrap, its acceleration from a jackknife over at most 200 blocks; with few examples or
    images, or few whose items differ, the smallest interval that also contains the jackknife's t interval.
    Test: approximate randomization (Riezler and Maxwell 2005): the two runs' items are exchanged at random.
    Effect: the difference relative to the baseline.
    """
    places = _members(len(baseline), clusters)
    generator = np.random.default_rng([seed, len(baseline), 2])

    def difference(units: Sequence[int] | Integers) -> float:
        drawn = _drawn(places, units)
        return metric(_items(steered, drawn)) - metric(_items(baseline, drawn))

    everything = np.arange(len(places))
    observed = difference(everything)
    boot = np.array([difference(generator.integers(0, len(places), len(places))) for _ in range(resamples)])
    blocks = np.array_split(generator.permutation(everything), min(200, len(places)))
    left_out = [difference(np.setdiff1d(everything, block)) for block in blocks if len(block) < len(places)]
    if len(left_out) < 2 or not np.isfinite([observed, *boot, *left_out]).all():
        return Comparison(
            observed, None, None, None, "no interval: the metric is undefined on some resamples"
        )
    jackknife = np.array(left_out)
    low, high = bca_ends(np.array([observed]), boot[:, None], jackknife[:, None], level=level)
    different = sum(any(baseline[k] != steered[k] for k in place) for place in places)
    if are_few(len(places), different):
        low, high = both((low, high), t_of_jackknife(observed, jackknife, level=level))
    unit = "examples" if clusters is None else "images"
    how = ", metric recomputed"
    interval, note = checked_interval(low[0], high[0], unit, len(places), different, how)
    p = _exchange_p(metric, baseline, steered, places, observed, generator, (resamples, most))
    base = metric(list(baseline))
    effect = Effect(observed / abs(base), "relative change") if base else None
    return Comparison(observed, interval, Test(p, f"exchange of {unit}"), effect, note)


def _drawn(places: Sequence[Integers], units: Sequence[int] | Integers) -> list[tuple[int, int]]:
    """The examples of the drawn units, each with the number of times that its unit was drawn before."""
    times: Counter[int] = Counter()
    drawn = []
    for unit in map(int, units):
        drawn += [(k, times[unit]) for k in places[unit].tolist()]
        times[unit] += 1
    return drawn


def _items(items: Sequence[Any], drawn: Sequence[tuple[int, int]]) -> list[Any]:
    """Their items; repeated draws get new question ids, since some metrics (MME) group by question."""
    return [items[k] if not again else _renamed(items[k], again) for k, again in drawn]


def _renamed(item: Any, again: int) -> Any:
    if isinstance(item, dict) and "question_id" in item:
        return item | {"question_id": f"{item['question_id']} drawn again {again}"}
    return item


def _exchange_p(
    metric: Callable[[list[Any]], float],
    baseline: Sequence[Any],
    steered: Sequence[Any],
    places: Sequence[Integers],
    observed: float,
    generator: np.random.Generator,
    draws: tuple[int, int],
) -> float:
    beyond, done = 0, 0
    while done < draws[0] or (not beyond and done < draws[1]):
        done += 1
        first, second = list(baseline), list(steered)
        for unit in np.flatnonzero(generator.integers(0, 2, len(places))).tolist():
            for k in places[unit]:
                first[k], second[k] = second[k], first[k]
        drawn = metric(second) - metric(first)
        beyond += not abs(drawn) < abs(observed) - 1e-12  # an undefined draw counts as an extreme one
    return (1 + beyond) / (done + 1)


def _members(n: int, clusters: Integers | None) -> list[Integers]:
    if clusters is None:
        return [np.array([place]) for place in range(n)]
    order = np.argsort(clusters, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1)
