"""Races: the bets against plain arithmetic, their promise by enumeration, and who is let in and when."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from hones_eval.errors import HonesError
from hones_eval.runs.racing import STAKES, Race, bernstein_gain, betting_gain, centre

BOUNDS = ["betting", "bernstein"]


def plain_wealth(xs: list[float], examples: int, span: float, stake: float, bound: str) -> float:
    """One stake's wealth after some differences, written out with numbers alone."""
    wealth, total = 1.0, 0.0
    for seen, x in enumerate(xs):
        expected = -total / (examples - seen)
        if bound == "betting":
            wealth *= 1 + stake / (span + expected) * (x - expected)
        else:
            width = 2 * span
            rate = min(stake, 0.9) / width
            psi = (-math.log(1 - width * rate) - width * rate) / width**2
            mean = total / seen if seen else 0.0
            wealth *= math.exp(rate * (x - expected) - psi * (x - mean) ** 2)
        total += x
    return wealth


def plain_race(values: list[list[float]], keep: int, delta: float, look: int, bound: str) -> list[Any]:
    """Place (in, out) and number of examples of every item: all wealth anew at every look."""
    examples, items = len(values), len(values[0])
    needed = keep * (items - keep) / delta
    result: list[Any] = [None] * items
    for seen in [*range(look, examples, look), examples]:
        while True:
            playing = [i for i in range(items) if result[i] is None]
            free = keep - sum(verdict is not None and verdict[0] == "in" for verdict in result)
            beaten = {
                (a, b): sum(
                    plain_wealth([row[a] - row[b] for row in values[:seen]], examples, 1.0, stake, bound)
                    for stake in STAKES
                )
                / len(STAKES)
                >= needed
                for a, b in itertools.permutations(playing, 2)
            }
            out = [b for b in playing if sum(beaten[a, b] for a in playing if a != b) >= free]
            inside = [
                a for a in playing if sum(beaten[a, b] for b in playing if a != b) >= len(playing) - free
            ]
            for i in out:
                result[i] = ("out", seen)
            for i in inside:
                result[i] = ("in", seen)
            if not out and not inside:
                break
    playing = [i for i in range(items) if result[i] is None]
    free = keep - sum(verdict is not None and verdict[0] == "in" for verdict in result)
    ranked = sorted(playing, key=lambda i: (-sum(row[i] for row in values), i))
    for place, i in enumerate(ranked):
        result[i] = ("in" if place < free else "out", examples)
    return result


def run(race: Race, values: Tensor, look: int) -> list[Any]:
    for start in range(0, len(values), look):
        if race.finished:
            break
        race.add(values[start : start + look][:, race.in_play])
        race.look()
    names = {1: "in", -1: "out", 0: "in play"}
    return [(names[int(place)], int(seen)) for place, seen in zip(race.place, race.seen, strict=True)]


