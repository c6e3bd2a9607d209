"""Paired comparisons of two runs on the same examples, as pure functions on arrays.

Columns are comparisons: the functions for graded scores take differences `[n, m]`, one column for each of
`m` comparisons on the same `n` examples, so that a thousand runs share one set of resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Draw = Literal["bootstrap", "signs"]
# With fewer units, or fewer that differ, BCa intervals cover the truth clearly less than 95 % of the time. t
# intervals mostly reach 95 %, but in skewed data BCa extends further to one side. So the interval is then the
# smallest that contains both; benchmarks/leaderboard_coverage.py measures its coverage.
FEW_UNITS, FEW_DIFFERENT = 100, 25
CHUNK = 2_000_000  # entries of the matrix of resampling weights held in memory at once


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a difference, with the name of its method."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Test:
    """A two-sided p-value, with the name of its test."""

    p: float
    method: str


@dataclass(frozen=True)
class Effect:
    """An effect size, with its name."""

    value: float
    name: str


@dataclass(frozen=True)
class Comparison:
    """Steered minus baseline. A figure that could not be computed is None, and `note` says why."""

    difference: float
    interval: Interval | None
    test: Test | None
    effect: Effect | None
    note: str = ""


def compare_right_wrong(baseline: Floats, steered: Floats, *, level: float = 0.95) -> Comparison:
    """Compare answers that are right (1) or wrong (0), `[n]` each, of independent examples.

    Test: McNemar's exact test. Interval: Bonett and Price (2012), the adjusted Wald interval of a paired
    difference of proportions. Effect: Cohen's g, the gained share of changed answers, minus 1/2.
    """
    gained = int(((steered == 1) & (baseline == 0)).sum())
    lost = int(((steered == 0) & (baseline == 1)).sum())
    n = len(baseline)
    effect = Effect(gained / (gained + lost) - 0.5, "Cohen's g") if gained + lost else None
    test = Test(mcnemar_exact(gained, lost), "McNemar exact")
    return Comparison((gained - lost) / n, bonett_price(gained, lost, n, level=level), test, effect)


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: a fair coin for each answer that changed (McNemar 1947)."""
    changed = gained + lost
    return 1.0 if changed == 0 else float(min(1.0, 2 * stats.binom.cdf(min(gained, lost), changed, 0.5)))


def bonett_price(gained: int, lost: int, n: int, *, level: float = 0.95) -> Interval:
    """Adjusted Wald interval of a paired difference of proportions (Bonett and Price 2012)."""
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = stats.norm.ppf(0.5 + level / 2) * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Interval(float(max(-1, up - down - half)), float(min(1, up - down + half)), "Bonett-Price")


def compare_graded(
    differences: Floats,
    clusters: Integers | None = None,
    *,
    seed: int = 0,
    resamples: int = 9999,
    level: float = 0.95,
) -> list[Comparison]:
    """Compare graded scores, one comparison for each column of `differences` `[n, m]` (steered - baseline).

    Interval: BCa bootstrap (Efron 1987) of the mean difference, over examples, or over whole clusters
    (images) if `clusters` `[n]` numbers them; with few of these, or few that differ, the smallest interval
    that contains both the BCa and the t interval (`interval_ends`). Test: random sign flips of examples or
    clusters (Fisher's paired randomization test). Effect: Cohen's d_z, the mean over the standard deviation.
    """
    sums, sizes = cluster_sums(differences, clusters)
    means = differences.mean(axis=0)
    low, high = interval_ends(sums, sizes, seed=seed, resamples=resamples, level=level)
    different = (sums != 0).sum(axis=0)
    p = sign_flip_p(sums, seed=seed, resamples=resamples)
    spread = differences.std(axis=0, ddof=1) if len(differences) > 1 else np.zeros(differences.shape[1])
    unit = "examples" if clusters is None else "images"
    found = []
    for k, mean in enumerate(means):
        interval, note = checked_interval(low[k], high[k], unit, len(sums), int(different[k]))
        effect = Effect(float(mean / spread[k]), "Cohen's d_z") if spread[k] > 0 else None
        found.append(
            Comparison(float(mean), interval, Test(float(p[k]), f"sign flips of {unit}"), effect, note)
        )
    return found


