"""Localize heads on a set of examples: every head on every example, or with a race or a screen in front."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from hones_eval.choices import Bound, Screen
from hones_eval.core.sites import Head, top_heads
from hones_eval.errors import HonesError
from hones_eval.methods.first_order import FirstOrder
from hones_eval.methods.hones import HeadLocalization
from hones_eval.methods.raced import LOOK, RacedAblation, in_order
from hones_eval.runs.lightning import Loop
from hones_eval.runs.measure import Totals
from hones_eval.runs.racing import Race


@dataclass(frozen=True)
class Savings:
    """How to measure less than every head on every example; by default nothing is saved."""

    race: float | None = None
    """The risk that a raced top differs from the exact one."""
    race_bound: Bound = "betting"
    race_span: float = 1.0
    """The largest difference of the metric between two answers to one example."""
    screen: Screen | None = None
    screen_share: float = 0.25
    """The share of all heads that is measured, the best by the screen."""

    def __post_init__(self) -> None:
        """Refuse an option of what is not asked for, which would be passed over."""
        for option, asked in (
            ("race_bound", self.race),
            ("race_span", self.race),
            ("screen_share", self.screen),
        ):
            if asked is None and getattr(self, option) != getattr(type(self), option):
                of = option.split("_")[0]
                raise HonesError(f"--{option} {getattr(self, option)} says nothing without --{of}")

    def settings(self) -> dict[str, Any]:
        """What a ranking records: the settings in use."""
        used = [name for name in ("race", "screen") if getattr(self, name) is not None]
        return {key: value for key, value in asdict(self).items() if key.split("_")[0] in used}

    def check(self, heads: int, keep: int, processes: int) -> None:
        """Raise HonesError for settings that cannot be had, before the work."""
        if self.race is not None:
            Race(heads, keep, 1, self.race)  # refuses impossible risks and numbers
            racing = heads if self.screen is None else self.screened(heads)
            if keep == racing:
                raise HonesError(
                    f"{racing} heads cannot race for {keep} places: ask for fewer with --heads, or no --race"
                )
            if self.race_span <= 0:
                raise HonesError(f"--race_span is the width of the metric's range, not {self.race_span}")
            if processes > LOOK:
                raise HonesError(
                    f"a race is looked at every {LOOK} examples, so {processes} processes would wait for "
                    f"each other: use at most {LOOK}, or no --race"
                )
        if self.screen is not None and keep > self.screened(heads):
            raise HonesError(
                f"a screen that leaves {self.screened(heads)} of {heads} heads cannot give {keep}: raise "
                "--screen_share or lower --heads"
            )

    def screened(self, heads: int) -> int:
        """How many of all heads the screen leaves."""
        if not 0 < self.screen_share <= 1:
            raise HonesError(f"--screen_share must lie above 0 and at most 1, but is {self.screen_share}")
        return max(1, round(self.screen_share * heads))


class Located(NamedTuple):
    """Scores of heads [L, H], with what is behind them.

    `measured` [L, H]: on how many examples each head was measured, or None for all heads on all examples.
    `report`: what a reader should know of the race and the screen.
    """

    scores: Tensor
    log_probability: Tensor
    measured: Tensor | None
    totals: Totals
    report: dict[str, Any]

    def top(self, count: int) -> list[Head]:
        """The best of the heads that were measured."""
        return top_heads(self.scores, count, None if self.measured is None else self.measured > 0)


def localize(localization: HeadLocalization, loop: Loop, keep: int, savings: Savings, seed: int) -> Located:
    """The scores of all heads, of which the `keep` best are wanted; `seed` draws a race's order."""
    report: dict[str, Any] = {}
    if savings.screen is not None:
        report["screen"] = _screen(localization, loop, savings)
    if savings.race is None:
        totals = loop.run(localization.examples, localization, "heads")
        scores = localization.scores(totals)
    else:
        items = len(localization.in_play)
        race = Race(
            items, keep, len(localization.examples), savings.race, savings.race_span, savings.race_bound
        )
        raced = RacedAblation(localization, race, seed)
        totals = loop.run_in_stages(localization.examples, raced, "race")
        scores = localization.scores(totals)
        there = localization.replayer.anatomy.shape.head_mask()
        scores[there] = in_order(scores[there], raced.chosen())
        report["race"] = raced.report(savings.race)
    measured = localization.by_layer(totals.sums["measured"])
    return Located(
        scores, localization.log_probability_scores(totals), measured if report else None, totals, report
    )


def _screen(localization: HeadLocalization, loop: Loop, savings: Savings) -> dict[str, Any]:
    """Leave the best share of heads in play, by first-order estimates."""
    anatomy = localization.replayer.anatomy
    first_order = FirstOrder(anatomy, localization.decoder.append)
    estimates = FirstOrder.scores(loop.run(localization.examples, first_order, "screen"))
    count = len(localization.heads)
    left = top_heads(estimates, savings.screened(count), anatomy.shape.head_mask())
    localization.in_play = [localization.heads.index(head) for head in sorted(left)]
    return {
        "by": "first-order estimates of how far the target's margin moves; needs gradients",
        "share": savings.screen_share,
        "heads_measured": len(left),
        "heads_not_measured": count - len(left),
        "estimates": estimates.tolist(),
    }
