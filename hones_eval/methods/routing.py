"""Counts of the examples on which each neuron of a mixture of experts was measured.

A token is routed to a few experts. The activations of all other experts are 0 for it, which says nothing of
what they do. A neuron of an expert that no example was routed to, at the tokens that a method reads, is
therefore not measured: its score is stored as 0, its count of examples is 0, and it is never selected.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hones_eval.core.artifact import ModelShape
from hones_eval.runs.measure import Totals


def routed_zeros(shape: ModelShape) -> dict[str, Tensor]:
    """The sum `routed` [L, I] of a mixture of experts; nothing for other models."""
    if not shape.has_experts:
        return {}
    return {"routed": torch.zeros(shape.layers, shape.neurons, dtype=torch.float64)}


def add_routed(sums: Mapping[str, Tensor], shape: ModelShape, activations: Sequence[Tensor]) -> None:
    """Count one example, given the activations [I] of every layer in its unedited pass."""
    if "routed" in sums:
        for layer, z in enumerate(activations):
            sums["routed"][layer] += shape.routed(layer, z).double().cpu()


def unmeasured_report(totals: Totals, shape: ModelShape) -> dict[str, Any]:
    """How many neurons, of how many experts, were not measured; nothing for a model without experts."""
    routed = totals.sums.get("routed")
    if routed is None:
        return {}
    missing = (routed == 0) & shape.neuron_mask()
    experts = 0
    for layer in range(shape.layers):
        start = 0
        for count, width in shape.expert_groups(layer):
            part = missing[layer, start : start + count * width].unflatten(-1, (count, width))
            experts, start = experts + int(part.all(-1).sum()), start + count * width
    every = sum(count for layer in range(shape.layers) for count, _ in shape.expert_groups(layer))
    return {
        "neurons_not_measured": int(missing.sum()),
        "experts_never_routed_to": experts,
        "experts": every,
    }
