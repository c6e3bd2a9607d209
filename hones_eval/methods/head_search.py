"""The search for the best heads: every head on every example, or less with a race or after a screen.

Measuring every head on every example is exact. Three options save work. A screen first estimates all heads by
one backward pass per example and measures only the best of them. A race measures a head until a confidence
bound shows that it is, or is not, among the best. A budget states how much work is done: it screens, measures
the heads that are left on more and more examples while it drops the worst, and measures the last few on all
examples.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hones_eval.choices import Bound, Screen
from hones_eval.core.sites import Head, top_heads
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods.attribution import Attribution
from hones_eval.methods.localization import HeadLocalization
from hones_eval.methods.raced import LOOK, RacedAblation, in_order
from hones_eval.runs.elimination import Cut, Elimination, schedule, spent
from hones_eval.runs.lightning import Loop
from hones_eval.runs.measure import Measure, Measurement, Totals
from hones_eval.runs.racing import Race

SCREENED = 2.0
"""With a budget, the share of heads that the screen keeps, as a multiple of the budget."""
GRADIENT_EXAMPLES = 128
"""With a budget, the number of examples by which heads are screened, at most."""


@dataclass(frozen=True)
class Savings:
    """The options that save work; by default every head is measured on every example."""

    race: float | None = None
    """The probability with which the raced best heads may differ from the exact ones; None for no race."""
    race_bound: Bound = "betting"
    race_span: float = 1.0
    """The largest difference of the metric between two answers to one example."""
    screen: Screen | None = None
    screen_share: float = 0.25
    """The share of all heads that is measured after a screen."""
    budget: float | None = None
    """The share of an exact search's head-examples to measure; it chooses screen and elimination itself."""
    metric_only: bool = False
    """Whether the gold answer's log-probability is left out where it takes passes of its own."""

    def __post_init__(self) -> None:
        """Reject race_* and screen_* options when --race or --screen is off; they would be ignored."""
        for option, asked in (
            ("race_bound", self.race),
            ("race_span", self.race),
            ("screen_share", self.screen),
        ):
            if asked is None and getattr(self, option) != getattr(type(self), option):
                of = option.split("_")[0]
                raise HonesError(f"--{option} {getattr(self, option)} has no effect without --{of}")
        if self.budget is None:
            return
        if not 0 < self.budget < 1:
            raise HonesError(f"--budget must lie between 0 and 1, but is {self.budget}")
        if self.race is not None or self.screen is not None:
            raise HonesError("--budget screens and drops heads by itself: leave out --race and --screen")

    @property
    def is_exact(self) -> bool:
        """Whether every head is measured on every example."""
        return self.race is None and self.screen is None and self.budget is None

    def settings(self) -> dict[str, Any]:
        """The settings in use, as a ranking records them."""
        used = [name for name in ("race", "screen", "budget") if getattr(self, name) is not None]
        found = {key: value for key, value in asdict(self).items() if key.split("_")[0] in used}
        return found | ({"metric_only": True} if self.metric_only else {})

    def check(self, heads: int, keep: int, processes: int) -> None:
        """Raise HonesError for impossible settings, before the work.

        Args:
            heads: heads of the model.
            keep: the number of best heads that are wanted.
            processes: processes that share the work.
        """
        if self.race is not None:
            Race(heads, keep, 1, self.race)  # refuses impossible risks and numbers
            racing = heads if self.screen is None else self.screened(heads)
            if keep == racing:
                raise HonesError(
                    f"all {racing} heads are wanted, so there is nothing to race for: lower --heads, or "
                    "leave out --race"
                )
            if self.race_span <= 0:
                raise HonesError(
                    f"--race_span must be above 0, but is {self.race_span}: it is the width of the metric's "
                    "range"
                )
        if self.race is not None or self.budget is not None:
            self._check_processes(processes)
        if self.budget is not None and int(self.budget * heads) < keep:
            raise HonesError(
                f"--budget {self.budget} pays for {int(self.budget * heads)} of {heads} heads on all "
                f"examples, fewer than the {keep} to select: raise --budget or lower --heads"
            )
        if self.screen is not None and keep > self.screened(heads):
            raise HonesError(
                f"the screen keeps {self.screened(heads)} of {heads} heads, fewer than the {keep} to select: "
                "raise --screen_share or lower --heads"
            )

    def _check_processes(self, processes: int) -> None:
        if processes > LOOK:
            flag = "--race" if self.race is not None else "--budget"
            raise HonesError(
                f"a race is evaluated every {LOOK} examples, so of {processes} processes some would have "
                f"no work: use at most {LOOK} processes, or leave out {flag}"
            )

    def screened(self, heads: int) -> int:
        """The number of heads that the screen keeps. Raises: HonesError for an impossible share."""
        if not 0 < self.screen_share <= 1:
            raise HonesError(f"--screen_share must lie above 0 and at most 1, but is {self.screen_share}")
        return max(1, round(self.screen_share * heads))


class Located(NamedTuple):
    """The scores of heads [L, H] that a search found.

    `measured` [L, H] counts the examples each head was measured on; None means every head on all examples.
    `totals` are the sums of the pass, and `report` describes the race and the screen.
    """

    scores: Tensor
    log_probability: Tensor | None
    measured: Tensor | None
    totals: Totals
    report: dict[str, Any]

    def top(self, count: int) -> list[Head]:
        """The `count` best of the measured heads."""
        return top_heads(self.scores, count, None if self.measured is None else self.measured > 0)


