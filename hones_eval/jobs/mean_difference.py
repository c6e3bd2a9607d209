"""`scale --how mean_difference`: shift heads and neurons by differences of mean activations."""

from dataclasses import replace
from typing import Any

import torch

from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError
from hones_eval.jobs.scale import Development, best_of, measure_candidates
from hones_eval.jobs.verify import refuse_shared_images
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.answers import BASELINE
from hones_eval.methods.mean_difference import GROUPS, MeanActivations, difference

STRENGTHS = (0.5, 1.0, 2.0, 4.0)
HEADS = 10
FEW = 10
"""With fewer examples than this on either side the difference of means gets a warning."""


def mean_difference(
    job: Development, against: TaskExamples | None, heads: int | None, strength: float | None
) -> Steering:
    """Shift the best heads, and neurons if asked for, by a difference of their mean activations.

    The difference is that of rightly and wrongly answered development examples or, with `against`, of the
    development task and another one.

    Args:
        job: the ranking and the development examples; its `neurons` is the share of neurons to shift.
        against: the examples of the other task; None compares right with wrong answers.
        heads: how many of the ranking's best heads to shift; by default 10, or none where `job.neurons` is
            given.
        strength: what the difference is multiplied by; None chooses the best of several on the development
            examples.

    Raises: HonesError when a group has no example, or nothing is to be shifted.
    """
    count = heads if heads is not None else 0 if job.neurons is not None else HEADS
    if not count and job.neurons is None:
        raise HonesError("--heads 0 leaves nothing to shift: give --neurons too")
    added, neurons_added, examples = _differences(job, against)
    shape = job.ranking.provenance.shape
    chosen_heads = torch.zeros(shape.layers, shape.heads, 1)
    chosen_neurons = torch.zeros(shape.layers, shape.neurons)
    if count and job.ranking.head_scores is None:
        raise HonesError("this ranking has no head scores: give --neurons and --heads 0")
    for head in job.ranking.heads(count) if count else []:
        chosen_heads[head] = 1
    for neuron in job.ranking.neurons(job.neurons) if job.neurons is not None else []:
        chosen_neurons[neuron] = 1
    ones = torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.neurons)
    whole = replace(
        scaling.of_sites(job.ranking, *ones, {}),
        head_shifts=added * chosen_heads,
        neuron_shifts=neurons_added * chosen_neurons,
    )
    settings: dict[str, Any] = {
        "how": "mean_difference",
        "heads": count,
        "count": int(chosen_neurons.sum()),
        "against": None if against is None else against.task,
        "examples": examples,
        "metric": job.examples.metric,
    }
    if min(examples.values()) < FEW:
        settings["warnings"] = [
            f"the difference of means is of {' and '.join(f'{n} {group}' for group, n in examples.items())} "
            f"examples: with fewer than {FEW} it is mostly chance"
        ]
    steering, found = _at_best_strength(job, whole, strength)
    steering = scaling.chosen(steering, settings | found, job.example_set)
    if against is None:
        return steering
    source = steering.provenance
    return replace(steering, provenance=replace(source, examples=[*source.examples, against.example_set()]))


def _differences(
    job: Development, against: TaskExamples | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """The differences of heads [L, H, d] and neurons [L, I], and the count of examples of each group."""
    if against is None:
        totals = job.loop.run(
            job.examples, MeanActivations(job.replayer, job.examples, by_answer=True), "activations"
        )
        right, wrong = GROUPS
        heads, neurons = difference(totals, totals, right, wrong)
        return heads, neurons, {group: int(totals.sums[f"{group} examples"]) for group in GROUPS}
    if against.example_set().hash == job.examples.example_set().hash:
        raise HonesError(
            f"--tasks and --against are both {against.task}: the difference of their means is 0; leave "
            "--against out to compare right with wrong answers"
        )
    refuse_shared_images(job.ranking.provenance, against.example_set(), "choosing shifts")
    both = [
        job.loop.run(examples, MeanActivations(job.replayer, examples, by_answer=False), name)
        for examples, name in ((job.examples, "activations"), (against, "activations against"))
    ]
    heads, neurons = difference(both[0], both[1], "all", "all")
    names = (job.examples.task, against.task)
    return heads, neurons, {name: int(t.sums["all examples"]) for name, t in zip(names, both, strict=True)}


def _at_best_strength(
    job: Development, whole: Steering, strength: float | None
) -> tuple[Steering, dict[str, Any]]:
    """The shifts at the given strength, or at the one with the best metric on the development examples."""
    if strength is not None:
        return whole.at_strength(strength), {"strength": strength}
    tried = sorted({0.0, *(job.strengths or STRENGTHS)})
    candidates = {f"{factor:g}": whole.at_strength(factor) for factor in tried}
    found = measure_candidates(job, candidates, "mean_difference")
    best = best_of(job, [found[name] for name in candidates], [abs(factor) for factor in tried])
    return candidates[f"{tried[best]:g}"], {
        "strength": tried[best],
        "baseline": found[BASELINE],
        "best": found[f"{tried[best]:g}"],
        "metric_by_strength": {name: found[name] for name in candidates},
    }
