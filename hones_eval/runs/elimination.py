"""Elimination: find the best of some items with a fixed number of measurements.

Which of `items` have the `keep` highest means over a finite set of `examples`? A race (see
`hones_eval.runs.racing`) measures until a bound is reached, however long that takes. An elimination is given
the number of measurements instead, and drops the items with the lowest means at fixed points, until a few are
left that are measured on all examples. So the means of the last few, and their order, are exact. What is
uncertain is whether an item that was dropped belongs to the best.

What is already known about the items, such as estimates by gradients, can serve as hints. A mean over the
first few examples is uncertain, so it is drawn towards the line that fits all means best, given the hints.

How uncertain is computed afterwards, from the same bets as in a race. If the result is wrong, some of the
`keep` best items were dropped. For an item among the best, the wealth of a bet that its mean is below the
last selected mean reaches `keep / risk` with probability at most `risk / keep` (Ville's inequality). So if
the wealth against every dropped item reaches `keep / risk`, the result is right with probability at least
`1 - risk`; the smallest such `risk` is reported. The last selected mean is itself found by the elimination,
which does not matter: it is at most the true one, and the wealth only grows with it. With few examples per
dropped item the risk is 1, which means that the bound shows nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hones_eval.errors import HonesError
from hones_eval.runs.racing import STAKES, Contest, betting_gain, centre

ROUNDS = 2
"""How often items are dropped before the last ones are measured on all examples."""
FINALISTS = 2
"""How many times the wanted number of items is measured on all examples, if the budget allows."""
FINAL_SHARE = 0.75
"""The largest share of the budget that the items that are measured on all examples may take."""


class Cut(NamedTuple):
    """After `examples` examples only the best `items` items are measured further."""

    examples: int
    items: int


def schedule(items: int, keep: int, examples: int, measurements: int, look: int) -> list[Cut]:
    """The points at which items are dropped, which spend at most `measurements`.

    Every round but the last takes about the same number of measurements.

    Args:
        items: number of items at the start.
        keep: number of items wanted.
        examples: number of examples in the whole set.
        measurements: the budget, of which each item takes one per example.
        look: the number of examples after which items can be dropped; cuts are at multiples of it.

    Raises: HonesError for a budget in which `keep` items cannot be measured on all examples.

    Examples:
        >>> schedule(40, 8, 500, 13500, 8)
        [Cut(examples=136, items=25), Cut(examples=360, items=16)]
    """
    if measurements < keep * examples:
        raise HonesError(
            f"a budget of {measurements} measurements cannot measure {keep} heads on {examples} examples: "
            f"raise --budget, or lower --heads to {measurements // examples}"
        )
    last = max(keep, min(FINALISTS * keep, int(FINAL_SHARE * measurements) // examples, items))
    sizes = [round(items * (last / items) ** (part / ROUNDS)) for part in range(ROUNDS)]
    low, high = 0.0, float(measurements)
    for _ in range(60):  # the measurements of one round, by bisection
        middle = (low + high) / 2
        ends = _ends(sizes, middle)
        fits = ends[-1] <= examples and ROUNDS * middle + last * (examples - ends[-1]) <= measurements
        low, high = (middle, high) if fits else (low, middle)
    points = [max(look, int(end) // look * look) for end in _ends(sizes, low)]
    return [Cut(*cut) for cut in zip(points, [*sizes[1:], last], strict=True)]


def spent(items: int, examples: int, cuts: Sequence[Cut]) -> int:
    """The number of measurements that a schedule takes."""
    total, seen = 0, 0
    for cut in cuts:
        total, seen, items = total + items * (cut.examples - seen), cut.examples, cut.items
    return total + items * (examples - seen)


def _ends(sizes: list[int], measurements: float) -> list[float]:
    """The number of examples at the end of every round, if each takes `measurements`."""
    ends, total = [], 0.0
    for size in sizes:
        total += measurements / size
        ends.append(total)
    return ends


def shrunk(values: Tensor, hints: Tensor, examples: int) -> Tensor:
    """Means [items] of the first values [n, items], drawn towards the line in the hints that fits them best.

    A mean is drawn the more, the less certain it is compared with how far means lie from the line (empirical
    Bayes). `examples` is the number of values that there are of each item in all.
    """
    count, means = len(values), values.mean(0)
    if len(hints) < 3:
        return means
    spread = values.var(0, correction=0)
    # A pooled value more keeps items apart from 0 whose values are all equal so far.
    variances = (spread * count + spread.mean()) / (count + 1) / count * (1 - count / examples) + 1e-12
    hints = hints.double()
    design = torch.stack([torch.ones_like(hints), (hints - hints.mean()) / (hints.std() + 1e-12)], dim=1)
    weights = variances.rsqrt()[:, None]
    line = design @ torch.linalg.lstsq(design * weights, means[:, None] * weights).solution[:, 0]
    between = ((means - line).square() - variances).mean().clamp(min=1e-4 * float(means.var()) + 1e-12)
    drawn: Tensor = (means * between + line * variances) / (between + variances)
    return drawn


class Elimination(Contest):
    """Which of some items have the highest means, with a number of measurements that is fixed in advance."""

    def __init__(
        self,
        items: int,
        keep: int,
        examples: int,
        cuts: Sequence[Cut],
        span: float = 1.0,
        hints: Tensor | None = None,
    ) -> None:
        """Start with all items in play.

        Args:
            items: number of items.
            keep: number of items wanted.
            examples: number of examples in the whole set, whose exact means are the truth.
            cuts: when items are dropped; see `schedule`.
            span: the largest absolute value, for which the risk is computed.
            hints: numbers [items] that tend to be larger for items with larger means.
        """
        super().__init__(items, keep, examples)
        self.span, self.cuts, self.hints = span, cuts, hints
        self.values = torch.zeros(0, items, dtype=torch.float64)
        """What was measured [examples, items]; 0 where an item was no longer in play."""

    def add(self, values: Tensor) -> None:
        """Take in examples: the quantity of every item in play [examples, items in play]."""
        items = self.in_play
        rows = self.values.new_zeros(len(values), len(self.place))
        rows[:, items] = values.double()
        self.values = torch.cat([self.values, rows])
        self.seen[items] += len(values)

    def look(self) -> None:
        """Drop items where a cut is reached, and decide after the last example."""
        items = self.in_play
        if self.finished or not len(self.values):
            return
        seen = int(self.seen[items[0]])
        left = min([cut.items for cut in self.cuts if cut.examples <= seen], default=len(items))
        values = self.values[:, items]
        if self.hints is None or seen == self.examples:
            means = values.sum(0)
        else:
            means = shrunk(values, self.hints[items], self.examples)
        order = items[torch.sort(means, descending=True, stable=True).indices]
        self.place[order[left:]] = -1
        if seen == self.examples:
            self.place[order[: self.keep]], self.place[order[self.keep :]] = 1, -1

    def wealth(self) -> Tensor:
        """The largest wealth [items] of the bet that an item's mean is below the last selected mean.

        Infinite for the items that were measured on all examples, which need no bound.
        """
        found = torch.full((len(self.place),), torch.inf, dtype=torch.float64)
        last = float(self.values[:, self.place == 1].mean(0).min())
        span = max(self.span - last, 1e-9 * self.span)  # 0 where the last selected item always has the span
        stakes = torch.tensor(STAKES, dtype=torch.float64)
        for item in (self.seen < self.examples).nonzero()[:, 0].tolist():
            x = last - self.values[: int(self.seen[item]), item]
            before = torch.cat([x.new_zeros(1), x.cumsum(0)[:-1]])
            expected = torch.stack([centre(total, i, self.examples) for i, total in enumerate(before)])
            gains = betting_gain(x, expected, span, stakes).cumsum(1)
            found[item] = (torch.logsumexp(gains, 0) - math.log(len(STAKES))).max().exp()
        return found

    def risk(self) -> float | None:
        """An upper bound of the probability with which the selected items differ from the best.

        None where a value was larger than the span, for which the bound does not hold.
        """
        if float(self.values.abs().max()) > self.span * (1 + 1e-9):
            return None
        return min(1.0, self.keep / float(self.wealth().min()))

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs to continue."""
        return {"place": self.place, "seen": self.seen, "values": self.values}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the `state` of an elimination with the same settings."""
        self.place, self.seen, self.values = (state[name].clone() for name in ("place", "seen", "values"))
