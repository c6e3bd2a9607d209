"""Simulated coverage and error rates of the verdicts that `study`, `verify`, `compare` and `spike-in` print.

    python benchmarks/coverage.py [DATA_SETS]

Each line draws many data sets from a population whose true gain is known, and judges them by
`hones_eval.stats.verdicts`, the rule behind every printed verdict. Columns:

coverage   how often the printed 95 % interval holds the true gain (should be near 0.95 or above)
alone      how often one row with no true gain gets a verdict (should be at most 0.05)
report     how often a report of 14 such rows has any verdict, corrected by Holm (at most 0.05)
before     how often the former rule, a BCa interval without zero, gave that one row a verdict
found      how often a true gain as large as the row's stated smallest detectable gain gets a verdict
           (should be near 0.8 or above)
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hones_eval.stats.paired import bca_of_means
from hones_eval.stats.power import detectable_right_wrong
from hones_eval.stats.verdicts import Contrast, contrasts_of_values, judge

Floats = NDArray[np.float64]
ROWS = 14
RESAMPLES = 999


class Population(NamedTuple):
    """How to draw a baseline [n] and conditions [n, rows] whose true gain is given."""

    name: str
    draw: Callable[[np.random.Generator, int, int, float], tuple[Floats, Floats]]
    gain: float
    """A true gain for the column `coverage`; the others but `found` use 0."""


def right_wrong(changed: float) -> Callable[[np.random.Generator, int, int, float], tuple[Floats, Floats]]:
    """Answers that are right or wrong; `changed` of them change, or as many as the gain needs."""

    def draw(generator: np.random.Generator, n: int, rows: int, gain: float) -> tuple[Floats, Floats]:
        share = max(changed, gain)
        up, down = (share + gain) / 2, (share - gain) / 2
        moves = generator.choice([1, -1, 0], (n, rows), p=[up, down, 1 - up - down])
        # Every answer can move either way: the baseline is drawn so that the move is possible.
        baseline = np.zeros(n)
        return baseline, moves.astype(float)

    return draw


def graded(generator: np.random.Generator, n: int, rows: int, gain: float) -> tuple[Floats, Floats]:
    """Graded scores: a quarter of them move by any amount, and all gain the same."""
    baseline = generator.beta(2, 1, n)
    moved = generator.random((n, rows)) < 0.25
    moves = generator.normal(0.0, 0.2, (n, rows))
    return baseline, baseline[:, None] + np.where(moved, moves, 0.0) + gain


POPULATIONS = (
    Population("right/wrong, 2 % change", right_wrong(0.02), 0.01),
    Population("right/wrong, 10 % change", right_wrong(0.1), 0.04),
    Population("right/wrong, 30 % change", right_wrong(0.3), 0.1),
    Population("graded, 25 % change", graded, 0.03),
)


def judged(baseline: Floats, conditions: Floats, seed: int) -> list[Contrast]:
    """Verdicts of moves [n, rows] of answers that are right or wrong, or of graded scores."""
    if np.isin(conditions, (-1, 0, 1)).all():
        columns = []
        for column in conditions.T:
            before, after = (column < 0).astype(float), (column > 0).astype(float)
            columns += contrasts_of_values(before, after[:, None], resamples=RESAMPLES, seed=seed)
        return columns
    return contrasts_of_values(baseline, conditions, resamples=RESAMPLES, seed=seed)


def line(population: Population, n: int, sets: int) -> str:
    """One line of the table."""
    generator = np.random.default_rng(0)
    covered = alone = reports = before = 0
    for number in range(sets):
        (row,) = judge(judged(*population.draw(generator, n, 1, population.gain), number))
        covered += row.low <= population.gain <= row.high
        baseline, conditions = population.draw(generator, n, ROWS, 0.0)
        contrasts = judged(baseline, conditions, number)
        alone += judge(contrasts[:1])[0].verdict in ("better", "worse")
        reports += any(one.verdict in ("better", "worse") for one in judge(contrasts))
        differences = (conditions - baseline[:, None])[:, :1]
        low, high = bca_of_means(differences, np.ones(n), seed=number, resamples=RESAMPLES)
        before += bool(low[0] > 0 or high[0] < 0)
    found = _found(population, n, max(100, sets // 2))
    rates = [covered, alone, reports, before]
    return f"{population.name:26s} {n:5d} " + " ".join(f"{rate / sets:9.3f}" for rate in rates) + f" {found}"


def _found(population: Population, n: int, sets: int) -> str:
    """The share of verdicts where the true gain is the smallest that a report of 14 rows states."""
    if population.name.startswith("graded"):
        generator = np.random.default_rng(1)
        contrasts = judged(*population.draw(generator, 20 * n, 1, 0.0), 0)
        large = contrasts[0].detectable(0.05 / ROWS)
        smallest = None if large is None else large * 20**0.5  # the same spread with n examples
    else:
        share = float(population.name.split(",")[1].split("%")[0]) / 100
        smallest = detectable_right_wrong(n, share, 0.05 / ROWS)
    if smallest is None:
        return "     none"
    generator = np.random.default_rng(2)
    hits = 0
    for number in range(sets):
        contrasts = judged(*population.draw(generator, n, 1, smallest), number)
        p = contrasts[0].comparison.test
        hits += p is not None and p.p < 0.05 / ROWS
    return f"{hits / sets:9.3f} at {smallest:.3f}"


def main() -> None:
    """Print the table."""
    sets = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print(f"{sets} data sets per line; reports of {ROWS} rows")
    columns = ("n", "coverage", "alone", "report", "before", "found")
    print(f"{'population':26s} {columns[0]:>5s} " + " ".join(f"{name:>9s}" for name in columns[1:]))
    for population in POPULATIONS:
        for n in (50, 200):
            print(line(population, n, sets), flush=True)


if __name__ == "__main__":
    main()
