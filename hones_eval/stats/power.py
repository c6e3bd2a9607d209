"""Power of the paired tests: the smallest detectable difference, and the examples that a difference needs.

The level `alpha` is two-sided. For a comparison that is corrected over `m` rows it is `0.05 / m`, the level
that Holm's method applies to the smallest p-value.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

POWER = 0.8
MOST_EXAMPLES = 10_000_000


def mcnemar_power(n: int, gained: float, lost: float, alpha: float = 0.05) -> float:
    """The probability that McNemar's exact test on `n` examples rejects at level `alpha`.

    Args:
        n: the number of independent examples.
        gained: the probability that an example goes from wrong to right.
        lost: the probability that an example goes from right to wrong.
        alpha: the two-sided level.

    The number of changed answers is binomial. Given that number, the test rejects if the smaller side is at
    most its critical value, so the power is a sum over the numbers of changed answers.
    """
    changed = gained + lost
    if changed <= 0 or n < 1:
        return 0.0
    low, high = stats.binom.ppf([1e-10, 1 - 1e-10], n, min(changed, 1.0))
    counts = np.arange(max(1, int(low)), int(high) + 1)
    critical = stats.binom.ppf(alpha / 2, counts, 0.5)
    critical = np.where(stats.binom.cdf(critical, counts, 0.5) > alpha / 2, critical - 1, critical)
    share = gained / changed
    rejects = stats.binom.cdf(critical, counts, share) + stats.binom.sf(counts - critical - 1, counts, share)
    rejects = np.where(critical < 0, 0.0, rejects)
    return float((stats.binom.pmf(counts, n, min(changed, 1.0)) * rejects).sum())


def detectable_right_wrong(n: int, changed: float, alpha: float = 0.05, power: float = POWER) -> float | None:
    """The smallest true difference that McNemar's exact test finds with probability `power`.

    Args:
        n: the number of examples.
        changed: the share of examples whose answer changes, in either direction. A difference above it is
            taken to be made of gains alone.
        alpha: the two-sided level, after correction.
        power: the probability to find the difference.

    Returns: the difference, or None if even a gain on every example would not be found.

    Examples:
        >>> round(detectable_right_wrong(100, 0, alpha=0.05 / 260), 3)
        0.167
    """

    def found(difference: float) -> float:
        gained, lost = _split(difference, changed)
        return mcnemar_power(n, gained, lost, alpha)

    return _smallest(found, power)


def detectable_mean(error: float, units: int, alpha: float = 0.05, power: float = POWER) -> float | None:
    """The smallest true mean difference that a paired test finds with probability `power`.

    Args:
        error: the standard error of the mean difference.
        units: the number of independent units (examples, or images that several examples share).
        alpha: the two-sided level, after correction.
        power: the probability to find the difference.
    """
    if units < 2 or not math.isfinite(error):
        return None
    quantiles = stats.t.ppf([1 - alpha / 2, power], units - 1)
    return float(quantiles.sum() * error)


def examples_for_right_wrong(
    difference: float, changed: float, alpha: float = 0.05, power: float = POWER
) -> int | None:
    """The number of examples that McNemar's exact test needs to find a difference; None above ten million.

    The power of an exact test is not monotone: it drops a little where a critical value moves. The result is
    a number from which on the power stays at least `power` for the next 5 % of sizes.
    """
    gained, lost = _split(difference, changed)

    def enough(n: int) -> bool:
        sizes = np.unique(np.linspace(n, 1.05 * n, 6).astype(int))
        return all(mcnemar_power(int(size), gained, lost, alpha) >= power for size in sizes)

    return _fewest(enough)


def examples_for_mean(difference: float, deviation: float, alpha: float = 0.05, power: float = POWER) -> int:
    """The number of examples that a paired z test needs: `((z_a + z_b) * sd / difference)^2` (Miller 2024).

    `deviation` is the standard deviation of the paired differences. The result is that of
    `lmms-eval power`.
    """
    quantiles = stats.norm.ppf([1 - alpha / 2, power])
    return math.ceil((float(quantiles.sum()) * deviation / difference) ** 2)


def _split(difference: float, changed: float) -> tuple[float, float]:
    """The shares of gained and lost answers of a true difference."""
    if difference >= changed:
        return difference, 0.0
    return (changed + difference) / 2, (changed - difference) / 2


def _smallest(found: Callable[[float], float], power: float) -> float | None:
    """The smallest difference in (0, 1] at which `found` reaches `power`, by bisection."""
    low, high = 0.0, 1.0
    if found(high) < power:
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return high


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """The smallest number at which `enough` is true, by doubling and bisection."""
    high = 2
    while not enough(high):
        high *= 2
        if high > MOST_EXAMPLES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
