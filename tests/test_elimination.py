"""Eliminations: what they spend, what they decide, and the risk that they state, against plain arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from hones_eval.errors import HonesError
from hones_eval.methods.head_search import planned
from hones_eval.runs.elimination import Cut, Elimination, schedule, shrunk, spent
from hones_eval.runs.racing import STAKES

LOOK = 8


def eliminated(values: Tensor, keep: int, cuts: list[Cut]) -> Elimination:
    """Run an elimination on known values [examples, items], in their order."""
    examples, items = values.shape
    elimination = Elimination(items, keep, examples, cuts)
    for start in range(0, examples, LOOK):
        elimination.add(values[start : start + LOOK][:, elimination.in_play])
        elimination.look()
    assert elimination.finished
    return elimination


def rights(examples: int, means: list[float], seed: int) -> Tensor:
    """Right and wrong answers with these means, of every item on every example."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(examples, len(means), generator=generator) < torch.tensor(means)).double()


@pytest.mark.parametrize(
    ("heads", "keep", "examples", "share"),
    [(270, 8, 500, 0.1), (48, 4, 64, 0.25), (48, 1, 16, 0.1), (1024, 30, 5000, 0.05), (48, 4, 500, 0.1)],
)
def test_a_plan_keeps_to_its_budget(heads: int, keep: int, examples: int, share: float) -> None:
    measurements = int(share * heads * examples)
    kept, cuts = planned(heads, keep, examples, measurements)
    assert keep <= kept <= heads
    assert all(cut.items >= keep and cut.examples % LOOK == 0 for cut in cuts)
    assert [cut.items for cut in cuts] == sorted((cut.items for cut in cuts), reverse=True)
    found = eliminated(rights(examples, [0.3] * keep + [0.1] * (kept - keep), 0), keep, cuts)
    assert int(found.seen.sum()) == spent(kept, examples, cuts) <= measurements
    assert spent(kept, examples, cuts) > 0.7 * measurements


def test_a_budget_below_the_selected_is_refused() -> None:
    with pytest.raises(HonesError, match="cannot measure 8 heads on 100 examples: raise --budget, or lower"):
        schedule(20, 8, 100, 799, LOOK)


def test_the_best_of_the_last_are_chosen_by_their_exact_means() -> None:
    values = rights(96, [0.9, 0.1, 0.5, 0.52, 0.0, 0.3], 1)
    cuts = [Cut(16, 4), Cut(48, 3)]
    found = eliminated(values, 2, cuts)
    playing = list(range(6))
    for seen, left in [(16, 4), (48, 3), (96, 2)]:  # the same, written out
        sums = values[:seen].sum(0).tolist()
        playing = sorted(playing, key=lambda item: -sums[item])[:left]
        if seen < 96:
            assert (
                all(int(found.seen[item]) == seen for item in range(6) if item not in playing) or seen == 48
            )
    assert sorted(playing) == (found.place == 1).nonzero()[:, 0].tolist()
    assert found.seen.tolist().count(96) == 3
    for item in range(6):
        expected = values[: int(found.seen[item]), item].sum()
        assert float(found.values[:, item].sum()) == float(expected)


