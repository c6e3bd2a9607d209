"""Learned scales: one parameter per neuron of a bank. The model is frozen and serves as its own teacher."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import Edit, editing
from hones_eval.core.sites import Neuron
from hones_eval.engine.decoding import Decoder
from hones_eval.engine.passes import refuse_not_finite
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example


class LearnedScales(nn.Module):
    """The only parameters: `a` [bank], by which a neuron becomes `z * (1 + a)` (HONES 4)."""

    def __init__(self, anatomy: Anatomy, bank: Sequence[Neuron]) -> None:
        """Start at `a = 0`, which leaves the model unchanged."""
        super().__init__()
        if not bank:
            raise HonesError("the selection of neurons is empty: there is nothing to learn scales for")
        self.anatomy = anatomy
        self.bank = list(bank)
        self.a = nn.Parameter(torch.zeros(len(bank), device=anatomy.unembedding.device))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Scale the bank within a `with` block; gradients flow to `a`."""
        layers = sorted({neuron.layer for neuron in self.bank})
        with editing([(self.anatomy.neurons_in[layer], self._edit(layer)) for layer in layers]):
            yield

    def scales(self) -> Tensor:
        """`1 + a` for the bank's neurons and 1 elsewhere, [L, I] float32 on the CPU."""
        shape = self.anatomy.shape
        scales = torch.ones(shape.layers, shape.neurons)
        for neuron, a in zip(self.bank, self.a.tolist(), strict=True):
            scales[neuron] = 1 + a
        return scales

    def _edit(self, layer: int) -> Edit:
        members = [i for i, neuron in enumerate(self.bank) if neuron.layer == layer]
        channels = torch.tensor([self.bank[i].neuron for i in members])

        def scale(x: Tensor) -> Tensor:
            ones = torch.ones(x.shape[-1], device=x.device)
            scales = ones.index_put((channels.to(x.device),), 1 + self.a[members].to(x.device))
            # Computed in float32: a bfloat16 scale near 1 would lose small steps.
            return (x.float() * scales).to(x.dtype)

        return scale


class Loss(NamedTuple):
    """The loss to minimize, and its parts."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


class AnswerLoss:
    """The loss of one example under learned scales (HONES 4)."""

    def __init__(
        self, scales: LearnedScales, decoder: Decoder, beta: float = 0.05, penalty: float = 1e-5
    ) -> None:
        """Cross-entropy of the answer, `beta` times KL(original || scaled), `penalty` times mean(a^2)."""
        self.scales, self.decoder, self.beta, self.penalty = scales, decoder, beta, penalty

    def __call__(self, example: Example) -> Loss:
        """Teacher-force the target after the prompt, with the scales and, for the KL term, without them.

        Raises: HonesError when the target has no tokens or the loss is not finite.
        """
        where = f"{example.task}, doc_id {example.doc_id}"
        if not example.target_ids:
            raise HonesError(f"{where}: its target has no tokens to learn from")
        inputs = self.decoder.append(example.inputs, example.target_ids[:-1])
        target = torch.tensor(example.target_ids, device=self.scales.a.device)
        with self.scales.attached():
            scaled = self._logits(inputs, len(target))
        original = None
        if self.beta:
            with torch.no_grad():
                original = self._logits(inputs, len(target))
        loss = answer_loss(scaled, original, target, self.scales.a, self.beta, self.penalty)
        if not bool(torch.isfinite(loss.total)):
            with self.scales.attached():
                refuse_not_finite(self.scales.anatomy, inputs, where)
        return loss

    def _logits(self, inputs: dict[str, Tensor], count: int) -> Tensor:
        logits: Tensor = self.scales.anatomy.model(**inputs, use_cache=False).logits
        return logits[0, -count:]


def answer_loss(
    scaled: Float[Tensor, "tokens vocabulary"],
    original: Float[Tensor, "tokens vocabulary"] | None,
    target: Int[Tensor, " tokens"],
    a: Float[Tensor, " bank"],
    beta: float,
    penalty: float,
) -> Loss:
    """Mean answer-token cross-entropy + `beta` KL(original || scaled) on answer tokens + `penalty` mean(a^2).

    `original` may be None where `beta` is 0. Computed in float32 (HONES 4).
    """
    log_scaled = torch.log_softmax(scaled.float(), -1)
    cross_entropy = F.nll_loss(log_scaled, target.to(scaled.device))
    divergence = torch.zeros((), device=scaled.device)
    if original is not None:
        log_original = torch.log_softmax(original.float(), -1)
        divergence = (log_original.exp() * (log_original - log_scaled)).sum(-1).mean()
    total = cross_entropy + beta * divergence + penalty * a.square().mean().to(scaled.device)
    return Loss(total, cross_entropy.detach(), divergence.detach())


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Switch off the gradients of all model parameters within a `with` block, and restore them afterwards."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def cosine(steps: int, last: float = 0.1) -> Callable[[int], float]:
    """A learning-rate factor that falls from 1 to `last` along half a cosine in `steps` steps."""
    curve = torch.cos(torch.linspace(0, torch.pi, steps + 1, dtype=torch.float64)).tolist()
    return lambda step: last + (1 - last) * (1 + curve[min(step, steps)]) / 2