def interval_ends(
    sums: Floats, sizes: Floats, *, seed: int, resamples: int, level: float = 0.95
) -> tuple[Floats, Floats]:
    """The interval of `sum(sums) / sum(sizes)` shown on a board, for each column of `sums` `[c, m]`.

    Returns: lower and upper ends `[m]` of the BCa interval; where `are_few`, of BCa and t at once.
    """
    bca = bca_of_means(sums, sizes, seed=seed, resamples=resamples, level=level)
    joined = both(bca, t_of_means(sums, sizes, level=level))
    few = are_few(len(sums), (sums != 0).sum(axis=0))
    return np.where(few, joined[0], bca[0]), np.where(few, joined[1], bca[1])


def are_few(units: int, different: Integers | int) -> NDArray[np.bool_]:
    """Whether there are too few units, or too few that differ, for a BCa interval alone."""
    return np.asarray(np.minimum(units / FEW_UNITS, np.asarray(different) / FEW_DIFFERENT) < 1)


def checked_interval(
    low: float, high: float, unit: str, units: int, different: int, how: str = ""
) -> tuple[Interval | None, str]:
    """An interval from its ends, with a note; None if the ends are not finite.

    `different` of the `units` (examples or images, as `unit` says) differ; `how` ends the method's name.
    """
    if not np.isfinite(low + high):
        return None, "no interval: every difference is the same"
    name = "BCa bootstrap and t" if are_few(units, different) else "BCa bootstrap"
    note = f"only {different} of {units:,} {unit} differ: the interval can be too narrow"
    interval = Interval(float(low), float(high), f"{name} over {unit}{how}")
    return interval, note if different < FEW_DIFFERENT else ""


