"""The paired statistics against computations that share no code with them."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from hones_eval.stats import paired as paired
from hones_eval.stats.corpus import compare_corpus


def fair_coin_p(gained: int, lost: int) -> float:
    """Two-sided McNemar by counting: the share of all coin sequences at least as uneven."""
    changed = gained + lost
    far = abs(gained - lost)
    beyond = sum(math.comb(changed, heads) for heads in range(changed + 1) if abs(2 * heads - changed) >= far)
    return beyond / 2**changed


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 6), (7, 1), (5, 5), (14, 31), (200, 130)])
def test_mcnemar_is_the_count_of_coin_sequences(gained: int, lost: int) -> None:
    assert paired.mcnemar_exact(gained, lost) == pytest.approx(fair_coin_p(gained, lost), rel=1e-9)


def test_bonett_price_by_hand() -> None:
    """One gained, seven lost of 21: (1+1)/23 - (7+1)/23, with the Wald half-width on these."""
    interval = paired.bonett_price(1, 7, 21)
    half = 1.959964 * math.sqrt((2 / 23 + 8 / 23 - (6 / 23) ** 2) / 23)
    assert (interval.low, interval.high) == pytest.approx((-6 / 23 - half, -6 / 23 + half), abs=1e-6)


def test_no_change_is_still_uncertain() -> None:
    few, many = paired.bonett_price(0, 0, 20), paired.bonett_price(0, 0, 2000)
    assert few.low < -0.1
    assert few.high > 0.1
    assert -0.002 < many.low < 0 < many.high < 0.002


def test_right_wrong_counts_gains_and_losses() -> None:
    baseline = np.array([1, 1, 0, 0, 0, 1, 0, 1.0])
    steered = np.array([1, 0, 1, 1, 1, 1, 0, 1.0])
    found = paired.compare_right_wrong(baseline, steered)
    assert found.difference == pytest.approx(2 / 8)
    assert found.test is not None
    assert found.test.p == pytest.approx(fair_coin_p(3, 1))
    assert found.effect is not None
    assert found.effect.value == pytest.approx(3 / 4 - 1 / 2)


def every_sign_p(sums: Sequence[float]) -> float:
    """The paired randomization test with all sign patterns, one by one."""
    observed = abs(sum(sums))
    patterns = list(itertools.product((1, -1), repeat=len(sums)))
    beyond = sum(
        abs(sum(s * v for s, v in zip(signs, sums, strict=True))) >= observed - 1e-12 for signs in patterns
    )
    return beyond / len(patterns)


def test_sign_flips_come_to_the_p_of_all_patterns() -> None:
    sums = np.array([0.3, -0.1, 0.5, 0.2, 0.0, 0.4, -0.2, 0.6, 0.1, 0.3])
    found = paired.sign_flip_p(sums[:, None], seed=1, resamples=40_000)[0]
    assert found == pytest.approx(every_sign_p(sums.tolist()), abs=4 * math.sqrt(0.05 / 40_000))


def slow_bca(differences: list[float], groups: list[int], resamples: int, seed: int) -> tuple[float, float]:
    """BCa by the textbook, in loops: Efron and Tibshirani 1993, chapter 14, whole groups resampled."""
    members = {
        g: [d for d, h in zip(differences, groups, strict=True) if h == g] for g in sorted(set(groups))
    }
    names = list(members)
    generator = np.random.default_rng(seed)

    def mean(chosen: Sequence[int]) -> float:
        values = [d for g in chosen for d in members[g]]
        return sum(values) / len(values)

    observed = mean(names)
    boot = sorted(
        mean([names[k] for k in generator.integers(0, len(names), len(names))]) for _ in range(resamples)
    )
    below = sum(b < observed for b in boot) + sum(b == observed for b in boot) / 2
    z0 = stats.norm.ppf(below / resamples)
    left = [mean([g for g in names if g != out]) for out in names]
    centre = sum(left) / len(left)
    cubes, squares = sum((centre - v) ** 3 for v in left), sum((centre - v) ** 2 for v in left)
    a = cubes / (6 * squares**1.5)
    ends = []
    for tail in (0.025, 0.975):
        z = z0 + stats.norm.ppf(tail)
        ends.append(float(np.quantile(boot, stats.norm.cdf(z0 + z / (1 - a * z)))))
    return ends[0], ends[1]


def test_bca_ends_by_the_book() -> None:
    """Skewed enough for bias and acceleration to matter; the same resamples for both."""
    values = np.random.default_rng(1).exponential(1.0, 25)
    boot = np.random.default_rng(2).choice(values, (4000, 25)).mean(axis=1)
    left = np.array([np.delete(values, k).mean() for k in range(25)])
    low, high = paired.bca_ends(np.array([values.mean()]), boot[:, None], left[:, None])
    below = sum(b < values.mean() for b in boot) / 4000
    z0 = stats.norm.ppf(below)
    pulls = [left.mean() - one for one in left]
    a = sum(pull**3 for pull in pulls) / (6 * sum(pull**2 for pull in pulls) ** 1.5)
    assert a > 0.03
    book = []
    for tail in (0.025, 0.975):
        z = z0 + stats.norm.ppf(tail)
        book.append(np.quantile(boot, stats.norm.cdf(z0 + z / (1 - a * z))))
    assert (low[0], high[0]) == pytest.approx(book, rel=1e-9)


@pytest.mark.parametrize("clustered", [False, True])
def test_bca_agrees_with_a_slow_one(clustered: bool) -> None:
    generator = np.random.default_rng(3)
    differences = np.round(generator.exponential(0.3, 200 if clustered else 100) - 0.2, 3)
    groups = np.repeat(np.arange(100), 2)[generator.permutation(200)] if clustered else np.arange(100)
    sizes = np.unique(groups)
    assert len(sizes) == 100
    (found,) = paired.compare_graded(differences[:, None], groups if clustered else None, resamples=6000)
    low, high = slow_bca(differences.tolist(), groups.tolist(), 6000, seed=8)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=0.08 * (high - low))


def test_bca_agrees_with_scipy() -> None:
    differences = np.random.default_rng(5).gamma(1.0, 0.2, 80) - 0.15
    low, high = paired.bca_of_means(differences[:, None], np.ones(80), seed=0, resamples=9999)
    theirs = stats.bootstrap(
        (differences,), np.mean, n_resamples=9999, method="BCa", rng=1
    ).confidence_interval
    width = theirs.high - theirs.low
    assert (low[0], high[0]) == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)


def test_columns_are_compared_each_by_itself() -> None:
    columns = np.random.default_rng(0).normal(0.1, 0.5, (50, 3))
    together = paired.compare_graded(columns, resamples=999, seed=4)
    alone = [paired.compare_graded(columns[:, [k]], resamples=999, seed=4)[0] for k in range(3)]
    for one, other in zip(together, alone, strict=True):
        assert one.interval is not None
        assert other.interval is not None
        assert (one.interval.low, one.interval.high) == pytest.approx(
            (other.interval.low, other.interval.high)
        )
        assert one.test == other.test


def test_a_image_with_many_questions_counts_once() -> None:
    """Ten equal questions per image: the interval is that of the images, not ten times surer."""
    images = np.random.default_rng(2).normal(0.1, 0.5, 40)
    repeated, groups = np.repeat(images, 10), np.repeat(np.arange(40), 10)
    (of_images,) = paired.compare_graded(images[:, None], resamples=2000)
    (clustered,) = paired.compare_graded(repeated[:, None], groups, resamples=2000)
    (naive,) = paired.compare_graded(repeated[:, None], resamples=2000)
    widths = [one.interval.high - one.interval.low for one in (of_images, clustered, naive) if one.interval]
    assert widths[1] == pytest.approx(widths[0], rel=1e-9)
    assert widths[2] < 0.5 * widths[1]


def test_equal_differences_have_no_interval() -> None:
    (found,) = paired.compare_graded(np.zeros((30, 1)), resamples=99)
    assert found.interval is None
    assert found.note == "no interval: every difference is the same"
    assert found.test is not None
    assert found.test.p == 1.0


def f1(items: list[tuple[str, str]]) -> float:
    hits = sum(guess == gold == "yes" for guess, gold in items)
    wrong = sum((guess == "yes") != (gold == "yes") for guess, gold in items)
    return 2 * hits / (2 * hits + wrong) if hits else 0.0


def test_a_corpus_metric_is_recomputed_on_resamples() -> None:
    generator = np.random.default_rng(6)
    golds = ["yes" if one else "no" for one in generator.random(120) < 0.5]

    def answers(right: float) -> list[tuple[str, str]]:
        flip = {"yes": "no", "no": "yes"}
        drawn = generator.random(120) < right
        return [(gold if ok else flip[gold], gold) for gold, ok in zip(golds, drawn, strict=True)]

    baseline, steered = answers(0.6), answers(0.8)
    found = compare_corpus(f1, baseline, steered, resamples=1500, seed=1)
    assert found.difference == pytest.approx(f1(steered) - f1(baseline))
    rng = np.random.default_rng(99)
    boot = []
    for _ in range(1500):
        chosen = rng.integers(0, 120, 120)
        boot.append(f1([steered[k] for k in chosen]) - f1([baseline[k] for k in chosen]))
    low, high = np.quantile(boot, [0.025, 0.975])  # the percentile interval: BCa is near it here
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=0.15 * (high - low))
    assert found.interval.method == "BCa bootstrap over examples, metric recomputed"
    assert found.test is not None
    assert found.test.p < 0.05


def test_a_mean_as_corpus_metric_gives_the_interval_of_the_mean() -> None:
    differences = np.random.default_rng(7).gamma(1.0, 0.3, 70) - 0.2
    found = compare_corpus(np.mean, [0.0] * 70, differences.tolist(), resamples=3000)
    (direct,) = paired.compare_graded(differences[:, None], resamples=3000)
    assert found.interval is not None
    assert direct.interval is not None
    width = direct.interval.high - direct.interval.low
    ends = (direct.interval.low, direct.interval.high)
    assert (found.interval.low, found.interval.high) == pytest.approx(ends, abs=0.08 * width)


def test_an_undefined_corpus_metric_has_no_interval() -> None:
    found = compare_corpus(lambda items: math.nan, [1, 2, 3], [1, 2, 3], resamples=9)
    assert found.interval is None
    assert "undefined" in found.note


def test_holm_by_the_book() -> None:
    """Holm 1979: sort, multiply by what is left, never let it fall."""
    given = [0.01, 0.04, 0.03, 0.005]
    assert paired.holm(given) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([]) == []
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of a mean, by scipy."""
    found = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(found.low), float(found.high)


