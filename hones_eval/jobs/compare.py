"""Compare several rankings of one model: layer curves, shared groups, overlaps, cross-task masking."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from hones_eval.choices import Correction
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron, matched_random, top_heads
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError, MisfitError
from hones_eval.jobs.verify import Measured, as_drop, masked, refuse_shared_images
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods.answers import BASELINE, AnswersUnder, answered
from hones_eval.methods.banks import check_fits
from hones_eval.runs.lightning import Loop
from hones_eval.stats.paired import Floats
from hones_eval.stats.verdicts import Contrast, judge

Site = Head | Neuron


class Overlap(NamedTuple):
    """The sites that two banks share, compared with chance."""

    first: str
    second: str
    shared: int
    jaccard: float
    chance: float
    """Expected Jaccard index of two random banks of the same sizes."""
    chance_by_layer: float
    """The same for random banks with the same number of sites per layer: the share of the overlap that is
    explained by both banks crowding the same layers."""
    p_by_layer: float
    """The probability that such layer-matched random banks share at least as many sites."""


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Rankings of one model by name, and how many sites of each to compare."""

    rankings: Mapping[str, Ranking]
    neurons: float | None = None
    heads: int = 30

    def __post_init__(self) -> None:
        """Reject fewer than two rankings, and rankings of different models."""
        if len(self.rankings) < 2:
            raise HonesError(f"a comparison needs at least two rankings, not {len(self.rankings)}")
        (first, reference), *others = self.rankings.items()
        for name, other in others:
            try:
                check_fits(other, reference.provenance.shape, f"the model of {first}")
            except MisfitError as error:
                raise MisfitError(f"{name}: {error}") from None

    def neuron_banks(self) -> dict[str, list[Neuron]]:
        """The selected neurons of every ranking that has neuron scores."""
        return {
            name: ranking.neurons(self.neurons)
            for name, ranking in self.rankings.items()
            if ranking.neuron_scores is not None
        }

    def head_banks(self) -> dict[str, list[Head]]:
        """The best heads with a score above 0; for V-SEAM rankings the positive and the negative heads."""
        banks: dict[str, list[Head]] = {}
        for name, ranking in self.rankings.items():
            if ranking.head_positive is not None and ranking.head_negative is not None:
                banks[f"{name} +"] = _best(ranking.head_positive, self.heads)
                banks[f"{name} -"] = _best(ranking.head_negative, self.heads)
            elif ranking.head_scores is not None:
                banks[name] = _best(ranking.head_scores, self.heads)
        return banks

    def overlaps(self) -> dict[str, list[Overlap]]:
        """The overlap of every pair of banks, by kind of site."""
        shape = next(iter(self.rankings.values())).provenance.shape
        layers = range(shape.layers)
        return {
            "neurons": overlaps(self.neuron_banks(), [shape.neurons_of(layer) for layer in layers]),
            "heads": overlaps(self.head_banks(), [shape.heads_of(layer) for layer in layers]),
        }

    def report(self) -> dict[str, Any]:
        """Layer curves, groups and overlaps as a JSON-ready mapping."""
        neurons, heads = self.neuron_banks(), self.head_banks()
        shape = next(iter(self.rankings.values())).provenance.shape
        found = self.overlaps()
        return {
            "rankings": {name: ranking.digest for name, ranking in self.rankings.items()},
            "neurons_by_layer": {name: by_layer(bank, shape.layers) for name, bank in neurons.items()},
            "heads_by_layer": {name: by_layer(bank, shape.layers) for name, bank in heads.items()},
            "groups": {group_name(names): len(bank) for names, bank in self.groups().items()},
            "neuron_overlaps": [overlap._asdict() for overlap in found["neurons"]],
            "head_overlaps": [overlap._asdict() for overlap in found["heads"]],
            "not_measured": self.not_measured(),
        }

    def not_measured(self) -> list[dict[str, Any]]:
        """Per ranking of a mixture of experts, the neurons and experts that no example was routed to."""
        keys = ("neurons_not_measured", "experts_never_routed_to", "experts")
        reports = {name: ranking.report or {} for name, ranking in self.rankings.items()}
        return [
            {"ranking": name, **{key: report[key] for key in keys}}
            for name, report in reports.items()
            if report.get("neurons_not_measured")
        ]

    def groups(self) -> dict[tuple[str, ...], list[Neuron]]:
        """For every combination of rankings, the neurons that exactly these select (possibly none)."""
        return groups(self.neuron_banks())

    def group_ranking(self, names: tuple[str, ...], bank: Sequence[Neuron]) -> Ranking:
        """Make a group a ranking that selects exactly its neurons, for use by `verify` and `scale`.

        A member's score is its mean importance over the group's rankings, each divided by that ranking's
        largest importance; every other neuron scores 0. The provenance names the examples of all compared
        rankings, because the rankings outside the group also decide which neurons are in it.
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
        sets = {used.hash: used for each in self.rankings.values() for used in each.provenance.examples}
        made_from = {name: self.rankings[name].digest for name in self.rankings}
        provenance = dataclasses.replace(
            source,
            method="group",
            settings={"neurons": len(bank) / int(source.shape.neuron_mask().sum()), "group": list(names)},
            examples=list(sets.values()),
            ranking={"method": "group", "digests": made_from},
        )
        return Ranking(provenance, neuron_scores=scores, report={"neurons": len(bank)})


def groups(banks: Mapping[str, Sequence[Neuron]]) -> dict[tuple[str, ...], list[Neuron]]:
    """For every combination of banks, the neurons that are in all of them and in no other bank."""
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
    """The name of a group, also used for its folder."""
    return "+".join(names)


def by_layer(bank: Sequence[Site], layers: int) -> list[int]:
    """The number of a bank's sites in each layer [L]."""
    counts = Counter(site[0] for site in bank)
    return [counts[layer] for layer in range(layers)]


