"""Learned scales, and shifts, of the sites of a bank. The model is frozen and serves as its own teacher."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ModelShape
from hones_eval.core.changes import row_edits
from hones_eval.core.edits import Scaling
from hones_eval.core.hooks import Edit, Site
from hones_eval.core.scope import ScopeTracker, editing_in
from hones_eval.core.sites import Head, Neuron, scales_of
from hones_eval.core.steering import Steering
from hones_eval.engine.decoding import Decoder, end_tokens, repeat_example
from hones_eval.engine.passes import last_activations, refuse_not_finite
from hones_eval.engine.prompts import own_tokens
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example
from hones_eval.lmms.examples.dataset import TARGET_TOKENS
from hones_eval.runs.measure import Measurement, Totals


class Learned(NamedTuple):
    """Learned scales of heads [L, H] and neurons [L, I], and shifts [L, H, d] and [L, I] if learned."""

    head_scales: Tensor
    neuron_scales: Tensor
    head_shifts: Tensor | None = None
    neuron_shifts: Tensor | None = None


class LearnedScales(nn.Module):
    """The only parameters: `a`, which holds the change of the scale of each site of a bank (HONES 4).

    A site's activation `z` becomes `z * (1 + a)`. Where shifts are learned as well, `a` is followed by one
    number per feature: one for a neuron, `d` for a head. `z` becomes `z * (1 + a) + unit * c`, with those
    numbers `c` and a unit per site. With the usual size of the site's activation as its unit, `c` has no
    dimension, like `a`, so that one learning rate, one ceiling and one sparsity serve both.
    """

    def __init__(self, anatomy: Anatomy, bank: Sequence[Head | Neuron], units: Tensor | None = None) -> None:
        """Start at `a = 0`, which leaves the model unchanged. `units` [bank] are those of shifts, if any."""
        super().__init__()
        if not bank:
            raise HonesError("the selection of sites is empty: there is nothing to learn scales for")
        self.anatomy = anatomy
        self.bank = list(bank)
        widths = torch.tensor([self._width(site) for site in self.bank])
        self._starts = len(self.bank) + widths.cumsum(0) - widths  # where the shifts of a site begin in `a`
        self._units = None if units is None else units.repeat_interleave(widths).to(anatomy.device)
        count = len(self.bank) + (0 if units is None else int(widths.sum()))
        self.a = nn.Parameter(torch.zeros(count, device=anatomy.device))
        self._edits = self._made_edits()

    @contextmanager
    def attached(self, tracker: ScopeTracker | None = None, answer: int = 0) -> Iterator[None]:
        """Scale, and shift, the bank within a `with` block; gradients flow to `a`.

        `tracker` knows the tokens that are scaled, by default all; the last `answer` tokens are the answer's.
        """
        with editing_in(tracker, self._edits, answer):
            yield

    @torch.no_grad()
    def clamp_(self, floor: float, limit: float) -> None:
        """Keep the changes of scales between `floor` and `limit`, and shifts between -`limit` and `limit`."""
        count = len(self.bank)
        self.a[:count].clamp_(floor, limit)
        self.a[count:].clamp_(-limit, limit)

    def learned(self) -> Learned:
        """Scales, and shifts if they are learned, as a steering has them: float32 on the CPU."""
        shape, count = self.anatomy.shape, len(self.bank)
        scales = scales_of(shape, self.bank, [1 + a for a in self.a[:count].tolist()])
        if self._units is None:
            return Learned(*scales)
        shifts = self._shifts().detach().cpu()
        heads = torch.zeros(shape.layers, shape.heads, shape.head_width)
        neurons = torch.zeros(shape.layers, shape.neurons)
        starts = self._starts - count
        of_heads, of_neurons = _places(self.bank)
        for place in of_heads.tolist():
            site, start = self.bank[place], int(starts[place])
            heads[site][: self._width(site)] = shifts[start : start + self._width(site)]
        layers, numbers = torch.tensor(self.bank).T
        neurons[layers[of_neurons], numbers[of_neurons]] = shifts[starts[of_neurons]]
        return Learned(*scales, heads, neurons)

    def _width(self, site: Head | Neuron) -> int:
        return self.anatomy.shape.head_width_of(site.layer) if isinstance(site, Head) else 1

    def _shifts(self) -> Tensor:
        """All shifts of the bank, one after the other."""
        assert self._units is not None
        return self.a[len(self.bank) :] * self._units

    def _made_edits(self) -> list[tuple[Site, Edit]]:
        """One edit per linear layer whose input holds a site of the bank."""
        members: dict[tuple[bool, int], list[int]] = {}
        for place, site in enumerate(self.bank):
            members.setdefault((isinstance(site, Head), site.layer), []).append(place)
        edits: list[tuple[Site, Edit]] = []
        for (heads, layer), places in sorted(members.items()):
            where = (self.anatomy.heads_in if heads else self.anatomy.neurons_in)[layer]
            edits.append((where, self._edit(torch.tensor(places), where.width)))
        return edits

    def _edit(self, places: Tensor, features: int) -> Edit:
        """Scale and shift the sites of one kind at these places of the bank, all in one layer.

        `features` is the width of the layer's input. Scales and shifts are computed in float32: a bfloat16
        scale near 1 would lose small steps.
        """
        device = self.a.device
        width = self._width(self.bank[int(places[0])])
        numbers = torch.tensor([self.bank[place][1] for place in places.tolist()])
        columns = (numbers[:, None] * width + torch.arange(width)).flatten().to(device)
        starts = self._starts[places] - len(self.bank)
        own = (starts[:, None] + torch.arange(width)).flatten().to(device)
        repeated = places.repeat_interleave(width).to(device)

        def scales() -> Tensor:
            return torch.ones(features, device=device).index_put((columns,), 1 + self.a[repeated])

        def shifts() -> Tensor:
            return torch.zeros(features, device=device).index_put((columns,), self._shifts()[own])

        return Scaling(scales, None if self._units is None else shifts)


class Loss(NamedTuple):
    """The loss to minimize, and its parts."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


