"""The search for the best heads: every head on every example, or less with a race or after a screen.

Measuring every head on every example is exact. Two options save work. A screen first estimates all heads by
one backward pass per example and measures only the best of them. A race measures a head until a confidence
bound shows that it is, or is not, among the best.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from hones_eval.choices import Bound, Screen
from hones_eval.core.sites import Head, top_heads
from hones_eval.errors import HonesError
from hones_eval.methods.attribution import Attribution
from hones_eval.methods.localization import HeadLocalization
from hones_eval.methods.raced import LOOK, RacedAblation, in_order
from hones_eval.runs.lightning import Loop
from hones_eval.runs.measure import Totals
from hones_eval.runs.racing import Race


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

    def settings(self) -> dict[str, Any]:
        """The settings in use, as a ranking records them."""
        used = [name for name in ("race", "screen") if getattr(self, name) is not None]
        return {key: value for key, value in asdict(self).items() if key.split("_")[0] in used}

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
            if processes > LOOK:
                raise HonesError(
                    f"a race is evaluated every {LOOK} examples, so of {processes} processes some would have "
                    f"no work: use at most {LOOK} processes, or leave out --race"
                )
        if self.screen is not None and keep > self.screened(heads):
            raise HonesError(
                f"the screen keeps {self.screened(heads)} of {heads} heads, fewer than the {keep} to select: "
                "raise --screen_share or lower --heads"
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
    log_probability: Tensor
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
    """Keep the best share of heads in play, by first-order estimates."""
    anatomy = localization.replayer.anatomy
    attribution = Attribution(
        anatomy,
        localization.decoder.append_answer,
        localization.replacement,
        tracker=localization.decoder.replayer.tracker,
    )
    estimates = Attribution.scores(loop.run(localization.examples, attribution, "screen"))
    count = len(localization.heads)
    kept = top_heads(estimates, savings.screened(count), anatomy.shape.head_mask())
    localization.in_play = [localization.heads.index(head) for head in sorted(kept)]
    return {
        "by": "first-order estimates of the change of the gold answer's margin; needs gradients",
        "share": savings.screen_share,
        "heads_measured": len(kept),
        "heads_not_measured": count - len(kept),
        "estimates": estimates.tolist(),
    }
