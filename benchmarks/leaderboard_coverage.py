"""How often the board's 95 % intervals hold the truth, and its tests reject a true null, by simulation.

Each line draws many data sets from a population whose true difference is known, and applies the board's own
functions. Coverage should be near 0.95 and rejections of a true null at most 0.05. Takes the number of data
sets a line as its argument.
"""

import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hones_eval.stats.corpus import compare_corpus
from hones_eval.stats.paired import (
    bca_of_means,
    bonett_price,
    cluster_sums,
    interval_ends,
    mcnemar_exact,
    sign_flip_p,
)

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int], Floats]
RESAMPLES = 1999


def right_wrong(gained: float, lost: float) -> Draw:
    def draw(generator: np.random.Generator, n: int, sets: int) -> Floats:
        return generator.choice([1.0, -1.0, 0.0], (n, sets), p=[gained, lost, 1 - gained - lost])

    return draw


def soft(shift: float) -> Draw:
    """VQA's soft accuracy: most answers keep their score, some move by thirds."""

    def draw(generator: np.random.Generator, n: int, sets: int) -> Floats:
        moves = np.array([0, 0.3, -0.3, 0.6, -0.6, 1.0])
        return generator.choice(moves, (n, sets), p=[0.7, 0.08, 0.08, 0.05, 0.05, 0.04]) + shift

    return draw


def skewed(generator: np.random.Generator, n: int, sets: int) -> Floats:
    """Rare large gains: nine in ten unchanged, the rest exponential."""
    return np.where(generator.random((n, sets)) < 0.1, generator.exponential(0.5, (n, sets)), 0.0)


def seldom(rate: float, moves: list[float]) -> Draw:
    """Most examples keep their score to the letter; `rate` of them make one of the moves."""

    def draw(generator: np.random.Generator, n: int, sets: int) -> Floats:
        drawn = generator.choice(moves, (n, sets))
        return np.where(generator.random((n, sets)) < rate, drawn, 0.0)

    return draw


def main(sets: int = 1000) -> None:
    error = 1.96 * np.sqrt(0.95 * 0.05 / sets)
    print(f"{sets:,} data sets a line; simulation error ±{error:.3f}")
    print(f"{'':52s}{'n':>5s} {'coverage':>9s} {'rejects':>8s}")
    for n in (20, 50, 200, 1000):
        for gained, lost in ((0.1, 0.1), (0.15, 0.05), (0.02, 0.02)):
            _right_wrong(n, gained, lost, sets)
    for n in (10, 20, 30, 50, 200, 1000):
        _graded("soft scores", soft(-0.04), n, 0.0, sets)
        _graded("rare large gains", skewed, n, 0.05, sets)
    for name, moves in (("up or down", [0.3, -0.3, 0.6, -0.6]), ("mostly down", [0.3, -0.3, -0.6, -1.0])):
        for different in (3, 6, 12, 25, 50):
            draw, truth = seldom(different / 1000, moves), different / 1000 * float(np.mean(moves))
            _graded(f"about {different} of 1,000 differ, {name}", draw, 1000, truth, sets)
    for images in (10, 20, 50, 200):
        _clustered(images, 5, sets)
    for n in (20, 40, 100, 400):
        _f1(n, min(sets, 400))


def _report(name: str, n: int, coverage: float | None, rejects: float | None) -> None:
    columns = [f"{value:.3f}" if value is not None else "" for value in (coverage, rejects)]
    print(f"{name:52s}{n:5d} {columns[0]:>9s} {columns[1]:>8s}", flush=True)


def _right_wrong(n: int, gained: float, lost: float, sets: int) -> None:
    drawn = right_wrong(gained, lost)(np.random.default_rng(n), n, sets)
    ups, downs = (drawn == 1).sum(axis=0), (drawn == -1).sum(axis=0)
    truth = gained - lost
    intervals = [bonett_price(int(up), int(down), n) for up, down in zip(ups, downs, strict=True)]
    held = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    p = [mcnemar_exact(int(up), int(down)) for up, down in zip(ups, downs, strict=True)]
    rejects = np.mean(np.array(p) < 0.05) if truth == 0 else None
    name = f"right/wrong {gained:.2f} gained {lost:.2f} lost"
    _report(f"{name}, Bonett-Price", n, held, rejects)
    _report(f"{name}, BCa instead", n, _coverage(drawn, None, truth, shown=False), None)