def drawn(examples: int, means: list[float], seed: int) -> Tensor:
    """Right or wrong answers, some graded, of items with these means."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(examples, len(means), generator=generator) < torch.tensor(means)).double()
    return values * torch.where(torch.rand(examples, 1, generator=generator) < 0.2, 0.6, 1.0).double()


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("keep", "look"), [(2, 7), (1, 1), (4, 16)])
def test_a_race_is_what_plain_arithmetic_makes_of_it(bound: Any, keep: int, look: int) -> None:
    values = drawn(90, [0.9, 0.7, 0.4, 0.1, 0.05, 0.0, 0.0], seed=keep)
    race = Race(7, keep, 90, delta=0.2, bound=bound)
    found = run(race, values, look)
    assert found == plain_race(values.tolist(), keep, 0.2, look, bound)
    assert len({seen for _, seen in found}) > 1, "nothing left early: the test has shown nothing"
    assert race.finished
    for i, (_, seen) in enumerate(found):
        assert float(race.sums[i]) == pytest.approx(float(values[:seen, i].sum()))


POPULATIONS = [
    [1.0, -1.0, 0.0, 0.0, 0.0, 0.0],
    [0.5, 0.5, 0.5, 0.5, -1.0, -1.0],
    [1.0, 1.0, -1.0, -1.0, 0.25, -0.25],
    [0.1, -0.3, 0.0, 0.05, -1.0, 0.2],
]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("population", POPULATIONS)
def test_over_all_orders_wealth_grows_no_more_than_by_chance(population: list[float], bound: str) -> None:
    """By enumeration: at every time at most 1 in expectation, as the mean is at most 0; so Ville holds."""
    orders = torch.tensor(list(itertools.permutations(population)), dtype=torch.float64)
    stakes = torch.tensor(STAKES, dtype=torch.float64)
    log_wealth = torch.zeros(len(STAKES), len(orders), dtype=torch.float64)
    total = torch.zeros(len(orders), dtype=torch.float64)
    highest = torch.zeros(len(orders), dtype=torch.float64)
    for seen in range(len(population)):
        x, expected = orders[:, seen], centre(total, seen, len(population))
        if bound == "betting":
            log_wealth += betting_gain(x, expected, 1.0, stakes)
        else:
            log_wealth += bernstein_gain(x, expected, 1.0, stakes, total / max(seen, 1))
        total += x
        wealth = log_wealth.exp().mean(0)
        assert float(wealth.mean()) <= 1 + 1e-6
        if bound == "betting" and sum(population) == 0 and seen < len(population) - 1:
            assert float(wealth.mean()) == pytest.approx(1, abs=1e-6)  # a martingale: nothing is given away
        highest = highest.maximum(wealth)
    for alpha in (0.5, 0.2, 0.1, 0.05):
        assert float((highest >= 1 / alpha).double().mean()) <= alpha


def test_a_mean_above_zero_is_found() -> None:
    """The same bets, on a population whose mean is above 0, reach any wealth before its end."""
    race = Race(2, 1, 60, delta=0.01)
    found = run(race, torch.tensor([[1.0, 0.0]] * 60), look=1)
    assert found[0] == ("in", found[0][1])
    assert found[0][1] <= math.ceil(math.log2(4 / 0.01))  # a quarter of the wealth doubles with each example


def test_the_bernstein_bound_settles_later_than_bets_do() -> None:
    values = drawn(400, [0.6, 0.5, 0.1, 0.1, 0.0, 0.0], seed=0)
    seen = []
    for bound in BOUNDS:
        race = Race(6, 2, 400, delta=0.05, bound=bound)  # type: ignore[arg-type]
        assert [place for place, _ in run(race, values, 4)] == ["in", "in", "out", "out", "out", "out"]
        seen.append(int(race.seen.sum()))
    assert seen[0] < seen[1] < 6 * 400


def test_values_of_another_range_race_alike() -> None:
    values = drawn(120, [0.8, 0.5, 0.1, 0.0], seed=3)
    one, other = Race(4, 2, 120, 0.1), Race(4, 2, 120, 0.1, span=100.0)
    assert run(one, values, 5) == run(other, 100 * values, 5)


def test_items_that_tie_are_settled_by_the_exact_mean_and_their_number() -> None:
    values = torch.zeros(30, 5)
    values[:, 3] = 1
    race = Race(5, 2, 30, 0.1)
    found = run(race, values, 8)
    assert [place for place, _ in found] == ["in", "out", "out", "in", "out"]
    assert race.undecided.tolist() == [0, 1, 2, 4]
    assert found[3][1] < 30


def test_bets_know_where_the_set_ends() -> None:
    """After four of eight examples the rest could still make up for all; after a fifth it could not."""
    won, lost = [1.0, 0.0], [0.0, 1.0]
    tie = Race(2, 1, 8, 0.001)
    assert run(tie, torch.tensor([won] * 4 + [lost] * 4), 1) == [("in", 8), ("out", 8)]
    assert tie.undecided.tolist() == [0, 1]
    assert run(Race(2, 1, 8, 0.001), torch.tensor([won] * 5 + [lost] * 3), 1) == [("in", 5), ("out", 5)]
    assert run(Race(2, 1, 8, 0.001), torch.tensor([lost] * 3 + [won] * 5), 1) == [("in", 8), ("out", 8)]


def test_a_race_goes_on_where_it_was_left() -> None:
    values = drawn(90, [0.9, 0.7, 0.4, 0.1, 0.05, 0.0, 0.0], seed=2)
    whole, first, second = (Race(7, 2, 90, delta=0.2) for _ in range(3))
    run(whole, values, 6)
    for start in range(0, 30, 6):
        first.add(values[start : start + 6][:, first.in_play])
        first.look()
    assert 0 < len(first.in_play) < 7
    second.restore(first.state())
    for start in range(30, 90, 6):
        if second.finished:
            break
        second.add(values[start : start + 6][:, second.in_play])
        second.look()
    assert whole.state().keys() == second.state().keys()
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())


def test_the_risk_is_kept_where_chance_could_mislead() -> None:
    """Near ties, a generous risk and 200 orders: errors are rarer than the risk, and races do end early."""
    values = drawn(120, [0.55, 0.5, 0.45, 0.4, 0.1, 0.1], seed=5)
    best = set(values.mean(0).topk(2).indices.tolist())
    wrong, early, chance = 0, 0, random.Random(0)
    for _ in range(200):
        order = list(range(120))
        chance.shuffle(order)
        race = Race(6, 2, 120, delta=0.5)
        run(race, values[order], 8)
        wrong += set((race.place == 1).nonzero()[:, 0].tolist()) != best
        early += int(race.seen.sum()) < 6 * 120
    assert wrong <= 100
    assert early == 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((5, 2, 10, 0.0), "the risk of a race must lie between 0 and 1, not 0.0"),
        ((5, 2, 10, 1.5), "between 0 and 1"),
        ((5, 6, 10, 0.1), "cannot keep 6 of 5 items: keep 1 to 5"),
    ],
)
def test_impossible_races_are_refused(arguments: Any, says: str) -> None:
    with pytest.raises(HonesError, match=says):
        Race(*arguments)