class AnswerLoss:
    """The loss of one example under learned scales (HONES 4)."""

    def __init__(
        self,
        scales: LearnedScales,
        decoder: Decoder,
        beta: float = 0.05,
        penalty: float = 1e-5,
        with_end: bool = False,
    ) -> None:
        """Cross-entropy of the answer, `beta` times KL(original || scaled), `penalty` times mean(a^2).

        `with_end` counts the end of a generated answer as one more token of it.
        """
        self.scales, self.decoder, self.beta, self.penalty = scales, decoder, beta, penalty
        self.with_end = with_end

    def __call__(self, example: Example) -> Loss:
        """Teacher-force the target after the prompt, with the scales and, for the KL term, without them.

        Raises: HonesError when the target has no tokens or the loss is not finite.
        """
        where = f"{example.task}, doc_id {example.doc_id}"
        if not example.target_ids:
            raise HonesError(f"{where}: its target has no tokens to learn from")
        wanted = wanted_tokens(self.scales.anatomy.model, example, self.with_end)
        inputs = self.decoder.append(example.inputs, example.target_ids[: len(wanted) - 1])
        tracker, answer = self.decoder.replayer.tracker, len(wanted) - 1
        with self.scales.attached(tracker, answer):
            scaled = self._logits(inputs, len(wanted))
        original = None
        if self.beta:
            with torch.no_grad():
                original = self._logits(inputs, len(wanted))
        loss = answer_loss(scaled, original, wanted, self.scales.a, self.beta, self.penalty)
        if not bool(torch.isfinite(loss.total)):
            with self.scales.attached(tracker, answer):
                refuse_not_finite(self.scales.anatomy, inputs, where)
        return loss

    def _logits(self, inputs: dict[str, Tensor], count: int) -> Tensor:
        logits: Tensor = self.scales.anatomy.model(**inputs, use_cache=False).logits
        return logits[0, -count:]


def answer_loss(
    scaled: Float[Tensor, "tokens vocabulary"],
    original: Float[Tensor, "tokens vocabulary"] | None,
    wanted: Sequence[Sequence[int]],
    a: Float[Tensor, " bank"],
    beta: float,
    penalty: float,
) -> Loss:
    """Mean answer-token cross-entropy + `beta` KL(original || scaled) on answer tokens + `penalty` mean(a^2).

    `wanted` holds the tokens that count as right at each position. `original` may be None where `beta` is 0.
    Computed in float32 (HONES 4).
    """
    log_scaled = torch.log_softmax(scaled.float(), -1)
    cross_entropy = token_losses(log_scaled, wanted).mean()
    divergence = torch.zeros((), device=scaled.device)
    if original is not None:
        log_original = torch.log_softmax(original.float(), -1)
        divergence = (log_original.exp() * (log_original - log_scaled)).sum(-1).mean()
    total = cross_entropy + beta * divergence + penalty * a.square().mean().to(scaled.device)
    return Loss(total, cross_entropy.detach(), divergence.detach())