def _graded(name: str, draw: Draw, n: int, truth: float, sets: int) -> None:
    drawn = draw(np.random.default_rng(n), n, sets)
    centred = draw(np.random.default_rng(n + 1), n, sets) - truth
    rejects = np.mean(sign_flip_p(centred, seed=0, resamples=RESAMPLES) < 0.05) if truth == 0 else None
    _report(name, n, _coverage(drawn, None, truth), rejects)
    _report("  the same, BCa alone", n, _coverage(drawn, None, truth, shown=False), None)


def _clustered(images: int, questions: int, sets: int) -> None:
    """Questions on an image move together: half of the variance is the image's."""
    generator = np.random.default_rng(images)
    shared = np.repeat(generator.normal(0, 0.3, (images, sets)), questions, axis=0)
    drawn = shared + generator.normal(0, 0.3, (images * questions, sets))
    groups = np.repeat(np.arange(images), questions)
    sums, _ = cluster_sums(drawn, groups)
    rejects = np.mean(sign_flip_p(sums, seed=0, resamples=RESAMPLES) < 0.05)
    n = images * questions
    _report(
        f"{questions} questions per image, {images} images",
        n,
        _coverage(drawn, groups, 0.0),
        rejects,
    )
    naive = np.mean(sign_flip_p(drawn, seed=0, resamples=RESAMPLES) < 0.05)
    _report("  the same as if independent (wrong)", n, _coverage(drawn, None, 0.0), naive)


def _coverage(drawn: Floats, groups: NDArray[np.int64] | None, truth: float, *, shown: bool = True) -> float:
    """Of the interval that is shown (BCa, joined with t where there is little to go by), or of BCa alone."""
    ends = interval_ends if shown else bca_of_means
    held = 0
    for start in range(0, drawn.shape[1], 200):
        sums, sizes = cluster_sums(drawn[:, start : start + 200], groups)
        low, high = ends(sums, sizes, seed=start, resamples=RESAMPLES)
        same = np.isnan(
            low
        )  # every difference equal: the board shows no interval; counted as a miss unless true
        held += int(
            np.where(
                same, np.isclose(drawn[0, start : start + 200], truth), (low <= truth) & (truth <= high)
            ).sum()
        )
    return held / drawn.shape[1]


def _f1(n: int, sets: int) -> None:
    """F1 of yes/no answers, baseline right in 0.7 and steered in 0.8 of the cases, half of the golds yes."""
    generator = np.random.default_rng(n)
    truth = 0.8 - 0.7  # with balanced golds and errors, F1 of the population is the share of right answers
    held, rejects = 0, 0
    for k in range(sets):
        gold = generator.random(n) < 0.5
        pairs = [_items(gold, generator.random(n) < right) for right in (0.7, 0.8, 0.7)]
        found = compare_corpus(_f1_of, pairs[0], pairs[1], seed=k, resamples=399).interval
        held += found is not None and found.low <= truth <= found.high
        test = compare_corpus(_f1_of, pairs[0], pairs[2], seed=k, resamples=399).test
        rejects += test is not None and test.p < 0.05
    _report("F1, metric recomputed, exchange", n, held / sets, rejects / sets)


def _items(gold: NDArray[np.bool_], right: NDArray[np.bool_]) -> list[tuple[bool, bool]]:
    return list(zip((gold == right).tolist(), gold.tolist(), strict=True))


def _f1_of(items: list[tuple[bool, bool]]) -> float:
    hits = sum(guess and gold for guess, gold in items)
    wrong = sum(guess != gold for guess, gold in items)
    return 2 * hits / (2 * hits + wrong) if hits else 0.0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
