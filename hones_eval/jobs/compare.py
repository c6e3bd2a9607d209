"""Several rankings of one model side by side: layers, shared groups, overlaps, cross-masking."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron, matched_random, top_heads
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError, MisfitError
from hones_eval.jobs.verify import Measured, masked, refuse_shared_pictures
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods.answers import AnswersUnder, answered
from hones_eval.methods.banks import check_fits
from hones_eval.runs.lightning import Loop
from hones_eval.stats.paired import Floats

Site = Head | Neuron


class Overlap(NamedTuple):
    """What two banks share, beside what chance would."""

    first: str
    second: str
    shared: int
    jaccard: float
    chance: float
    """Expected Jaccard index of two random banks of these sizes."""
    chance_by_layer: float
    """The same when both keep their numbers in each layer: what crowding in the same layers explains."""
    p_by_layer: float
    """How often such random banks share at least as many."""


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Rankings of one model by name, and how many sites of each are compared."""

    rankings: Mapping[str, Ranking]
    neurons: float | None = None
    heads: int = 30

    def __post_init__(self) -> None:
        """Refuse fewer than two rankings, and rankings of different models."""
        if len(self.rankings) < 2:
            raise HonesError(f"comparing takes at least two rankings, not {len(self.rankings)}")
        (first, one), *others = self.rankings.items()
        for name, other in others:
            try:
                check_fits(other, one.provenance.shape, f"the model of {first}")
            except MisfitError as error:
                raise MisfitError(f"{name}: {error}") from None

    def neuron_banks(self) -> dict[str, list[Neuron]]:
        """Selected neurons of the rankings that have neuron scores."""
        known = {name: one for name, one in self.rankings.items() if one.neuron_scores is not None}
        return {name: one.neurons(self.neurons) for name, one in known.items()}

    def head_banks(self) -> dict[str, list[Head]]:
        """Best heads with a score above 0; of V-SEAM's rankings the positive and the negative ones."""
        banks: dict[str, list[Head]] = {}
        for name, one in self.rankings.items():
            if one.head_positive is not None and one.head_negative is not None:
                banks[f"{name} +"] = _best(one.head_positive, self.heads)
                banks[f"{name} -"] = _best(one.head_negative, self.heads)
            elif one.head_scores is not None:
                banks[name] = _best(one.head_scores, self.heads)
        return banks

    def overlaps(self) -> dict[str, list[Overlap]]:
        """Every pair of banks, by kind of site."""
        shape = next(iter(self.rankings.values())).provenance.shape
        return {
            "neurons": overlaps(self.neuron_banks(), shape.layers, shape.neurons),
            "heads": overlaps(self.head_banks(), shape.layers, shape.heads),
        }

    def report(self) -> dict[str, Any]:
        """Layer curves, groups and overlaps, ready for JSON."""
        neurons, heads = self.neuron_banks(), self.head_banks()
        shape = next(iter(self.rankings.values())).provenance.shape
        found = self.overlaps()
        return {
            "rankings": {name: one.digest for name, one in self.rankings.items()},
            "neurons_by_layer": {name: by_layer(bank, shape.layers) for name, bank in neurons.items()},
            "heads_by_layer": {name: by_layer(bank, shape.layers) for name, bank in heads.items()},
            "groups": {group_name(names): len(bank) for names, bank in self.groups().items()},
            "neuron_overlaps": [one._asdict() for one in found["neurons"]],
            "head_overlaps": [one._asdict() for one in found["heads"]],
        }

    def groups(self) -> dict[tuple[str, ...], list[Neuron]]:
        """Neurons selected by exactly these rankings, for every combination of them, possibly none."""
        return groups(self.neuron_banks())

    def group_ranking(self, names: tuple[str, ...], bank: Sequence[Neuron]) -> Ranking:
        """A group as a ranking of its own, whose selection is the group: for `verify` and `scale`.

        A member scores its mean importance over the group's rankings, each as a share of that ranking's
        largest; every other neuron scores 0. The provenance names the examples of all the rankings compared,
        since who is *not* in a group depends on them too.
        """
        if not bank:
            raise HonesError(f"no neuron is shared by exactly {group_name(names)}")
        parts = [self.rankings[name].neuron_scores for name in names]
        shares = torch.stack([part / part.max().clamp(min=1e-30) for part in parts if part is not None])
        mean = shares.mean(0).clamp(min=1e-6)
        scores = torch.zeros_like(mean)
        for neuron in bank:
            scores[neuron] = mean[neuron]
        source = self.rankings[names[0]].provenance
        sets = {one.hash: one for each in self.rankings.values() for one in each.provenance.examples}
        made_from = {name: self.rankings[name].digest for name in self.rankings}
        provenance = dataclasses.replace(
            source,
            method="group",
            settings={"neurons": len(bank) / scores.numel(), "group": list(names)},
            examples=list(sets.values()),
            ranking={"method": "group", "digests": made_from},
        )
        return Ranking(provenance, neuron_scores=scores, report={"neurons": len(bank)})


def groups(banks: Mapping[str, Sequence[Neuron]]) -> dict[tuple[str, ...], list[Neuron]]:
    """For every combination of banks the neurons that are in all of them and in none of the others."""
    owners: dict[Neuron, tuple[str, ...]] = {}
    for name, bank in banks.items():
        for neuron in bank:
            owners[neuron] = (*owners.get(neuron, ()), name)
    sizes = range(1, len(banks) + 1)
    found: dict[tuple[str, ...], list[Neuron]] = {
        names: [] for size in sizes for names in combinations(banks, size)
    }
    for neuron in sorted(owners):
        found[owners[neuron]].append(neuron)
    return found