def wanted_tokens(model: PreTrainedModel, example: Example, with_end: bool) -> list[list[int]]:
    """The tokens that count as right at each position of the gold answer.

    Args:
        model: its generation settings name the tokens that end an answer.
        example: its target is teacher-forced.
        with_end: add the end of the answer, which any of the end tokens makes. Otherwise scales are learned
            by which the answer begins well and goes on for too long. Margins and choices have no end, and a
            target that fills `max_new_tokens` needs none.
    """
    wanted = [[token] for token in example.target_ids]
    is_text = example.details is None and bool(example.settings)
    is_cut = len(wanted) >= min(example.settings.get("max_new_tokens") or TARGET_TOKENS, TARGET_TOKENS)
    ends = end_tokens(model, example.settings) if with_end and is_text and not is_cut else []
    return [*wanted, ends] if ends else wanted


def token_losses(log_probabilities: Tensor, wanted: Sequence[Sequence[int]]) -> Tensor:
    """Cross-entropies [..., tokens] from log-probabilities [..., tokens, vocabulary]."""
    found = [
        -log_probabilities[..., position, list(tokens)].logsumexp(-1)
        for position, tokens in enumerate(wanted)
    ]
    return torch.stack(found, dim=-1)


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


class Fold(NamedTuple):
    """Steerings by name that were chosen without these examples, by which they are measured."""

    steerings: Mapping[str, Steering]
    indices: Sequence[int]


class TargetLosses:
    """One pass: the mean cross-entropy of the target's tokens without steering and under several steerings.

    Steerings are the rows of a batch. Every example is measured under the steerings of its own fold; the
    steerings of all folds have the same names. Examples of no fold are not measured.
    """

    def __init__(self, replayer: Replayer, folds: Sequence[Fold], with_end: bool = False) -> None:
        """Measure the examples of every fold under the steerings of the fold, and without steering.

        `with_end` counts the end of a generated answer as one more token of it.
        """
        self.with_end = with_end
        self.anatomy, self.limit, self.decoder = replayer.anatomy, replayer.limit, Decoder(replayer)
        self.names = list(folds[0].steerings)
        self._of = {index: fold.steerings for fold in folds for index in fold.indices}

    def zeros(self) -> dict[str, Tensor]:
        """The sum of losses [1 + steerings], without steering first, and the count of examples."""
        return {
            "losses": torch.zeros(1 + len(self.names), dtype=torch.float64),
            "examples": torch.zeros((), dtype=torch.float64),
        }

    def measure(self, example: Example) -> Measurement:
        """The losses of one example."""
        if example.index not in self._of:
            return Measurement(self.zeros(), None)
        steerings = self._of[example.index]
        wanted = wanted_tokens(self.anatomy.model, example, self.with_end)
        if not wanted:
            raise HonesError(f"{example.where}: its target has no tokens to measure the loss of")
        answer = example.target_ids[: len(wanted) - 1]
        inputs = self.decoder.append_answer(example.inputs, example.settings, answer)
        losses = [self._losses(inputs, [], wanted)]
        length = own_tokens(inputs).shape[1]
        losses += self.limit.chunks(
            self.names,
            length,
            lambda cut: self._losses(inputs, [steerings[name] for name in cut], wanted),
        )
        sums = {"losses": torch.cat(losses), "examples": torch.ones((), dtype=torch.float64)}
        self._refuse_not_finite(example, inputs, sums["losses"], len(wanted) - 1)
        return Measurement(sums, None)

    def _refuse_not_finite(
        self, example: Example, inputs: Mapping[str, Any], losses: Tensor, answer: int
    ) -> None:
        """Raise HonesError that names the steering of a loss that is not finite, since it ranks nowhere."""
        broken = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if broken:
            name = ["", *self.names][broken[0]]
            chosen = [self._of[example.index][name]] if name else []
            with editing_in(self.decoder.replayer.tracker, row_edits(self.anatomy, chosen), answer):
                under = f", under the scales {name}" if name else ""
                refuse_not_finite(self.anatomy, inputs, f"{example.where}{under}")

    @torch.no_grad()
    def _losses(
        self, inputs: Mapping[str, Any], chosen: Sequence[Steering], wanted: Sequence[Sequence[int]]
    ) -> Tensor:
        """Losses [rows] of the target under some steerings, or of one row without steering for none."""
        rows = max(1, len(chosen))
        with editing_in(self.decoder.replayer.tracker, row_edits(self.anatomy, chosen), len(wanted) - 1):
            logits: Tensor = self.anatomy.model(**repeat_example(inputs, rows), use_cache=False).logits
        log_probabilities = logits[:, -len(wanted) :].float().log_softmax(-1)
        return token_losses(log_probabilities, wanted).mean(1).double().cpu()


