"""Racing: measure items on examples in random order, and stop measuring an item once its place is settled.

Which of `items` have the `keep` highest means over a finite set of `examples`? Every pair of items in play
has two bets running, one for each order of the two. The bet for a above b starts with wealth 1 and plays on
the paired differences `X = value(a) - value(b)`. While the whole set's mean of X is at most 0, its wealth is
a nonnegative supermartingale, which ever reaches 1 / alpha with probability at most alpha (Ville's
inequality), however often it is checked. Examples come without replacement from a set of known size, and the
bets use that size.

An error needs a wrong verdict on a pair of one item among the best and one item among the others. There are
`keep * (items - keep)` such pairs, whichever the best are. So with `alpha = delta / (keep * (items - keep))`
the verdicts on all of them are right at all times with probability at least 1 - delta. Among the items in
play
- an item leaves as *out* when as many others as there are free places are shown to be above it, and
- an item leaves as *in* when it is shown to be above as many others as still have to leave.
Both are right if the verdict on every pair is. An item still in play after the last example has been measured
on all examples: its exact mean decides.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hones_eval.choices import Bound
from hones_eval.errors import HonesError

# Shares of the largest stake that a bet may put up without going into debt; each has an equal part of its
# wealth. The best share is about mean / mean square of the differences: high where a loss is rare.
STAKES = (1.0, 0.5, 0.25, 0.125)


def centre(total: Tensor, seen: int, examples: int) -> Tensor:
    """The upper bound of the next difference's expectation, if all `examples` add up to at most 0.

    `-S_{t-1} / (N - t + 1)`: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
    betting" (JRSS B 86, 2024), section 5, with m = 0.

    Args:
        total: sums of the differences so far, of any shape.
        seen: number of examples in those sums, less than `examples`.
        examples: number of examples in the whole set.
    """
    return -total / (examples - seen)


def betting_gain(x: Tensor, expected: Tensor, span: float, stakes: Tensor) -> Tensor:
    """The logarithm of the factor on each stake's wealth: `1 + lambda (x - expected)`.

    `lambda = stake / (span + expected)`, so that the worst difference, `-span`, leaves `1 - stake`. From the
    capital process of Waudby-Smith and Ramdas (2024), section 5.

    Args:
        x: differences, of absolute value at most `span`.
        expected: `centre`; below `-span` it cannot be met any more, and every stake wins.
        span: the largest difference.
        stakes: shares [stakes], above 0 and at most 1.

    Returns: gains [stakes, *x.shape].
    """
    scale = (span + expected).clamp(min=1e-9 * span)
    return torch.log1p((stakes.reshape(-1, *[1] * x.ndim) * ((x - expected) / scale)).clamp(min=-1))


def bernstein_gain(x: Tensor, expected: Tensor, span: float, stakes: Tensor, mean: Tensor) -> Tensor:
    """The same by an empirical-Bernstein bound: `lambda (x - expected) - psi(lambda) (x - mean)^2`.

    `psi(lambda) = (-ln(1 - c lambda) - c lambda) / c^2` for a range of `c = 2 span`: Howard et al.,
    "Time-uniform, nonparametric, nonasymptotic confidence sequences" (Annals of Statistics 2021), section 3,
    and without replacement Waudby-Smith and Ramdas, "Confidence sequences for sampling without replacement"
    (NeurIPS 2020), section 3. Its exponential is at most 1 in expectation, since
    `exp(lambda y - psi(lambda) y^2) <= 1 + lambda y` for `y = x - mean >= -c`.

    Args:
        x: as in `betting_gain`.
        expected: as in `betting_gain`.
        span: as in `betting_gain`.
        stakes: `c lambda`; 1 is taken for 0.9, since psi is infinite there.
        mean: the mean of the differences before this one, or 0.
    """
    width = 2 * span
    y = stakes.clamp(max=0.9).reshape(-1, *[1] * x.ndim)
    psi = -torch.log1p(-y) - y
    return y * (x - expected) / width - psi * ((x - mean) / width).square()


class Contest:
    """Which items are in play, in or out, and how many examples each was measured on."""

    def __init__(self, items: int, keep: int, examples: int) -> None:
        """Start with all of some items in play; `keep` of them are wanted, of `examples` in the whole set."""
        self.keep, self.examples = keep, examples
        self.place = torch.zeros(items, dtype=torch.int64)
        """0 in play, 1 in, -1 out."""
        self.seen = torch.zeros(items, dtype=torch.int64)

    @property
    def in_play(self) -> Tensor:
        """Numbers of the items that are still measured, ascending."""
        return (self.place == 0).nonzero()[:, 0]

    @property
    def finished(self) -> bool:
        """Whether every item is in or out."""
        return not bool((self.place == 0).any())

    @property
    def undecided(self) -> Tensor:
        """Numbers of the items that were measured on all examples, since nothing settled them before."""
        return (self.seen == self.examples).nonzero()[:, 0]


class Race(Contest):
    """Which of some items have the highest means of a bounded quantity over a finite set of examples."""

    def __init__(
        self,
        items: int,
        keep: int,
        examples: int,
        delta: float,
        span: float = 1.0,
        bound: Bound = "betting",
    ) -> None:
        """Start with all items in play.

        Args:
            items: number of items.
            keep: number of items wanted.
            examples: number of examples in the whole set, whose exact means are the truth.
            delta: the probability with which the result may differ from the exact one.
            span: the largest difference of two items' quantities on one example.
            bound: bets, or the empirical-Bernstein bound that is weaker and better known.
        """
        if not 0 < delta < 1:
            raise HonesError(f"the risk of a race must lie between 0 and 1, not {delta}")
        if not 1 <= keep <= items:
            raise HonesError(f"cannot keep {keep} of {items} items: keep 1 to {items}")
        super().__init__(items, keep, examples)
        self.span, self.bound = span, bound
        self.threshold = math.log(max(1, keep * (items - keep)) / delta)
        self.sums = torch.zeros(items, dtype=torch.float64)
        self._wealth = torch.zeros(len(STAKES), items, items, dtype=torch.float64)
        self._settle()

    def add(self, values: Tensor) -> None:
        """Take in examples: the quantity of every item in play [examples, items in play]."""
        items = self.in_play
        for row in values.double():
            self._bet(row, self.sums[items], int(self.seen[items[0]]))
            self.sums[items] += row
            self.seen[items] += 1

    def look(self) -> None:
        """Settle what the bets allow, and everything after the last example. Items leave only here."""
        self._settle()
        items = self.in_play
        if len(items) and int(self.seen[items[0]]) == self.examples:
            order = torch.sort(self.sums[items], descending=True, stable=True).indices
            self.place[items] = -1
            self.place[items[order[: self.keep - int((self.place == 1).sum())]]] = 1
            self._wealth = self._wealth[:, :0, :0]

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs to go on."""
        return {"place": self.place, "seen": self.seen, "sums": self.sums, "wealth": self._wealth}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the `state` of a race with the same settings."""
        self.place, self.seen, self.sums = (state[name].clone() for name in ("place", "seen", "sums"))
        self._wealth = state["wealth"].clone()

    def _bet(self, values: Tensor, sums: Tensor, seen: int) -> None:
        """Pay every stake of every pair [stakes, items, items]: row above column."""
        x, total = values[:, None] - values, sums[:, None] - sums
        expected = centre(total, seen, self.examples)
        stakes = torch.tensor(STAKES, dtype=torch.float64)
        if self.bound == "betting":
            self._wealth += betting_gain(x, expected, self.span, stakes)
        else:
            self._wealth += bernstein_gain(x, expected, self.span, stakes, total / max(seen, 1))

    def _settle(self) -> None:
        """Let items in and out until no pair allows another."""
        above = torch.logsumexp(self._wealth, 0) - math.log(len(STAKES)) >= self.threshold
        while not self.finished:
            items = self.in_play
            free = self.keep - int((self.place == 1).sum())
            leave_in = above.sum(1) >= len(items) - free
            leave_out = above.sum(0) >= free
            left = leave_in | leave_out
            if not bool(left.any()):
                return
            self.place[items[leave_out]] = -1
            self.place[items[leave_in]] = 1
            above = above[~left][:, ~left]
            self._wealth = self._wealth[:, ~left][:, :, ~left]
