"""Turn the scores of a ranking into the scales of a steering."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hones_eval.core.artifact import ExampleSet, Provenance
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron, scales_of, top_heads
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError
from hones_eval.limits import LARGEST_SCALE


def _bounded(scale: float) -> float:
    """A scale that was asked for. Raises: HonesError when it is not finite, or larger than any useful one."""
    if not abs(scale) <= LARGEST_SCALE:
        raise HonesError(f"a scale of {scale:g} was asked for: give numbers up to {LARGEST_SCALE:g}")
    return scale


def fixed(ranking: Ranking, factor: float, neurons: float | None = None) -> Steering:
    """Scale all selected neurons by one factor (HONES 4)."""
    bank = ranking.neurons(neurons)
    return scaled_neurons(ranking, bank, factor, {"how": "fixed", "factor": factor, "count": len(bank)})


def of_neurons(ranking: Ranking, scales: Tensor, settings: dict[str, Any]) -> Steering:
    """A steering with these neuron scales [L, I]."""
    return _steering(ranking, settings, neuron_scales=scales)


def of_sites(
    ranking: Ranking,
    head_scales: Tensor,
    neuron_scales: Tensor,
    settings: dict[str, Any],
    head_shifts: Tensor | None = None,
    neuron_shifts: Tensor | None = None,
) -> Steering:
    """A steering with these scales of heads [L, H] and neurons [L, I], and shifts [L, H, d] and [L, I]."""
    steering = _steering(ranking, settings, head_scales=head_scales, neuron_scales=neuron_scales)
    return dataclasses.replace(steering, head_shifts=head_shifts, neuron_shifts=neuron_shifts)


def chosen(steering: Steering, settings: dict[str, Any], development: ExampleSet) -> Steering:
    """Add development examples, and `settings`, to the provenance of a steering."""
    source = steering.provenance
    provenance = dataclasses.replace(
        source, settings=source.settings | settings, examples=[*source.examples, development]
    )
    return dataclasses.replace(steering, provenance=provenance)


def grouped_scales(ranking: Ranking, groups: Sequence[Sequence[Neuron]], factors: Sequence[float]) -> Tensor:
    """Scales [L, I] with one factor per group of neurons, and 1 elsewhere."""
    scales = torch.ones(ranking.provenance.shape.layers, ranking.provenance.shape.neurons)
    for group, factor in zip(groups, factors, strict=True):
        for neuron in group:
            scales[neuron] = _bounded(factor)
    return scales


def signed(ranking: Ranking, strength: float = 1.0, epsilon: float = 0.0) -> Steering:
    """Scale every head by `clip(1 + strength * s, 0, 2)`, with |s| below `epsilon` as 0 (V-SEAM 4).

    The scores `s` of V-SEAM and of confirmed rankings are signed drops. Those of attribution patching are
    mean absolute values, which would raise heads that hurt as well: its signed means, the direction, are
    used instead.
    """
    scores = _signed_scores(ranking)
    kept = torch.where(scores.abs() < epsilon, torch.zeros_like(scores), scores)
    scales = (1 + strength * kept).clamp(0, 2)
    settings = {"how": "signed", "lambda": strength, "epsilon": epsilon}
    return _steering(ranking, settings, head_scales=scales)


def signed_neurons(ranking: Ranking, strength: float = 0.5, neurons: float | None = None) -> Steering:
    """Raise the selected neurons that help and lower those that hurt, each by how much it does.

    A neuron's scale is `clip(1 + strength * d / max |d|, 0, 2)`, where `d` is its direction (the signed mean
    of attribution patching: positive where masking the neuron lowers the objective; in a confirmed ranking
    its exact effect) and the maximum is over the selected neurons. So `strength` is the largest change.

    Raises: HonesError for a ranking without directions.
    """
    if ranking.neuron_direction is None:
        raise HonesError(
            "this ranking does not say which neurons help and which hurt: rank with --method atp"
        )
    direction = ranking.neuron_direction
    if ranking.neuron_estimate is not None and ranking.neuron_scores is not None:
        exact = ranking.neuron_scores if ranking.neuron_single is None else ranking.neuron_single
        direction = torch.where(ranking.measured_neurons(), exact, direction)
    bank = ranking.neurons(neurons)
    values = [float(direction[neuron]) for neuron in bank]
    largest = max((abs(value) for value in values), default=0.0)
    scales = torch.ones_like(direction)
    for neuron, value in zip(bank, values, strict=True):
        change = _bounded(strength) * value / largest if largest else 0.0
        scales[neuron] = min(2.0, max(0.0, 1 + change))
    settings = {"how": "signed_neurons", "strength": strength, "count": len(bank)}
    return _steering(ranking, settings, neuron_scales=scales)


def topk(ranking: Ranking, count: int, enhance: float, suppress: float) -> Steering:
    """Scale the top positive heads by `1 + enhance` and the top negative ones by `1 - suppress` (V-SEAM 4).

    A head that is in both lists is treated by the larger of its two scores, and left unchanged if they are
    equal. The settings name the heads that are in both lists.
    """
    if ranking.head_positive is None or ranking.head_negative is None:
        raise HonesError("topk needs positive and negative head scores: rank with --method vseam")
    scales = torch.ones_like(ranking.head_positive)
    up = set(_positive(ranking.head_positive, count))
    down = set(_positive(ranking.head_negative, count))
    positive, negative = ranking.head_positive, ranking.head_negative
    for head in up | down:
        helps = float(positive[head]) if head in up else 0.0
        hurts = float(negative[head]) if head in down else 0.0
        if helps != hurts:
            scales[head] = _bounded(1 + enhance if helps > hurts else 1 - suppress)
    settings: dict[str, Any] = {"how": "topk", "heads": count, "enhance": enhance, "suppress": suppress}
    if up & down:
        settings["in_both_lists"] = [list(head) for head in sorted(up & down)]
    return _steering(ranking, settings, head_scales=scales)


def scaled_neurons(
    ranking: Ranking, bank: Sequence[Neuron], factor: float, settings: dict[str, Any]
) -> Steering:
    """A steering that multiplies every neuron of a bank by one factor; the factor 0 masks them."""
    return _scaled(ranking, bank, "neurons", factor, settings)


def scaled_heads(
    ranking: Ranking, heads: Sequence[Head], factor: float, settings: dict[str, Any]
) -> Steering:
    """A steering that multiplies every head of a bank by one factor; the factor 0 masks them."""
    return _scaled(ranking, heads, "heads", factor, settings)


def _scaled(
    ranking: Ranking, bank: Sequence[Head | Neuron], kind: str, factor: float, settings: dict[str, Any]
) -> Steering:
    if not bank:
        raise HonesError(f"the selection of {kind} is empty: there is nothing to scale")
    return of_sites(
        ranking, *scales_of(ranking.provenance.shape, bank, [_bounded(factor)] * len(bank)), settings
    )


def _positive(scores: Tensor, count: int) -> list[Head]:
    return [head for head in top_heads(scores, count) if scores[head] > 0]


def _signed_scores(ranking: Ranking) -> Tensor:
    """Scores [L, H] that are positive for heads that help and negative for heads that hurt."""
    if ranking.head_direction is not None and ranking.head_estimate is None:
        return ranking.head_direction
    return _head_scores(ranking)


def _head_scores(ranking: Ranking) -> Tensor:
    if ranking.head_scores is None:
        raise HonesError("this ranking has no head scores")
    return ranking.head_scores


def _steering(
    ranking: Ranking,
    settings: dict[str, Any],
    head_scales: Tensor | None = None,
    neuron_scales: Tensor | None = None,
) -> Steering:
    shape = ranking.provenance.shape
    source = ranking.provenance
    provenance: Provenance = dataclasses.replace(
        source,
        settings=settings,
        ranking={"method": source.method, "settings": source.settings, "digest": ranking.digest},
    )
    return Steering(
        head_scales=torch.ones(shape.layers, shape.heads) if head_scales is None else head_scales,
        neuron_scales=torch.ones(shape.layers, shape.neurons) if neuron_scales is None else neuron_scales,
        provenance=provenance,
    )
