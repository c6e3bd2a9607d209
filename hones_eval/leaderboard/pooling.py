"""Several seeds of one steering as one row: is there an effect beyond the luck of one draw?

Steerings are draws of one thing if they differ in their seed alone: the same method, way of scaling, task,
numbers of examples, strength and scope, on the same base model and with the same settings of the run. Each
example counts once, with its mean difference over the seeds, and the mean differences are tested as graded
scores are. Metrics of a whole corpus are not pooled.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hones_eval.choices import Correction
from hones_eval.leaderboard.identity import SteeringRef
from hones_eval.leaderboard.rows import Row, Verdict, per_example, sensible
from hones_eval.stats.paired import Comparison, compare_graded
from hones_eval.stats.verdicts import FEWEST_UNITS, corrected

LEARNED = ("learning_rate", "accumulate", "penalty", "clip_norm", "limit")
GIVEN = {
    "fixed": ("factor",),
    "learned": LEARNED,
    "learned_no_kl": LEARNED,
    "random": LEARNED,
    "tuned": ("rates", "sites"),
    "halving": ("factors_tried",),
    "mean_difference": ("strength",),
    "signed": ("lambda", "epsilon"),
    "topk": ("enhance", "suppress", "heads"),
    "signed_neurons": ("strength",),
}
"""The settings that belong to a way of scaling where they were given, and not chosen on examples."""
SHARED = ("count", "beta", "epochs", "ceiling", "sparsity", "folds", "heads", "against", "shifts")
"""Settings that are never a result."""


@dataclass(frozen=True, eq=False)
class Pooled:
    """One metric of one task with several seeds of a steering, compared with the baseline."""

    members: tuple[Row, ...]
    comparison: Comparison
    units: int
    p_adjusted: float | None = None
    correction: Correction = "holm"

    @property
    def label(self) -> str:
        """What was drawn several times."""
        steering = self.members[0].pair.steered.steering
        assert steering is not None
        return steering.label

    @property
    def verdict(self) -> Verdict:
        """By the rule of single rows."""
        return self._as_row.verdict

    @property
    def _as_row(self) -> Row:
        return replace(self.members[0], comparison=self.comparison, p_adjusted=self.p_adjusted)

    def record(self) -> dict[str, Any]:
        """The row as a JSON-ready mapping."""
        first, interval = self.members[0], self.comparison.interval
        return {
            "steering": self.label,
            "task": first.pair.steered.task,
            "metric": first.metric.name,
            "seeds": len(self.members),
            "baseline": float(np.mean([row.baseline for row in self.members])),
            "steered": float(np.mean([row.steered for row in self.members])),
            "difference": self.comparison.difference,
            "interval": None if interval is None else [interval.low, interval.high],
            f"p_{self.correction}": self.p_adjusted,
            "verdict": self.verdict,
        }


def pool_seeds(rows: Sequence[Row], seed: int, resamples: int, correction: Correction) -> list[Pooled]:
    """Pool rows whose steerings differ in their seed alone; p-values are corrected over the pooled rows."""
    groups: dict[Hashable, dict[Hashable, Row]] = defaultdict(dict)
    for row in rows:
        steering = row.pair.steered.steering
        if steering is not None and row.metric.higher_is_better is not None:
            run = row.pair.steered
            place = (run.base, *row.group[1:], *sorted(run.settings.items()))
            groups[place, thing(steering)].setdefault(seeds(steering), row)
    found = [_pooled(list(members.values()), seed, resamples) for members in groups.values()]
    pooled = [row for row in found if row is not None]
    p = [test.p for row in pooled if (test := row.comparison.test) is not None]
    return [
        replace(row, p_adjusted=adjusted, correction=correction)
        for row, adjusted in zip(pooled, corrected(p, correction), strict=True)
    ]


def thing(steering: SteeringRef) -> Hashable:
    """Equal for steerings that differ in their seed alone."""
    settings = _settings(steering)
    how = str(settings.get("how"))
    developed = any(name.startswith("metric_by") for name in settings)
    named = (*SHARED, *(() if developed else GIVEN.get(how, ())))
    source = steering.provenance.get("ranking")
    made = source.get("settings") if isinstance(source, Mapping) else None
    ranked = {name: value for name, value in (made or {}).items() if name != "seed"}
    return (
        steering.label,
        steering.identity[1:],
        tuple(str(settings.get(name)) for name in named),
        repr(sorted(ranked.items(), key=lambda item: str(item[0]))),
        tuple(str([part.get(key) for key in ("task", "split", "count")]) for part in steering.example_sets),
    )


def seeds(steering: SteeringRef) -> Hashable:
    """The seeds of a steering's ranking and of its scales."""
    return (str(steering.provenance.get("seed")), str(_settings(steering).get("seed")))


def _settings(steering: SteeringRef) -> Mapping[str, Any]:
    settings = steering.provenance.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _pooled(members: Sequence[Row], seed: int, resamples: int) -> Pooled | None:
    """One pooled row; None for a single seed, other examples, or a metric without a value per example."""
    first = members[0]
    if len(members) < 2 or first.units < FEWEST_UNITS:
        return None
    columns, clusters = [], None
    for row in members:
        found = per_example(row.pair, row.metric)
        if found is None:
            return None
        name = first.metric.filter
        mine, theirs = (member.pair.steered.samples[name].doc_ids for member in (row, first))
        if not np.array_equal(mine, theirs):
            return None
        differences, clusters = found
        columns.append(differences)
    mean = np.mean(columns, axis=0)[:, None]
    (comparison,) = compare_graded(mean, clusters, seed=seed, resamples=resamples)
    comparison = sensible(replace(first, comparison=comparison)).comparison
    if comparison.test is None:
        return None
    return Pooled(tuple(members), comparison, first.units)