def localize(localization: HeadLocalization, loop: Loop, keep: int, savings: Savings, seed: int) -> Located:
    """Search for the `keep` best heads.

    Args:
        localization: the measurement, on its own examples.
        loop: runs it.
        keep: the number of best heads that are wanted.
        savings: the race and the screen.
        seed: of the order in which a race takes examples.
    """
    report: dict[str, Any] = {}
    if savings.screen is not None:
        count = savings.screened(len(localization.heads))
        report["screen"] = _screen(localization, loop.run, count) | {"share": savings.screen_share}
    raced: RacedAblation | None = None
    if savings.budget is not None:
        raced = _within_budget(localization, loop, keep, savings, seed, report)
    elif savings.race is not None:
        items = len(localization.in_play)
        race = Race(
            items, keep, len(localization.examples), savings.race, savings.race_span, savings.race_bound
        )
        raced = RacedAblation(localization, race, seed)
    if raced is None:
        totals = loop.run(localization.examples, localization, "heads")
        scores = localization.scores(totals)
    else:
        totals = loop.run_in_stages(localization.examples, raced, "race")
        scores = localization.scores(totals)
        there = localization.replayer.anatomy.shape.head_mask()
        scores[there] = in_order(scores[there], raced.chosen())
    if raced is not None and savings.race is not None:
        report["race"] = raced.report(savings.race)
    measured = localization.by_layer(totals.sums["measured"])
    if savings.budget is not None:
        report["budget"] |= {"head_examples": int(measured.sum())}
        report["budget"] |= {} if raced is None else raced.elimination_report()
    log_probability = None if savings.metric_only else localization.log_probability_scores(totals)
    return Located(scores, log_probability, measured if report else None, totals, report)


def _within_budget(
    localization: HeadLocalization,
    loop: Loop,
    keep: int,
    savings: Savings,
    seed: int,
    report: dict[str, Any],
) -> RacedAblation | None:
    """Screen, and prepare the elimination of the heads that are left; None where the metric has no mean.

    A metric that is computed over the corpus tells nothing on a part of the examples. Then the screen leaves
    as many heads as the budget can measure on all of them.
    """
    assert savings.budget is not None
    heads, examples = len(localization.heads), len(localization.examples)
    measurements = int(savings.budget * heads * examples)
    kept, cuts = measurements // examples, None
    if localization.examples.is_mean:
        kept, cuts = planned(heads, keep, examples, measurements)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed)).tolist()
    sample = order[:GRADIENT_EXAMPLES]

    def estimate(_: TaskExamples, measure: Measure, name: str) -> Totals:
        return loop.run_in_stages(localization.examples, _Sampled(measure, sample), name)

    report["screen"] = _screen(localization, estimate, kept) | {"share": kept / heads}
    report["budget"] = {
        "share": savings.budget,
        "head_examples_of_an_exact_search": heads * examples,
        "gradient_examples": len(sample),
        "risk_bound": None,
    }
    if cuts is None:
        return None
    estimates = torch.tensor(report["screen"]["estimates"])[localization.replayer.anatomy.shape.head_mask()]
    hints = estimates[localization.in_play]
    return RacedAblation(localization, Elimination(kept, keep, examples, cuts, hints=hints), seed)


def planned(heads: int, keep: int, examples: int, measurements: int) -> tuple[int, list[Cut]]:
    """The number of heads that the screen keeps within a budget, and when heads are dropped after it.

    Where a budget is too small for dropping, the screen keeps as many as it can measure on all examples.
    """
    kept = max(keep, min(heads, round(SCREENED * measurements / examples)))
    cuts = schedule(kept, keep, examples, measurements, LOOK)
    if spent(kept, examples, cuts) > measurements:
        return measurements // examples, []
    return kept, cuts


class _Sampled:
    """A measure of some of the examples only."""

    def __init__(self, measure: Measure, indices: Sequence[int]) -> None:
        self._measure, self._indices, self._done = measure, list(indices), 0
        self.zeros, self.measure = measure.zeros, measure.measure

    @property
    def finished(self) -> bool:
        return self._done == len(self._indices)

    def stages(self) -> list[list[int]]:
        return [self._indices[i : i + LOOK] for i in range(0, len(self._indices), LOOK)]

    def look(self, stage: Sequence[Measurement]) -> None:
        self._done += len(stage)

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self._done)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._done = int(state["done"])


def _screen(
    localization: HeadLocalization, run: Callable[[TaskExamples, Measure, str], Totals], count: int
) -> dict[str, Any]:
    """Keep the `count` best heads in play, by first-order estimates."""
    anatomy = localization.replayer.anatomy
    attribution = Attribution(
        anatomy,
        localization.decoder.append_answer,
        localization.replacement,
        tracker=localization.decoder.replayer.tracker,
    )
    estimates = Attribution.scores(run(localization.examples, attribution, "screen"))
    heads = len(localization.heads)
    kept = top_heads(estimates, count, anatomy.shape.head_mask())
    localization.in_play = [localization.heads.index(head) for head in sorted(kept)]
    return {
        "by": "first-order estimates of the change of the gold answer's margin; needs gradients",
        "heads_measured": len(kept),
        "heads_not_measured": heads - len(kept),
        "estimates": estimates.tolist(),
    }
