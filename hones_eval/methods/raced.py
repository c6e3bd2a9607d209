"""A raced ablation: an edit is measured only until it is settled whether it is among the best.

`hones_eval.runs.racing` and `hones_eval.runs.elimination` hold the statistics. This module feeds them with
drops of the task's metric. An example is decoded unedited once for all edits in play.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example
from hones_eval.runs.ablation import Ablation
from hones_eval.runs.elimination import Elimination
from hones_eval.runs.measure import Measurement
from hones_eval.runs.racing import Race

LOOK = 8
"""Examples per stage, after which the bounds are evaluated; also the most processes that can share a race."""


class RacedAblation:
    """Measures each example under the edits that are still in play, by drops of the task's metric."""

    def __init__(self, ablation: Ablation, race: Race | Elimination, seed: int) -> None:
        """Race the edits that `ablation` has in play, on its examples in an order drawn from `seed`.

        `race` decides which edits leave: a race where a bound shows it, an elimination at fixed points.

        Raises: HonesError when the metric is not a mean over examples: the bounds only hold for means.
        """
        examples = ablation.examples
        if not examples.is_mean:
            raise HonesError(
                f"--race needs a metric that is a mean over examples, but {examples.metric} of "
                f"{examples.task} is computed over the corpus: choose another --metric, use --screen "
                "first_order instead, or measure every head without --race"
            )
        self.ablation, self.race, self.seed = ablation, race, seed
        self._items = torch.tensor(list(ablation.in_play))
        self._sign = 1.0 if examples.higher_is_better else -1.0

    @property
    def finished(self) -> bool:
        """Whether the race has settled for every edit whether it is among the best."""
        return self.race.finished

    def stages(self) -> list[list[int]]:
        """The examples in random order, `LOOK` at a time."""
        count = len(self.ablation.examples)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [order[i : i + LOOK] for i in range(0, count, LOOK)]

    def zeros(self) -> dict[str, Tensor]:
        """The ablation's sums."""
        return self.ablation.zeros()

    def measure(self, example: Example) -> Measurement:
        """Measure one example under the edits in play."""
        self.ablation.in_play = self._in_play().tolist()
        measured = self.ablation.measure(example)
        self._refuse_outliers(example, measured.sums)
        return measured

    def look(self, stage: Sequence[Measurement]) -> None:
        """Add the drops of one stage to the race, and settle what the bounds allow."""
        chosen = self._in_play()
        self.race.add(torch.stack([self._sign * measured.sums["metric_drop"][chosen] for measured in stage]))
        self.race.look()

    def state(self) -> dict[str, Tensor]:
        """The state of the race."""
        return self.race.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue the race from a `state`."""
        self.race.restore(state)

    def chosen(self) -> Tensor:
        """Whether each edit of the ablation is among the best, by the race [E]."""
        inside = torch.zeros(len(self.ablation.edits), dtype=torch.bool)
        inside[self._items[self.race.place == 1]] = True
        return inside

    def report(self, delta: float) -> dict[str, Any]:
        """The outcome of a race as plain JSON; edits are named by their sites."""
        assert isinstance(self.race, Race)
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

    def elimination_report(self) -> dict[str, Any]:
        """The outcome of an elimination as plain JSON."""
        assert isinstance(self.race, Elimination)
        return {
            "head_examples": int(self.race.seen.sum()),
            "heads_measured_on_all_examples": len(self.race.undecided),
            "heads_eliminated": int((self.race.seen < self.race.examples).sum()),
            "cuts": [list(cut) for cut in self.race.cuts],
            "risk_bound": self.race.risk(),
            "order_seed": self.seed,
        }

    def _in_play(self) -> Tensor:
        return self._items[self.race.in_play]

    def _refuse_outliers(self, example: Example, sums: dict[str, Tensor]) -> None:
        """Raise HonesError for drops outside the span, for which the bounds do not hold."""
        if isinstance(self.race, Elimination):  # it needs no span, and then states no bound
            return
        drops = sums["metric_drop"][self._in_play()]
        lowest, highest = torch.cat([drops, drops.new_zeros(1)]).aminmax()
        widest = float(highest - lowest)
        if widest > self.race.span * (1 + 1e-9):
            raise HonesError(
                f"{example.task}, doc_id {example.doc_id}: two answers differ by {widest:g} in "
                f"{self.ablation.examples.metric}, more than the {self.race.span:g} that --race "
                "assumes: give the width of the metric's range as --race_span"
            )


def in_order(scores: Tensor, chosen: Tensor) -> Tensor:
    """Scores [E] in which every chosen edit is above every other edit, as the race has shown.

    The score of an edit that was not chosen is a mean over fewer examples. By chance it can come out above
    the lowest chosen score; it is then lowered to just below it.
    """
    limit = torch.nextafter(scores[chosen].min(), scores.new_tensor(-torch.inf))
    return torch.where(chosen, scores, scores.clamp(max=float(limit)))
