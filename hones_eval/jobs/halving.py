"""Choose factors for groups of sites without gradients, by successive halving.

Each candidate gives one factor to each group of heads and neurons. All candidates are measured on an eighth
of the development images; the better half goes on to a quarter, and so on, until the last few are measured on
all images. Candidates that differ little early on are told apart by more images, and hopeless ones cost
little. Candidates are compared by the loss of the gold answer, which moves with every scale, where the metric
moves only when an answer changes. Forward passes are all that is needed, so this works for models without
gradients (integer weights, offloaded layers, kernels without a backward pass).

The method is that of Jamieson and Talwalkar, "Non-stochastic Best Arm Identification" (2016).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron, scales_of
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.jobs.tune import folds_by_image
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.learning import Fold, TargetLosses
from hones_eval.runs.lightning import Loop

CANDIDATES = 64
"""How many candidates start, at most."""
PARTS = 8
"""The first rung measures one of this many parts of the images."""

Groups = Sequence[Sequence[Head | Neuron]]


class Halved(NamedTuple):
    """The steering with the smallest loss, or None where none lowers it, and a report."""

    steering: Steering | None
    report: dict[str, Any]


def halve(
    ranking: Ranking,
    replayer: Replayer,
    examples: TaskExamples,
    groups: Groups,
    factors: Sequence[float],
    loop: Loop,
    seed: int = 0,
) -> Halved:
    """Choose one factor per group of sites; every process gets the same.

    Args:
        ranking: whose model is steered.
        replayer: the model.
        examples: the development examples; at least eight images.
        groups: the sites that share a factor.
        factors: the factors to try; 1 leaves a group unchanged.
        loop: the processes to run on.
        seed: of the candidates and of the order of the images.

    Raises: HonesError when no factor differs from 1, or with fewer than eight images.
    """
    drawn = candidates(len(groups), factors, CANDIDATES, seed)
    steerings = {str(row): _steering(ranking, groups, row) for row in drawn}
    parts = folds_by_image(examples, PARTS, seed)
    order = [index for part in parts for index in part]
    sums = dict.fromkeys(steerings, 0.0)
    without, done, rungs = 0.0, 0, []
    alive = list(steerings)
    ends = [sum(map(len, parts[: 2**power])) for power in range(4)]
    for rung, end in enumerate(ends):
        chosen = order[done:end]
        added = _losses(replayer, examples, {name: steerings[name] for name in alive}, chosen, loop, rung)
        without += added.pop("")
        for name, loss in added.items():
            sums[name] += loss
        done = end
        alive.sort(key=sums.__getitem__)
        rungs.append({"examples": done, "candidates": len(alive), "best": sums[alive[0]] / done})
        if end < len(order):
            alive = alive[: math.ceil(len(alive) / 2)]
    best = alive[0]
    report: dict[str, Any] = {
        "groups": [_about(group) for group in groups],
        "factors_tried": list(factors),
        "candidates": len(drawn),
        "rungs": rungs,
        "seed": seed,
        "loss_without": without / done,
    }
    if sums[best] >= without:
        return Halved(None, report)
    row = drawn[list(steerings).index(best)]
    return Halved(steerings[best], report | {"factors": list(row), "loss": sums[best] / done})


def candidates(groups: int, factors: Sequence[float], most: int, seed: int) -> list[tuple[float, ...]]:
    """Factors per group: every single group with every factor, then random combinations, without repeats.

    Where single groups alone would fill the list, a random half of it is combinations.

    Examples:
        >>> candidates(2, (1.0, 2.0), 10, 0)
        [(2.0, 1.0), (1.0, 2.0), (2.0, 2.0)]
    """
    changing = [factor for factor in dict.fromkeys(factors) if factor != 1]
    if not changing:
        raise HonesError("--factors has no factor but 1, so there is nothing to choose: add another")
    generator = torch.Generator().manual_seed(seed)
    singles = [
        tuple(factor if place == group else 1.0 for place in range(groups))
        for group in range(groups)
        for factor in changing
    ]
    if len(singles) > most // 2:
        kept = torch.randperm(len(singles), generator=generator)[: most // 2].tolist()
        singles = [singles[place] for place in sorted(kept)]
    found = dict.fromkeys(singles)
    values = [1.0, *changing]
    possible = len(values) ** groups - 1
    for _ in range(50 * most):
        if len(found) >= min(most, possible):
            break
        drawn = torch.randint(len(values), (groups,), generator=generator).tolist()
        row = tuple(float(values[place]) for place in drawn)
        if any(factor != 1 for factor in row):
            found[row] = None
    return list(found)


def _steering(ranking: Ranking, groups: Groups, factors: Sequence[float]) -> Steering:
    sites = [site for group in groups for site in group]
    own = [factor for group, factor in zip(groups, factors, strict=True) for _ in group]
    return scaling.of_sites(ranking, *scales_of(ranking.provenance.shape, sites, own), {})


def _losses(
    replayer: Replayer,
    examples: TaskExamples,
    steerings: Mapping[str, Steering],
    indices: Sequence[int],
    loop: Loop,
    rung: int,
) -> dict[str, float]:
    """The sum of the gold answer's loss over some examples under each steering, and without one as ""."""
    totals = loop.run(
        examples, TargetLosses(replayer, [Fold(steerings, indices)], with_end=True), f"halving-{rung + 1}"
    )
    return dict(zip(["", *steerings], totals.sums["losses"].tolist(), strict=True))


def _about(group: Sequence[Head | Neuron]) -> dict[str, Any]:
    """The kind, layers and number of a group's sites."""
    kind = "heads" if isinstance(group[0], Head) else "neurons"
    return {"kind": kind, "layers": sorted({site.layer for site in group}), "sites": len(group)}
