"""Verdicts and power, compared with closed formulas, enumeration, lmms-eval and simulation."""

import itertools

import numpy as np
import pytest
from lmms_eval.api.metrics import power_analysis
from scipy import stats

from hones_eval.stats import power
from hones_eval.stats.paired import holm
from hones_eval.stats.verdicts import (
    Contrast,
    benjamini_hochberg,
    contrast_of_corpus,
    contrasts_of_values,
    judge,
)


def right_wrong(n: int, gained: int, lost: int) -> Contrast:
    """Half of the answers are right without a change."""
    baseline = np.repeat([0.0, 1.0], n // 2)
    condition = baseline.copy()
    condition[:gained] = 1
    condition[n - lost :] = 0
    (contrast,) = contrasts_of_values(baseline, condition[:, None])
    return contrast


def test_three_changed_answers_are_no_verdict_and_the_interval_agrees() -> None:
    """The plain BCa interval of three gains among 200 excludes zero, at p = 0.25."""
    (row,) = judge([right_wrong(200, 3, 0)])
    assert row.p == pytest.approx(0.25)
    assert row.verdict == "no clear difference"
    assert row.low <= 0 <= row.gain <= row.high
    (clear,) = judge([right_wrong(200, 20, 3)])
    assert (clear.verdict, clear.low > 0) == ("better", True)
    (worse,) = judge([right_wrong(200, 3, 20)])
    assert (worse.verdict, worse.high < 0, worse.gain) == ("worse", True, pytest.approx(-17 / 200))


def test_rows_are_corrected_over_what_is_reported_together() -> None:
    rows = judge([right_wrong(200, 9, 0), *[right_wrong(200, 2, 2)] * 99])
    assert rows[0].p == pytest.approx(2 / 2**9)
    assert rows[0].verdict == "no clear difference"
    assert rows[0].sentence == "no clear difference: p = 0.0039 alone, not after correction over 100 rows"
    assert judge([right_wrong(200, 9, 0)])[0].sentence == "better: p = 0.0039"
    p = [0.001, 0.04, 0.012, 0.5, 0.012]
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p, method="bh").tolist())
    some = [right_wrong(200, 12, 1), right_wrong(200, 10, 1), right_wrong(200, 14, 4), right_wrong(200, 2, 2)]
    plain = [row.comparison.test.p for row in some]
    assert [row.p_adjusted for row in judge(some)] == pytest.approx(holm(plain))
    found = [row.p_adjusted for row in judge(some, "benjamini_hochberg")]
    assert found == pytest.approx(stats.false_discovery_control(plain, method="bh").tolist())