def test_few_examples_get_the_wider_ends_of_bca_and_t() -> None:
    drawn = np.random.default_rng(3).normal(0.1, 1, (20, 2))
    found = paired.compare_graded(drawn, resamples=1999)
    bca = paired.bca_of_means(drawn, np.ones(20), seed=0, resamples=1999)
    for k, one in enumerate(found):
        low, high = t_interval(drawn[:, k].tolist())
        assert one.interval is not None
        assert one.interval.method == "BCa bootstrap and t over examples"
        assert one.interval.low == pytest.approx(min(low, bca[0][k]))
        assert one.interval.high == pytest.approx(max(high, bca[1][k]))
        assert one.note == "only 20 of 20 examples differ: the interval can be too narrow"
    (many,) = paired.compare_graded(np.random.default_rng(3).normal(0.1, 1, (100, 1)), resamples=199)
    assert many.interval is not None
    assert (many.interval.method, many.note) == ("BCa bootstrap over examples", "")


@pytest.mark.parametrize(("different", "joined"), [(24, True), (25, False)])
def test_many_examples_of_which_few_differ_get_them_too(different: int, joined: bool) -> None:
    drawn = np.zeros((400, 2))
    drawn[:different, 0] = np.random.default_rng(different).normal(0.3, 0.3, different)
    drawn[:, 1] = np.random.default_rng(1).normal(0.1, 1, 400)
    few, all_of_them = paired.compare_graded(drawn, resamples=999)
    bca = paired.bca_of_means(drawn, np.ones(400), seed=0, resamples=999)
    low, high = t_interval(drawn[:, 0].tolist())
    assert few.interval is not None
    assert all_of_them.interval is not None
    assert (few.interval.low, few.interval.high) == pytest.approx(
        (min(low, bca[0][0]), max(high, bca[1][0])) if joined else (bca[0][0], bca[1][0])
    )
    note = "only 24 of 400 examples differ: the interval can be too narrow" if joined else ""
    name = "BCa bootstrap and t over examples" if joined else "BCa bootstrap over examples"
    assert (few.interval.method, few.note) == (name, note)
    assert (all_of_them.interval.low, all_of_them.interval.high) == (bca[0][1], bca[1][1])
    assert (all_of_them.interval.method, all_of_them.note) == ("BCa bootstrap over examples", "")