def test_means_are_drawn_to_the_line_of_the_hints_as_numbers_alone_give_it() -> None:
    values, hints = rights(24, [0.8, 0.7, 0.1, 0.2, 0.3], 3), torch.tensor([2.0, 1.0, 0.5, 0.0, 1.5])
    columns = values.T.tolist()
    means = [sum(x) / 24 for x in columns]
    spreads = [sum((v - m) ** 2 for v in x) / 24 for x, m in zip(columns, means, strict=True)]
    errors = [(24 * s + sum(spreads) / 5) / 25 / 24 * (1 - 24 / 96) for s in spreads]
    w, h = [1 / e for e in errors], hints.tolist()
    centre = sum(a * b for a, b in zip(w, h, strict=True)) / sum(w)
    level = sum(a * b for a, b in zip(w, means, strict=True)) / sum(w)
    products = sum(a * (x - centre) * (m - level) for a, x, m in zip(w, h, means, strict=True))
    slope = products / sum(a * (x - centre) ** 2 for a, x in zip(w, h, strict=True))
    line = [level + slope * (x - centre) for x in h]
    between = sum((m - f) ** 2 - e for m, f, e in zip(means, line, errors, strict=True)) / 5
    assert between > 0
    expected = [(m * between + f * e) / (between + e) for m, f, e in zip(means, line, errors, strict=True)]
    torch.testing.assert_close(shrunk(values, hints, 96), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(shrunk(values, hints, 24), torch.tensor(means, dtype=torch.float64))


def test_hints_keep_an_item_that_a_few_examples_show_too_low() -> None:
    early = [6, 11, 10, 8, 6, 5, 3, 2]  # of 16
    values = torch.zeros(64, 8, dtype=torch.float64)
    for item, count in enumerate(early):
        values[[(5 * i + 3 * item) % 16 for i in range(count)], item] = 1
    values[16:, 0] = 1
    cuts = [Cut(16, 3)]
    assert int(eliminated(values, 1, cuts).place.argmax()) == 1
    hinted = Elimination(8, 1, 64, cuts, hints=torch.arange(8, 0, -1) / 10)
    for start in range(0, 64, LOOK):
        hinted.add(values[start : start + LOOK][:, hinted.in_play])
        hinted.look()
    assert int(hinted.place.argmax()) == 0
    assert float(hinted.values[:, 0].sum()) == 6 + 48


def plain_wealth(xs: list[Fraction], last: Fraction, examples: int) -> float:
    """The largest wealth of the bet that a mean is below `last`, with numbers alone."""
    wealths = [1.0] * len(STAKES)
    best, total = 1.0, Fraction(0)
    for seen, x in enumerate(xs):
        y = last - x
        expected = -total / (examples - seen)
        scale = max((1 - last) + expected, (1 - last) / 10**9)  # below that no mean is high enough any more
        wealths = [
            wealth * float(1 + Fraction(stake) * (y - expected) / scale)
            for wealth, stake in zip(wealths, STAKES, strict=True)
        ]
        total += y
        best = max(best, sum(wealths) / len(wealths))
    return best


def test_the_risk_is_that_of_plain_bets() -> None:
    values = rights(128, [0.8, 0.7, 0.05, 0.1, 0.3, 0.0], 2)
    found = eliminated(values, 2, [Cut(32, 4), Cut(64, 3)])
    last = min(Fraction(int(values[:, item].sum()), 128) for item in (found.place == 1).nonzero()[:, 0])
    wealth = found.wealth()
    for item in range(6):
        seen = int(found.seen[item])
        if seen == 128:
            assert wealth[item] == math.inf
        else:
            xs = [Fraction(int(x)) for x in values[:seen, item]]
            assert float(wealth[item]) == pytest.approx(max(plain_wealth(xs, last, 128), 0), rel=1e-9)
    assert found.risk() == pytest.approx(min(1.0, 2 / float(wealth.min())))
    assert 0 < found.risk() < 1


def test_a_stated_risk_is_not_exceeded() -> None:
    """Near ties at the border: wrong choices with a stated risk up to r are at most a share r of all runs."""
    means, runs = [0.6, 0.5, 0.42, 0.4, 0.1, 0.1], 300
    wrong: list[float] = []
    stated = 0
    for seed in range(runs):
        values = rights(80, means, seed)
        found = eliminated(values, 3, [Cut(24, 4), Cut(48, 3)])
        exact = values.sum(0)
        risk = found.risk()
        assert risk is not None
        stated += risk < 1
        if not bool((exact[found.place == 1] >= exact.topk(3).values[-1]).all()):
            wrong.append(risk)
    assert wrong, "no run was wrong: the test has shown nothing"
    assert stated, "no run stated a risk: the test has shown nothing"
    for level in (0.05, 0.2, 0.5):
        assert sum(risk <= level for risk in wrong) <= level * runs


def test_an_item_that_always_has_the_largest_value_is_surely_the_best() -> None:
    values = rights(64, [1.0, 0.5, 0.1], 3)
    values[0] = 1.0
    risk = eliminated(values, 1, [Cut(16, 2), Cut(32, 1)]).risk()
    assert risk is not None
    assert risk < 1e-6


def test_values_beyond_the_span_state_no_risk() -> None:
    values = 3 * rights(64, [0.9, 0.5, 0.1], 3)
    assert eliminated(values, 1, [Cut(16, 2), Cut(32, 1)]).risk() is None


def test_an_elimination_goes_on_from_its_state() -> None:
    values, cuts = rights(64, [0.9, 0.5, 0.4, 0.1], 4), [Cut(16, 3), Cut(32, 2)]
    whole = eliminated(values, 1, cuts)
    first, second = (Elimination(4, 1, 64, cuts) for _ in range(2))
    for start in range(0, 32, LOOK):
        first.add(values[start : start + LOOK][:, first.in_play])
        first.look()
    second.restore(first.state())
    for start in range(32, 64, LOOK):
        second.add(values[start : start + LOOK][:, second.in_play])
        second.look()
    assert torch.equal(second.place, whole.place)
    assert torch.equal(second.seen, whole.seen)
    assert second.risk() == whole.risk()