def test_under_ten_units_there_is_no_verdict() -> None:
    baseline, condition = np.zeros((9, 1)), np.ones((9, 1))
    (few,) = judge(contrasts_of_values(baseline[:, 0], condition))
    assert (few.verdict, few.sentence) == ("too few", "too few: 9 independent examples")
    twenty = np.zeros(20), np.ones((20, 1))
    (shared,) = judge(contrasts_of_values(*twenty, np.arange(20) // 3))
    assert (shared.verdict, shared.units) == ("too few", 7)
    (enough,) = judge(contrasts_of_values(*twenty))
    assert enough.verdict == "better"


def test_graded_metrics_have_an_interval_when_no_answer_changed() -> None:
    values = np.linspace(0, 1, 50)
    (row,) = judge(contrasts_of_values(values, values[:, None]))
    assert (row.gain, row.p, row.verdict) == (0, 1, "no clear difference")
    assert row.low == pytest.approx(-row.high)
    assert 0 < row.high < 0.06
    assert 0.1 < row.detectable < 0.3
    words = [f"word {k}" for k in range(30)]
    corpus = judge([contrast_of_corpus(lambda items: len(set(items)) / 30, words, words)])[0]
    assert (corpus.verdict, corpus.low < 0 < corpus.high) == ("no clear difference", True)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_intervals_stay_inside_the_range_of_the_metric(scale: float) -> None:
    generator = np.random.default_rng(0)
    baseline = generator.choice([0.0, 0.3, 1.0], 11, p=[0.9, 0.05, 0.05])
    condition = generator.choice([0.0, 0.6, 1.0], (11, 40), p=[0.1, 0.1, 0.8])
    for row in judge(contrasts_of_values(baseline, condition, scale=scale)):
        assert -scale <= row.low <= row.gain <= row.high <= scale


def test_a_metric_where_lower_is_better_is_turned_round() -> None:
    generator = np.random.default_rng(1)
    baseline, condition = generator.random(60), generator.random((60, 1)) * 0.8
    (lower,) = judge(contrasts_of_values(baseline, condition, sign=-1.0))
    (higher,) = judge(contrasts_of_values(-baseline, -condition))
    assert (lower.gain, lower.low, lower.high) == pytest.approx((higher.gain, higher.low, higher.high))
    assert lower.gain > 0
    wrong = right_wrong(100, 4, 20).comparison
    base = np.repeat([0.0, 1.0], 50)
    flipped = base.copy()
    flipped[:4], flipped[80:] = 1, 0
    (turned,) = contrasts_of_values(base, flipped[:, None], sign=-1.0)
    assert turned.comparison.difference == pytest.approx(-wrong.difference)


def test_mcnemar_power_is_that_of_an_enumeration() -> None:
    n, gained, lost, alpha = 9, 0.35, 0.05, 0.2
    total = 0.0
    for up, down in itertools.product(range(n + 1), repeat=2):
        if up + down <= n and up + down:
            p = min(1.0, 2 * stats.binom.cdf(min(up, down), up + down, 0.5))
            chance = stats.multinomial.pmf([up, down, n - up - down], n, [gained, lost, 1 - gained - lost])
            total += chance * (p <= alpha)
    assert power.mcnemar_power(n, gained, lost, alpha) == pytest.approx(total, abs=1e-9)


def test_the_smallest_detectable_difference_matches_a_closed_form_and_simulation() -> None:
    """Without losses, Holm over 260 rows needs 14 gains: the binomial reaches 14 with probability 0.8."""
    found = power.detectable_right_wrong(100, 0.0, 0.05 / 260)
    assert 2 * 0.5**14 <= 0.05 / 260 < 2 * 0.5**13
    assert stats.binom.sf(13, 100, found) == pytest.approx(0.8, abs=2e-3)
    assert found == pytest.approx(0.167, abs=1e-3)
    generator = np.random.default_rng(0)
    smallest = power.detectable_right_wrong(150, 0.2)
    drawn = generator.multinomial(150, [(0.2 + smallest) / 2, (0.2 - smallest) / 2, 0.8], size=4000)
    rejected = [stats.binomtest(int(up), int(up + down)).pvalue < 0.05 for up, down, _ in drawn if up + down]
    assert sum(rejected) / 4000 == pytest.approx(0.8, abs=0.02)
    error = 0.5 / np.sqrt(80)
    shift = power.detectable_mean(error, 80)
    sample = generator.normal(shift, 0.5, (4000, 80))
    assert (stats.ttest_1samp(sample, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.025)
    assert power.detectable_right_wrong(5, 0.0, 0.05 / 260) is None


def test_the_number_of_examples_is_that_of_lmms_eval_and_enough_for_the_exact_test() -> None:
    for difference, std, correlation in ((0.03, 0.5, 0.5), (0.1, 0.4, 0.8)):
        deviation = std * np.sqrt(2 - 2 * correlation)
        theirs = power_analysis(difference, std, std, correlation=correlation)["min_n"]
        assert power.examples_for_mean(difference, deviation) == theirs
    for difference, changed in ((0.03, 0.1), (0.05, 0.05), (0.1, 0.3)):
        n = power.examples_for_right_wrong(difference, changed)
        gained, lost = max(difference, (changed + difference) / 2), max(0.0, (changed - difference) / 2)
        assert power.mcnemar_power(n, gained, lost) >= 0.8
        assert power.mcnemar_power(int(0.93 * n), gained, lost) < 0.8
        assert n == pytest.approx(
            power.examples_for_mean(difference, np.sqrt(changed - difference**2)), rel=0.2
        )


def test_a_row_states_the_smallest_gain_that_it_would_have_found() -> None:
    rows = judge([right_wrong(100, 0, 0)] * 260)
    assert rows[0].detectable == pytest.approx(0.167, abs=1e-3)
    alone = judge([right_wrong(100, 10, 10)])[0]
    assert alone.detectable == power.detectable_right_wrong(100, 0.2)
    generator = np.random.default_rng(2)
    differences = generator.normal(0, 0.2, (90, 1))
    (graded,) = judge(contrasts_of_values(np.full(90, 0.5), 0.5 + differences))
    expected = power.detectable_mean(float(stats.sem(differences[:, 0])), 90)
    assert graded.detectable == pytest.approx(expected)


def test_null_comparisons_are_rarely_called_different() -> None:
    """Five percent of reports at most hold a false verdict, however many rows they have."""
    generator = np.random.default_rng(3)
    false_reports = 0
    for _ in range(200):
        values = generator.random((60, 13))
        values = np.where(generator.random(values.shape) < 0.15, values, 0.5)
        rows = judge(contrasts_of_values(values[:, 0], values[:, 1:], resamples=999))
        false_reports += any(row.verdict != "no clear difference" for row in rows)
    assert false_reports / 200 <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5