def overlaps(banks: Mapping[str, Sequence[Site]], widths: Sequence[int]) -> list[Overlap]:
    """The Jaccard index of every pair of banks, and its value by chance, overall and layer by layer.

    Args:
        banks: the sites of each bank.
        widths: the number of sites that each layer has.
    """
    return [_overlap(first, second, banks, widths) for first, second in combinations(banks, 2)]


def _overlap(first: str, second: str, banks: Mapping[str, Sequence[Site]], widths: Sequence[int]) -> Overlap:
    a, b, layers = banks[first], banks[second], len(widths)
    shared = len({*a} & {*b})
    union = len({*a} | {*b})
    anywhere = chance_of_sharing([len(a)], [len(b)], [sum(widths)])
    same_layers = chance_of_sharing(by_layer(a, layers), by_layer(b, layers), widths)
    return Overlap(
        first,
        second,
        shared,
        shared / union if union else 0.0,
        _expected_jaccard(anywhere, len(a), len(b)),
        _expected_jaccard(same_layers, len(a), len(b)),
        float(min(1.0, same_layers[shared:].sum())),
    )


def chance_of_sharing(a: Sequence[int], b: Sequence[int], widths: Sequence[int]) -> Floats:
    """The probabilities that two random banks share 0, 1, 2, ... sites.

    Within a layer the number of shared sites is hypergeometric; over layers the distributions convolve.

    Args:
        a: the number of sites of one bank in each layer.
        b: the same for the other bank.
        widths: the number of sites in each layer.
    """
    total = np.ones(1)
    for in_a, in_b, width in zip(a, b, widths, strict=True):
        most = min(in_a, in_b)
        total = np.convolve(total, stats.hypergeom.pmf(np.arange(most + 1), width, in_a, in_b))
    return total


def _expected_jaccard(chance: Floats, a: int, b: int) -> float:
    shared = np.arange(len(chance))
    return float((chance * shared / np.maximum(a + b - shared, 1)).sum())


class Crossing(NamedTuple):
    """One cell of the cross-task matrix: mask one ranking's bank, measure another ranking's task."""

    masked: str
    measured: str
    baseline: float
    metric: float
    drop: dict[str, Any]
    relative_drop: dict[str, Any]
    random_drop: float
    """The drop of a random bank with as many neurons in each layer."""


def cross(
    comparison: Comparison,
    replayer: Replayer,
    tasks: Sequence[TaskExamples],
    loop: Loop,
    seed: int = 0,
    correction: Correction = "holm",
) -> list[Crossing]:
    """Mask every bank on every task, with a matched random bank each: the cross-task matrix (HONES 3).

    Raises: HonesError when a task shows an image that one of the rankings was made from.
    """
    banks: Mapping[str, Sequence[Site]] = comparison.neuron_banks() or comparison.head_banks()
    rankings, anatomy = list(comparison.rankings.values()), replayer.anatomy
    for ranking in rankings:
        check_fits(ranking, anatomy.shape, type(anatomy.model).__name__)
        for examples in tasks:
            refuse_shared_images(ranking.provenance, examples.example_set(), "cross-masking")
    steerings = {}
    for name, bank in banks.items():
        if not bank:
            raise HonesError(f"{name} selects no sites: there is nothing to mask")
        steerings[name] = masked(rankings[0], bank)
        steerings[f"random {name}"] = masked(rankings[0], _random_like(bank, anatomy, seed))
    found: list[Crossing] = []
    contrasts: list[Contrast] = []
    for examples in tasks:
        totals = loop.run(examples, AnswersUnder(replayer, examples, steerings), examples.task)
        measured = Measured(examples, answered(totals), seed)
        contrasts += measured.contrasts(list(banks))
        for name in banks:
            drops, random = measured.drops(name), measured.drops(f"random {name}")
            found.append(
                Crossing(
                    name,
                    examples.task,
                    measured.value(BASELINE),
                    drops["metric"],
                    drops["metric_drop"],
                    drops["relative_drop"],
                    random["metric_drop"]["value"],
                )
            )
    # The verdicts are corrected over the whole matrix.
    return [
        cell._replace(drop=as_drop(judged))
        for cell, judged in zip(found, judge(contrasts, correction), strict=True)
    ]


def _random_like(bank: Sequence[Site], anatomy: Anatomy, seed: int) -> list[Head] | list[Neuron]:
    places = [Neuron(*site) for site in bank]
    if isinstance(bank[0], Neuron):
        return matched_random(places, anatomy.shape, seed)
    heads = [anatomy.shape.heads_of(layer) for layer in range(anatomy.shape.layers)]
    return [Head(*site) for site in matched_random(places, heads, seed)]


def _best(scores: torch.Tensor, count: int) -> list[Head]:
    return [head for head in top_heads(scores, min(count, scores.numel())) if scores[head] > 0]


def load_named(folders: Sequence[Path]) -> dict[str, Ranking]:
    """Load rankings, named by task; if names repeat, by task and method, or else by folder."""
    loaded = [Ranking.load(folder) for folder in folders]
    tasks = [ranking.provenance.examples[0].task for ranking in loaded]
    methods = [f"{task} {ranking.provenance.method}" for task, ranking in zip(tasks, loaded, strict=True)]
    for names in (tasks, methods, [folder.resolve().name for folder in folders], list(map(str, folders))):
        if len(set(names)) == len(names):
            return dict(zip(names, loaded, strict=True))
    raise HonesError("the same folder is given twice; give different rankings")