def test_a_corpus_metric_of_which_few_items_differ_gets_them_too() -> None:
    """As a mean it has the interval of the mean, here to the resampling."""
    after = np.zeros(300)
    after[:20] = np.random.default_rng(2).normal(0.5, 0.5, 20)
    found = compare_corpus(np.mean, [0.0] * 300, after.tolist(), resamples=1999)
    (direct,) = paired.compare_graded(after[:, None], resamples=1999)
    assert found.interval is not None
    assert direct.interval is not None
    assert found.interval.method == "BCa bootstrap and t over examples, metric recomputed"
    assert found.note == direct.note == "only 20 of 300 examples differ: the interval can be too narrow"
    width = direct.interval.high - direct.interval.low
    ends = (direct.interval.low, direct.interval.high)
    assert (found.interval.low, found.interval.high) == pytest.approx(ends, abs=0.08 * width)


def test_the_t_interval_of_images_is_that_of_their_means_where_all_have_as_many_questions() -> None:
    drawn = np.random.default_rng(4).normal(0.1, 1, (60, 1))
    sums, sizes = paired.cluster_sums(drawn, np.repeat(np.arange(12), 5))
    low, high = paired.t_of_means(sums, sizes)
    assert (low[0], high[0]) == pytest.approx(t_interval((sums[:, 0] / 5).tolist()))


