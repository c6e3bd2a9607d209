"""An ablation whose edits race to be among the best, instead of being measured on every example."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example
from hones_eval.runs.ablation import Ablation
from hones_eval.runs.measure import Measurement
from hones_eval.runs.racing import Race

LOOK = 8
"""Examples between two looks, and so the most processes that can share a race."""


class RacedAblation:
    """Measures on each example those edits whose place is not settled yet, by drops of the task's metric."""

    def __init__(self, ablation: Ablation, race: Race, seed: int) -> None:
        """Race the edits that `ablation` has in play, on its examples in an order drawn from `seed`.

        Raises: HonesError when the metric is not a mean over examples, which a bound could be had for.
        """
        examples = ablation.examples
        if not examples.is_mean:
            raise HonesError(
                f"--race needs a metric that is a mean over examples, but {examples.metric} of "
                f"{examples.task} is computed over the corpus: name another with --metric, save work with "
                "--screen first_order, or measure every head without --race"
            )
        self.ablation, self.race, self.seed = ablation, race, seed
        self._items = torch.tensor(list(ablation.in_play))
        self._sign = 1.0 if examples.higher_is_better else -1.0

    @property
    def finished(self) -> bool:
        """Whether every edit's place is settled."""
        return self.race.finished

    def stages(self) -> list[list[int]]:
        """The examples in random order, `LOOK` at a time."""
        count = len(self.ablation.examples)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [order[i : i + LOOK] for i in range(0, count, LOOK)]

    def zeros(self) -> dict[str, Tensor]:
        """As the ablation's."""
        return self.ablation.zeros()

    def measure(self, example: Example) -> Measurement:
        """The ablation's measurement of the edits in play."""
        self.ablation.in_play = self._in_play().tolist()
        measured = self.ablation.measure(example)
        self._refuse_outliers(example, measured.sums)
        return measured

    def look(self, stage: Sequence[Measurement]) -> None:
        """Tell the race what a stage measured, and let it settle what it can."""
        chosen = self._in_play()
        self.race.add(torch.stack([self._sign * one.sums["metric_drop"][chosen] for one in stage]))
        self.race.look()

    def state(self) -> dict[str, Tensor]:
        """The state of the race."""
        return self.race.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on with the race from a `state`."""
        self.race.restore(state)

    def chosen(self) -> Tensor:
        """For every edit of the ablation, whether the race let it in [E]."""
        inside = torch.zeros(len(self.ablation.edits), dtype=torch.bool)
        inside[self._items[self.race.place == 1]] = True
        return inside

    def report(self, delta: float) -> dict[str, Any]:
        """How the race went; edits are named by their sites."""
        seen, examples = self.race.seen, self.race.examples
        undecided = self._items[self.race.undecided].tolist()
        return {
            "delta": delta,
            "bound": self.race.bound,
            "span": self.race.span,
            "order_seed": self.seed,
            "examples_run": int(seen.max()),
            "undecided": [list(self.ablation.edits[number].site) for number in undecided],
            "work_saved": 1 - float(seen.sum()) / (examples * len(self._items)),
        }

    def _in_play(self) -> Tensor:
        return self._items[self.race.in_play]

    def _refuse_outliers(self, example: Example, sums: dict[str, Tensor]) -> None:
        """The bounds hold for drops within the span alone."""
        drops = sums["metric_drop"][self._in_play()]
        lowest, highest = torch.cat([drops, drops.new_zeros(1)]).aminmax()
        widest = float(highest - lowest)
        if widest > self.race.span * (1 + 1e-9):
            raise HonesError(
                f"{example.task}, doc_id {example.doc_id}: two answers differ by {widest:g} in "
                f"{self.ablation.examples.metric}, more than the {self.race.span:g} that --race goes by: "
                "give the width of the metric's range with --race_span"
            )


def in_order(scores: Tensor, chosen: Tensor) -> Tensor:
    """Scores [E] in which everything chosen is above everything else, as the race has shown.

    What was not chosen is a mean over fewer examples and may by chance come out above the lowest of the
    chosen; it then stands just below it.
    """
    limit = torch.nextafter(scores[chosen].min(), scores.new_tensor(-torch.inf))
    return torch.where(chosen, scores, scores.clamp(max=float(limit)))