def both(first: tuple[Floats, Floats], second: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """The ends of the smallest intervals that contain two intervals each; NaN where either is NaN."""
    return np.minimum(first[0], second[0]), np.maximum(first[1], second[1])


def t_of_means(sums: Floats, sizes: Floats, *, level: float = 0.95) -> tuple[Floats, Floats]:
    """Student's t interval of `sum(sums) / sum(sizes)`, for each column of `sums` `[c, m]`.

    With units of several sizes the standard error is that of a ratio, linearized (Cochran 1977, 2.39).
    Returns: lower and upper ends `[m]`.
    """
    units, total = len(sums), sizes.sum()
    if units < 2:
        nothing = np.full(sums.shape[1], np.nan)
        return nothing, nothing
    mean = sums.sum(axis=0) / total
    residuals = sums - mean * sizes[:, None]
    error = np.sqrt(units / (units - 1) * (residuals**2).sum(axis=0)) / total
    half = stats.t.ppf(0.5 + level / 2, units - 1) * error
    return mean - half, mean + half


def t_of_jackknife(statistic: float, jackknife: Floats, *, level: float = 0.95) -> tuple[Floats, Floats]:
    """Student's t interval of a statistic from its jackknife values `[c]` (Tukey 1958); ends `[1]`."""
    units = len(jackknife)
    error = np.sqrt((units - 1) / units * ((jackknife - jackknife.mean()) ** 2).sum())
    half = stats.t.ppf(0.5 + level / 2, units - 1) * error
    return np.array([statistic - half]), np.array([statistic + half])


def cluster_sums(differences: Floats, clusters: Integers | None) -> tuple[Floats, Floats]:
    """Sums `[c, m]` of `differences` `[n, m]` within clusters, and their sizes `[c]`."""
    if clusters is None:
        return differences, np.ones(len(differences))
    _, codes = np.unique(clusters, return_inverse=True)
    sums = np.zeros((codes.max() + 1, differences.shape[1]))
    np.add.at(sums, codes, differences)
    return sums, np.bincount(codes).astype(np.float64)


def bca_of_means(
    sums: Floats, sizes: Floats, *, seed: int, resamples: int, level: float = 0.95
) -> tuple[Floats, Floats]:
    """BCa bootstrap interval (Efron 1987) of `sum(sums) / sum(sizes)`, for each column of `sums` `[c, m]`.

    Returns: lower and upper ends `[m]`; NaN for a column in which all units have one mean.
    """
    boot = weighted_sums(np.column_stack([sums, sizes]), draw="bootstrap", seed=seed, resamples=resamples)
    total = sizes.sum()
    return bca_ends(
        statistic=sums.sum(axis=0) / total,
        boot=boot[:, :-1] / boot[:, -1:],
        jackknife=(sums.sum(axis=0) - sums) / (total - sizes)[:, None] if len(sums) > 1 else sums,
        level=level,
    )


def bca_ends(
    statistic: Floats, boot: Floats, jackknife: Floats, *, level: float = 0.95
) -> tuple[Floats, Floats]:
    """The ends of BCa intervals from bootstrap `[R, m]` and jackknife `[c, m]` values of a statistic `[m]`.

    Source: Efron and Tibshirani 1993, equations 14.9 to 14.15; ties count half in the bias correction.
    """
    share = (boot < statistic).mean(axis=0) / 2 + (boot <= statistic).mean(axis=0) / 2
    bias = special.ndtri(np.clip(share, 1 / (2 * len(boot)), 1 - 1 / (2 * len(boot))))
    influence = jackknife.mean(axis=0) - jackknife
    squares = (influence**2).sum(axis=0)
    constant = squares <= 1e-24 * len(jackknife)
    acceleration = (influence**3).sum(axis=0) / (6 * np.where(constant, 1, squares) ** 1.5)
    ordered = np.sort(boot, axis=0)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + special.ndtri(tail)
        rank = special.ndtr(bias + z / (1 - acceleration * z)) * (len(boot) - 1)
        ends.append(np.where(constant, np.nan, _interpolated(ordered, rank)))
    return ends[0], ends[1]


def _interpolated(ordered: Floats, rank: Floats) -> Floats:
    below = np.clip(np.floor(rank).astype(np.int64), 0, len(ordered) - 1)
    above = np.minimum(below + 1, len(ordered) - 1)
    columns = np.arange(ordered.shape[1])
    part = rank - below
    return np.asarray(ordered[below, columns] * (1 - part) + ordered[above, columns] * part)


def sign_flip_p(sums: Floats, *, seed: int, resamples: int) -> Floats:
    """Two-sided p `[m]` of the paired randomization test: the sign of every row of `sums` `[c, m]` at random.

    The observed signs count as one of the draws, so p is at least `1 / (resamples + 1)`.
    """
    observed = np.abs(sums.sum(axis=0))
    drawn = np.abs(weighted_sums(sums, draw="signs", seed=seed, resamples=resamples))
    tolerance = 1e-9 * np.maximum(np.abs(sums).sum(axis=0), 1e-300)
    return np.asarray((1 + (drawn >= observed - tolerance).sum(axis=0)) / (resamples + 1))


def weighted_sums(values: Floats, *, draw: Draw, seed: int, resamples: int) -> Floats:
    """Sums `[resamples, m]` of `values` `[n, m]`, weighted by how often drawn, or by random signs."""
    generator = np.random.default_rng([seed, len(values), draw == "signs"])
    rows = max(1, CHUNK // max(1, len(values)))
    found = np.empty((resamples, values.shape[1]))
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        weights = (
            _counts(generator, size, len(values))
            if draw == "bootstrap"
            else _signs(generator, size, len(values))
        )
        found[start : start + size] = weights @ values
    return found


def _counts(generator: np.random.Generator, size: int, n: int) -> Floats:
    drawn = generator.integers(0, n, size=(size, n), dtype=np.int32)
    drawn += (np.arange(size, dtype=np.int32) * n)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _signs(generator: np.random.Generator, size: int, n: int) -> Floats:
    bits = np.unpackbits(generator.integers(0, 256, size=(size, -(-n // 8)), dtype=np.uint8), axis=1)[:, :n]
    return bits.astype(np.float64) * 2 - 1


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): p-values corrected for the whole family of tests."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    ahead = 0.0
    for place, k in enumerate(order):
        ahead = max(ahead, min(1.0, (len(p) - place) * p[k]))
        adjusted[k] = ahead
    return [float(value) for value in adjusted]
