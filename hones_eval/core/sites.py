"""Sites: the heads and neurons that are scored and scaled, and the selection of the best of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hones_eval.core.artifact import ModelShape
from hones_eval.errors import HonesError


class Head(NamedTuple):
    """Query head `head` of decoder layer `layer`: a slice of the input of that layer's `o_proj`."""

    layer: int
    head: int


class Neuron(NamedTuple):
    """FFN neuron `neuron` of decoder layer `layer`: one feature of the input of that layer's `down_proj`."""

    layer: int
    neuron: int


def top_heads(scores: Tensor, count: int, among: Tensor | None = None) -> list[Head]:
    """Return the `count` heads with the highest scores; ties go to the lower (layer, head).

    Args:
        scores: head scores [L, H].
        count: how many heads to choose.
        among: bool [L, H], the heads that were measured and may be chosen; None means all of them.

    Raises: HonesError when there are fewer heads than `count`.
    """
    if among is None:
        return [Head(*site) for site in _top(scores, count, "heads")]
    measured = int(among.sum())
    if not 1 <= count <= measured:
        raise HonesError(f"cannot choose {count} of the {measured} heads that were measured")
    return [Head(*site) for site in _top(scores.masked_fill(~among, -torch.inf), count, "heads")]


def top_neurons(scores: Tensor, count: int) -> list[Neuron]:
    """Return the `count` neurons with the highest scores [L, I]; ties go to the lower (layer, neuron)."""
    return [Neuron(*site) for site in _top(scores, count, "neurons")]


def neuron_count(scores: Tensor, fraction: float) -> int:
    """Convert a fraction of all neurons to a count: `max(1, round(fraction * L * I))` (HONES 2)."""
    if not 0 < fraction <= 1:
        raise HonesError(f"the share of neurons must lie above 0 and at most 1, but is {fraction}")
    return max(1, round(fraction * scores.numel()))


def matched_random(bank: list[Neuron], width: int | Sequence[int] | ModelShape, seed: int) -> list[Neuron]:
    """Draw a random bank that has as many neurons in each layer as `bank`.

    Neurons of the bank itself are excluded, unless a layer has too few others: then the draw is from the
    whole layer. No neuron is drawn twice.

    Args:
        bank: the bank to match.
        width: neurons per layer, `I`, or one number per layer, or the model's shape. With the shape of a
            mixture of experts the bank is matched within each expert of each layer.
        seed: the same seed gives the same bank.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Neuron] = []
    groups: dict[tuple[int, range], set[int]] = {}
    for neuron in bank:
        groups.setdefault((neuron.layer, _group(neuron, width)), set()).add(neuron.neuron)
    for layer, members in sorted(groups, key=lambda group: (group[0], group[1].start)):
        taken = groups[layer, members]
        others = [index for index in members if index not in taken]
        pool = others if len(others) >= len(taken) else list(members)
        order = torch.randperm(len(pool), generator=generator)[: len(taken)]
        drawn += [Neuron(layer, pool[i]) for i in sorted(order.tolist())]
    return drawn


def _group(neuron: Neuron, width: int | Sequence[int] | ModelShape) -> range:
    """The neurons that may replace one: those of its layer, or of its expert."""
    if isinstance(width, ModelShape):
        return width.alike(*neuron)
    return range(width if isinstance(width, int) else width[neuron.layer])


def all_heads(shape: ModelShape) -> list[Head]:
    """Every head of a model, in ascending order of (layer, head)."""
    return [Head(layer, head) for layer in range(shape.layers) for head in range(shape.heads_of(layer))]


def scales_of(
    shape: ModelShape, sites: Sequence[Head | Neuron], values: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Scales of heads [L, H] and neurons [L, I]: one value per site, and 1 for every other site."""
    heads, neurons = torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.neurons)
    for scales, kind in ((heads, Head), (neurons, Neuron)):
        chosen = [(*site, value) for site, value in zip(sites, values, strict=True) if isinstance(site, kind)]
        if chosen:
            layers, numbers, own = zip(*chosen, strict=True)
            scales[torch.tensor(layers), torch.tensor(numbers)] = torch.tensor(own, dtype=torch.float32)
    return heads, neurons


def _top(scores: Tensor, count: int, kind: str) -> list[tuple[int, int]]:
    if scores.ndim != 2:
        raise HonesError(f"scores must be [layers, {kind}], but have the shape {tuple(scores.shape)}")
    if not 1 <= count <= scores.numel():
        raise HonesError(f"cannot choose {count} of {scores.numel()} {kind}: ask for 1 to {scores.numel()}")
    # A stable sort keeps equal scores in the order (layer, site).
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices[:count]
    return [divmod(int(i), scores.shape[1]) for i in order]