def group_name(names: Sequence[str]) -> str:
    """What a group is called, also as a folder."""
    return "+".join(names)


def by_layer(bank: Sequence[Site], layers: int) -> list[int]:
    """How many sites of a bank are in each layer."""
    counts = Counter(site[0] for site in bank)
    return [counts[layer] for layer in range(layers)]


def overlaps(banks: Mapping[str, Sequence[Site]], layers: int, width: int) -> list[Overlap]:
    """Every pair of banks: Jaccard index, and what it would be by chance, anywhere and layer by layer."""
    return [_overlap(one, other, banks, layers, width) for one, other in combinations(banks, 2)]


def _overlap(one: str, other: str, banks: Mapping[str, Sequence[Site]], layers: int, width: int) -> Overlap:
    a, b = banks[one], banks[other]
    shared = len({*a} & {*b})
    together = len({*a} | {*b})
    anywhere = chance_of_sharing([len(a)], [len(b)], layers * width)
    same_layers = chance_of_sharing(by_layer(a, layers), by_layer(b, layers), width)
    return Overlap(
        one,
        other,
        shared,
        shared / together if together else 0.0,
        _expected_jaccard(anywhere, len(a), len(b)),
        _expected_jaccard(same_layers, len(a), len(b)),
        float(min(1.0, same_layers[shared:].sum())),
    )


def chance_of_sharing(a: Sequence[int], b: Sequence[int], width: int) -> Floats:
    """Probabilities that random banks share 0, 1, 2, ... sites, each with so many in layers of `width` sites.

    In one layer the number is hypergeometric; the sum over layers is the convolution.
    """
    total = np.ones(1)
    for in_a, in_b in zip(a, b, strict=True):
        most = min(in_a, in_b)
        total = np.convolve(total, stats.hypergeom.pmf(np.arange(most + 1), width, in_a, in_b))
    return total


def _expected_jaccard(chance: Floats, a: int, b: int) -> float:
    shared = np.arange(len(chance))
    return float((chance * shared / np.maximum(a + b - shared, 1)).sum())


class Crossing(NamedTuple):
    """Mask one ranking's bank, measure another's task."""

    masked: str
    measured: str
    baseline: float
    metric: float
    drop: dict[str, Any]
    relative_drop: dict[str, Any]
    random_drop: float
    """The drop by a random bank with as many neurons in each layer."""


def cross(
    comparison: Comparison, replayer: Replayer, tasks: Sequence[TaskExamples], loop: Loop, seed: int = 0
) -> list[Crossing]:
    """The cross-task matrix: every bank masked on every task, beside a random bank each (HONES 3).

    Raises: HonesError when a task shows a picture that one of the rankings was made from.
    """
    banks: Mapping[str, Sequence[Site]] = comparison.neuron_banks() or comparison.head_banks()
    rankings, anatomy = list(comparison.rankings.values()), replayer.anatomy
    for ranking in rankings:
        check_fits(ranking, anatomy.shape, type(anatomy.model).__name__)
        for examples in tasks:
            refuse_shared_pictures(ranking.provenance, examples.example_set(), "cross-masking")
    steerings = {}
    for name, bank in banks.items():
        if not bank:
            raise HonesError(f"{name} selects nothing, so there is nothing to mask")
        steerings[name] = masked(rankings[0], bank)
        steerings[f"random {name}"] = masked(rankings[0], _random_like(bank, anatomy, seed))
    found = []
    for examples in tasks:
        totals = loop.run(examples, AnswersUnder(replayer, examples, steerings), examples.task)
        measured = Measured(examples, answered(totals), seed)
        base = float(measured.values["metric"].observed[0])
        for name in banks:
            drops, random = measured.drops(name), measured.drops(f"random {name}")
            found.append(
                Crossing(
                    name,
                    examples.task,
                    base,
                    drops["metric"],
                    drops["metric_drop"],
                    drops["relative_drop"],
                    random["metric_drop"]["value"],
                )
            )
    return found


def _random_like(bank: Sequence[Site], anatomy: Anatomy, seed: int) -> list[Head] | list[Neuron]:
    places = [Neuron(*site) for site in bank]
    if isinstance(bank[0], Neuron):
        return matched_random(places, anatomy.shape.neurons, seed)
    return [Head(*site) for site in matched_random(places, anatomy.shape.heads, seed)]


def _best(scores: torch.Tensor, count: int) -> list[Head]:
    return [head for head in top_heads(scores, min(count, scores.numel())) if scores[head] > 0]


def load_named(folders: Sequence[Path]) -> dict[str, Ranking]:
    """Rankings by their task; where that does not tell them apart, with their method, or by folder."""
    loaded = [Ranking.load(folder) for folder in folders]
    tasks = [one.provenance.examples[0].task for one in loaded]
    methods = [f"{task} {one.provenance.method}" for task, one in zip(tasks, loaded, strict=True)]
    for names in (tasks, methods, [folder.resolve().name for folder in folders], list(map(str, folders))):
        if len(set(names)) == len(names):
            return dict(zip(names, loaded, strict=True))
    raise HonesError("the same folder is given twice; a comparison is of different rankings")
