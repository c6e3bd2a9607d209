"""Paired intervals of contrasts between the metrics of several conditions on the same examples."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from hones_eval.stats.paired import Floats, Integers, bca_ends, cluster_sums, weighted_sums

BLOCKS = 50  # of images left out in turn by the jackknife of a recomputed metric


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; a missing one is None, and `note` says why."""

    value: float | None
    low: float | None
    high: float | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {name: value for name, value in asdict(self).items() if name != "note" or value}


@dataclass(frozen=True, eq=False)
class Resampled:
    """A metric of `c` conditions: on all examples [c], on resamples [R, c], and jackknife values [b, c]."""

    observed: Floats
    boot: Floats
    jackknife: Floats

    def estimate(self, contrast: Callable[[Floats], Floats]) -> Estimate:
        """The contrast of the conditions, a function over the last axis, with its BCa interval (Efron 1987).

        Conditions are resampled together, so the interval is paired.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            value, boot, jackknife = (contrast(part) for part in (self.observed, self.boot, self.jackknife))
        if not np.isfinite(value):
            return Estimate(None, None, None, "undefined: it divides by a metric of zero")
        if len(self.jackknife) < 2 or not (np.isfinite(boot).all() and np.isfinite(jackknife).all()):
            return Estimate(float(value), None, None, "no interval: undefined on some resamples")
        low, high = bca_ends(np.array([value]), boot[:, None], jackknife[:, None])
        if not np.isfinite(low[0] + high[0]):
            return Estimate(
                float(value), None, None, "no interval: leaving out any single image changes nothing"
            )
        return Estimate(float(value), float(low[0]), float(high[0]))


def resample_means(values: Floats, clusters: Integers, *, seed: int = 0, resamples: int = 9999) -> Resampled:
    """Means of `values` [n, c], by a bootstrap of whole images; `clusters` [n] numbers them."""
    sums, sizes = cluster_sums(values, clusters)
    boot = weighted_sums(np.column_stack([sums, sizes]), draw="bootstrap", seed=seed, resamples=resamples)
    left = (sizes.sum() - sizes)[:, None]
    jackknife = (sums.sum(axis=0) - sums)[left[:, 0] > 0] / left[left[:, 0] > 0]
    return Resampled(sums.sum(axis=0) / sizes.sum(), boot[:, :-1] / boot[:, -1:], jackknife)


def resample_metric(
    metric: Callable[[list[Any]], float],
    items: Sequence[Sequence[Any]],
    clusters: Integers,
    *,
    seed: int = 0,
    resamples: int = 199,
) -> Resampled:
    """A corpus metric, recomputed on every resample; `items` are [c] lists of [n].

    The acceleration comes from a jackknife over at most 50 blocks of images.
    """
    members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    generator = np.random.default_rng([seed, len(clusters), 3])

    def values(units: Sequence[int] | Integers) -> list[float]:
        chosen = np.concatenate([members[unit] for unit in units]).tolist()
        return [metric([condition[k] for k in chosen]) for condition in items]

    everything = np.arange(len(members))
    boot = [values(generator.integers(0, len(members), len(members))) for _ in range(resamples)]
    blocks = np.array_split(generator.permutation(everything), min(BLOCKS, len(members)))
    left_out = [values(np.setdiff1d(everything, block)) for block in blocks if len(block) < len(members)]
    jackknife = np.array(left_out).reshape(-1, len(items))
    return Resampled(np.array(values(everything)), np.array(boot), jackknife)


def resample_results(
    metric: str,
    aggregate: Callable[[list[Any]], float],
    results: Sequence[Sequence[dict[str, Any]]],
    clusters: Integers,
    *,
    seed: int = 0,
    resamples: int = 9999,
) -> Resampled:
    """A task's metric of `c` conditions from their results [c] of [n] examples.

    By means if the metric is the mean of the examples' values (or 100 times that), else by recomputing it on
    at most 199 resamples.
    """
    found = example_values(metric, aggregate, results)
    if found is not None:
        return resample_means(found.values * found.scale, clusters, seed=seed, resamples=resamples)
    return resample_metric(aggregate, results, clusters, seed=seed, resamples=min(resamples, 199))


class ExampleValues(NamedTuple):
    """A metric that is a mean: values [n, c] of `n` examples under `c` conditions, and the mean's factor."""

    values: Floats
    scale: float


def example_values(
    metric: str, aggregate: Callable[[list[Any]], float], results: Sequence[Sequence[dict[str, Any]]]
) -> ExampleValues | None:
    """The values whose mean, times 1 or 100, is the metric of every condition; None for a corpus metric."""
    observed = [aggregate(list(condition)) for condition in results]
    values = np.array([[_number(result.get(metric)) for result in condition] for condition in results]).T
    for scale in (1.0, 100.0):
        if np.allclose(values.mean(axis=0) * scale, observed, rtol=1e-6, atol=1e-9):
            return ExampleValues(values, scale)
    return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, Real) else float("nan")
