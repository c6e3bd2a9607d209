"""Scores of neurons to compare HONES with: chance, activity, writing strength, projection, task entropy."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ModelShape
from hones_eval.core.hooks import recording
from hones_eval.engine.passes import present, recorded_neurons
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example
from hones_eval.runs.measure import Measurement, Totals


class NeuronActivity:
    """One pass over the activations at the last prompt token, where HONES reads them too."""

    def __init__(
        self, anatomy: Anatomy, *, projected: bool = False, token_weights: Tensor | None = None
    ) -> None:
        """Record activity, and with `projected` what it writes along each example's target.

        Args:
            anatomy: of the model.
            projected: also sum write-in contributions, for which every example needs a target.
            token_weights: inverse document frequencies [vocabulary] for captions; default all 1.
        """
        self.anatomy, self.projected, self.token_weights = anatomy, projected, token_weights

    def zeros(self) -> dict[str, Tensor]:
        """`magnitude`, `active` and `contribution` [L, I], and the count of examples."""
        shape = self.anatomy.shape
        names = ("magnitude", "active", "contribution")
        sums = {name: torch.zeros(shape.layers, shape.neurons, dtype=torch.float64) for name in names}
        return sums | {"examples": torch.zeros((), dtype=torch.float64)}

    @torch.no_grad()
    def measure(self, example: Example) -> Measurement:
        """Absolute activation, whether it is above 0, and `z * <W_down, u_y>` of every neuron."""
        if example.is_distractor:  # as in HONES: the right candidate speaks for a query
            return Measurement(self.zeros())
        with recording(present(self.anatomy.neurons_in), slice(-1, None)) as kept:
            self.anatomy.model(**example.inputs, use_cache=False)
        sums = self.zeros()
        gains = self._gains(example) if self.projected else None
        for layer in range(self.anatomy.shape.layers):
            z = recorded_neurons(self.anatomy, layer, kept, 1)[0, 0].float()
            if not bool(torch.isfinite(z).all()):
                raise HonesError(
                    f"{example.task} document {example.doc_id}: "
                    f"the FFN activations of layer {layer} are not finite"
                )
            sums["magnitude"][layer] = z.abs().double().cpu()
            sums["active"][layer] = (z > 0).double().cpu()
            if gains is not None:
                sums["contribution"][layer] = readouts.write_in(z, gains[layer]).double().cpu()
        sums["examples"] += 1
        return Measurement(sums)

    def _gains(self, example: Example) -> list[Tensor]:
        if not example.target_ids:
            raise HonesError(f"{example.task} document {example.doc_id}: its target has no tokens")
        weights = None if self.token_weights is None else self.token_weights[example.target_ids].tolist()
        direction = readouts.target_direction(self.anatomy.unembedding, example.target_ids, weights)
        layers = range(self.anatomy.shape.layers)
        return [readouts.write_gain(self.anatomy.down_weight(layer), direction) for layer in layers]


def random(shape: ModelShape, seed: int) -> tuple[Tensor, Tensor]:
    """Scores of heads [L, H] and neurons [L, I] drawn evenly from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.rand(shape.layers, shape.heads, generator=generator)
    return heads, torch.rand(shape.layers, shape.neurons, generator=generator)


def activation(totals: Totals) -> Tensor:
    """Mean |z| [L, I]."""
    return (totals.sums["magnitude"] / _count(totals)).float()


def write_norm(totals: Totals, anatomy: Anatomy) -> Tensor:
    """Mean of |z| times the norm of the neuron's write vector `W_down[:, i]` [L, I]."""
    layers = range(anatomy.shape.layers)
    norms = torch.stack([anatomy.down_weight(layer).float().norm(dim=0).cpu() for layer in layers])
    return activation(totals) * norms


def dvp(totals: Totals) -> Tensor:
    """Direct vocabulary projection without heads: the mean write-in contribution [L, I] (HONES 2)."""
    return (totals.sums["contribution"] / _count(totals)).float()


def entropy(totals: Sequence[Totals]) -> Tensor:
    """How much a neuron is the first task's own, by the entropy of its activation probabilities [L, I].

    With `p_t` the share of task t's examples in which the activation is above 0 and `H` the entropy of
    `p / sum(p)` over K tasks (Tang et al. 2024, "Language-specific neurons", equations 2 to 4), the score is
    `p_1 * (ln K - H)` where the first task has the largest p, minus that elsewhere. The factor `p_1` takes
    the place of the paper's percentile, which keeps neurons out that hardly ever fire.
    """
    if len(totals) < 2:
        raise HonesError("entropy compares tasks: give the one to rank for and then others, --tasks a,b,c")
    p = torch.stack([one.sums["active"] / _count(one) for one in totals])
    share = p / p.sum(0).clamp(min=torch.finfo(p.dtype).tiny)
    selectivity = math.log(len(totals)) + torch.xlogy(share, share).sum(0)
    own = (p[0] >= p.max(0).values) & (p[0] > 0)
    return (torch.where(own, p[0], -p.max(0).values) * selectivity.clamp(min=0)).float()


def _count(totals: Totals) -> Tensor:
    if not totals.sums["examples"]:
        raise HonesError("no example shows a right candidate to measure neurons on: move --offset")
    return totals.sums["examples"]
