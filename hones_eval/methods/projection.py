"""Direct vocabulary projection: how much each neuron writes towards an example's target."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.adapters import has_adapter
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.experts import NeuronTap
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example


def write_gains(anatomy: Anatomy, example: Example, token_weights: Tensor | None = None) -> list[Tensor]:
    """Per layer, `W_down^T u_y` [I] for the target direction `u_y` of an example (HONES 2).

    Args:
        anatomy: of the model.
        example: gives the target's tokens.
        token_weights: one weight per token of the vocabulary [V]; by default all weigh 1.

    Raises: HonesError when the target has no tokens.
    """
    if not example.target_ids:
        raise HonesError(f"{example.where}: its gold answer {example.target!r} has no tokens")
    weights = None if token_weights is None else token_weights[example.target_ids].tolist()
    direction = readouts.target_direction(anatomy.unembedding, example.target_ids, weights)
    layers = range(anatomy.shape.layers)
    return [write_gain(anatomy, layer, direction) for layer in layers]


def write_gain(anatomy: Anatomy, layer: int, direction: Tensor) -> Tensor:
    """`W_down^T u_y` [I] of one layer; of experts one by one, without a copy of all their weights."""
    module = anatomy.neurons_in[layer].module
    parts = module.linear_parts() if isinstance(module, NeuronTap) else []
    weights = [part.weight for _, part, *_ in parts]
    plain = all(isinstance(weight, Tensor) and weight.is_floating_point() for weight in weights)
    if not parts or not plain or any(has_adapter(part) for _, part, *_ in parts):
        return readouts.write_gain(anatomy.down_weight(layer), direction)
    gains = [readouts.write_gain(weight, direction) for weight in weights if isinstance(weight, Tensor)]
    return anatomy.padded(torch.cat(gains))


def inverse_document_frequency(documents: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Smoothed inverse document frequency of every token [vocabulary] (HONES 2).

    `ln((n + 1) / (df + 1)) + 1`, where `n` is the number of documents and `df` the number of documents that
    contain the token. Each example is one document, the set of tokens in all its references.
    """
    frequency = torch.zeros(vocabulary, dtype=torch.float64)
    for document in documents:
        frequency[sorted(set(document))] += 1
    return torch.log((len(documents) + 1) / (frequency + 1)) + 1


def check_finite_neurons(layers: Sequence[Tensor], example: Example) -> None:
    """Raise HonesError with the first layer whose FFN activations, or a product of them, are not finite."""
    for layer, values in enumerate(layers):
        if not bool(torch.isfinite(values).all()):
            raise HonesError(f"{example.where}: the FFN activations of layer {layer} are not finite")