def test_the_t_interval_of_the_jackknife_is_students_for_a_mean() -> None:
    drawn = np.random.default_rng(5).normal(0.1, 1, 15)
    left_out = (drawn.sum() - drawn) / 14
    low, high = paired.t_of_jackknife(float(drawn.mean()), left_out)
    assert (low[0], high[0]) == pytest.approx(t_interval(drawn.tolist()))


def test_one_example_has_no_interval() -> None:
    (found,) = paired.compare_graded(np.array([[0.5]]), resamples=99)
    assert found.interval is None


def test_exchanges_go_on_until_one_differs_as_much() -> None:
    """An extreme difference gets the smallest p of `most` draws; any other stops where it did."""
    before, after = [0.0] * 40, [1.0] * 40
    extreme = compare_corpus(np.mean, before, after, resamples=99, most=1999).test
    assert extreme is not None
    assert extreme.p == 1 / 2000
    some = [0.0] * 36 + [1.0] * 4
    mild = [compare_corpus(np.mean, before, some, resamples=99, most=most).test for most in (99, 1999)]
    assert mild[0] == mild[1]
    drawn = compare_corpus(np.mean, before, [0.0] * 29 + [1.0] * 11, resamples=9, most=9999).test
    assert drawn is not None
    assert 1 / 10_000 < drawn.p < 1 / 100  # two of the 2 ** 11 exchanges differ as much