class ActivationSizes:
    """One pass: the mean squares of all activations, at the tokens by which the target is predicted.

    These are the last token of the prompt and those of the target. The first tokens of a prompt, whose
    activations are huge in many models, are left out.
    """

    def __init__(self, replayer: Replayer, with_end: bool = False) -> None:
        """Measure one model; `with_end` counts the end of a generated answer as one more token of it."""
        self.anatomy, self.decoder, self.with_end = replayer.anatomy, Decoder(replayer), with_end

    def zeros(self) -> dict[str, Tensor]:
        """Sums of squares of heads [L, H], over all their features, and of neurons [L, I]; counted tokens."""
        shape = self.anatomy.shape
        sizes = {"heads": (shape.layers, shape.heads), "neurons": (shape.layers, shape.neurons), "tokens": ()}
        return {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}

    def measure(self, example: Example) -> Measurement:
        """The sums of one example."""
        count = len(wanted_tokens(self.anatomy.model, example, self.with_end))
        if not count:
            raise HonesError(f"{example.where}: its target has no tokens to predict")
        answer = example.target_ids[: count - 1]
        inputs = self.decoder.append_answer(example.inputs, example.settings, answer)
        heads, neurons = last_activations(self.anatomy, inputs, count)
        squares = {"heads": heads.square().sum((0, -1)), "neurons": neurons.square().sum(0)}
        if not all(bool(torch.isfinite(sums).all()) for sums in squares.values()):
            refuse_not_finite(self.anatomy, inputs, example.where)
        return Measurement(squares | {"tokens": torch.tensor(float(count), dtype=torch.float64)}, None)


class SiteSizes(NamedTuple):
    """The usual size of an activation: of heads [L, H], per feature, and of neurons [L, I]; never 0."""

    heads: Tensor
    neurons: Tensor

    @classmethod
    def of(cls, shape: ModelShape, totals: Totals) -> "SiteSizes":
        """Root mean squares. A site whose activation is always 0 gets the mean size of its layer's others."""
        sums = totals.sums
        widths = torch.tensor([max(1, shape.head_width_of(layer)) for layer in range(shape.layers)])
        heads = (sums["heads"] / sums["tokens"] / widths[:, None]).sqrt()
        return cls(_without_zeros(heads), _without_zeros((sums["neurons"] / sums["tokens"]).sqrt()))

    def units(self, bank: Sequence[Head | Neuron]) -> Tensor:
        """The units of the shifts of a bank's sites, [bank]."""
        found, (layers, numbers) = torch.ones(len(bank)), torch.tensor(bank).T
        for sizes, places in zip(self, _places(bank), strict=True):
            found[places] = sizes[layers[places], numbers[places]]
        return found


def _places(bank: Sequence[Head | Neuron]) -> tuple[Tensor, Tensor]:
    """The places of a bank that have heads, and those that have neurons."""
    is_head = torch.tensor([isinstance(site, Head) for site in bank])
    return is_head.nonzero().flatten(), (~is_head).nonzero().flatten()


def _without_zeros(sizes: Tensor) -> Tensor:
    """Sizes [L, sites] float32, with the mean of a layer's others for 0, and 1 where a layer has only 0."""
    active = sizes > 0
    mean = sizes.sum(1, keepdim=True) / active.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.where(active, sizes, mean).float()
