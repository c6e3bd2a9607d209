"""Baseline scores of neurons: random, activation, write norm, vocabulary projection and task entropy."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ModelShape
from hones_eval.core.hooks import recording
from hones_eval.core.ranking import Ranking
from hones_eval.engine.passes import present, recorded_neurons
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example
from hones_eval.methods.discovery import Discovery
from hones_eval.methods.projection import check_finite_neurons, write_gains
from hones_eval.methods.routing import add_routed, routed_zeros
from hones_eval.runs.measure import Measurement, Totals


def rank_random(job: Discovery) -> Ranking:
    """Rank every head and neuron by a random score. No example is run."""
    heads, neurons = random(job.provenance.shape, job.provenance.seed)
    return job.neuron_ranking(neurons, head_scores=heads)


def rank_activation(job: Discovery) -> Ranking:
    """Rank neurons by `activation`."""
    totals = _activity(job)
    return job.neuron_ranking(activation(totals), totals)


def rank_write_norm(job: Discovery) -> Ranking:
    """Rank neurons by `write_norm`."""
    totals = _activity(job)
    return job.neuron_ranking(write_norm(totals, job.replayer.anatomy), totals)


def rank_dvp(job: Discovery) -> Ranking:
    """Rank neurons by `dvp`."""
    activity = NeuronActivity(job.replayer.anatomy, projected=True, token_weights=job.token_weights())
    totals = job.loop.run(job.examples, activity, "neurons")
    return job.neuron_ranking(dvp(totals), totals)


def rank_entropy(job: Discovery) -> Ranking:
    """Rank neurons by `entropy`: active in the first task and not in the others."""
    if not job.others:
        entropy([])  # raises the error that names the missing tasks, before the work
    totals = [_activity(job)]
    for examples in job.others:
        totals.append(job.loop.run(examples, NeuronActivity(job.replayer.anatomy), examples.task))
    sets = [*job.provenance.examples, *(examples.example_set() for examples in job.others)]
    compared = dataclasses.replace(job, provenance=dataclasses.replace(job.provenance, examples=sets))
    return compared.neuron_ranking(entropy(totals), totals[0])


def _activity(job: Discovery) -> Totals:
    return job.loop.run(job.examples, NeuronActivity(job.replayer.anatomy), "neurons")


class NeuronActivity:
    """One pass over the FFN activations at the last prompt token, where HONES reads them too."""

    def __init__(
        self, anatomy: Anatomy, *, projected: bool = False, token_weights: Tensor | None = None
    ) -> None:
        """Record activations, and with `projected` also write-in contributions.

        Args:
            anatomy: of the model.
            projected: also sum write-in contributions, for which every example needs a target.
            token_weights: inverse document frequencies [vocabulary] for captions; by default all 1.
        """
        self.anatomy, self.projected, self.token_weights = anatomy, projected, token_weights

    def zeros(self) -> dict[str, Tensor]:
        """`magnitude`, `active` and `contribution` [L, I], and the count of examples."""
        shape = self.anatomy.shape
        names = ("magnitude", "active", "contribution")
        sums = {name: torch.zeros(shape.layers, shape.neurons, dtype=torch.float64) for name in names}
        return sums | {"examples": torch.zeros((), dtype=torch.float64)} | routed_zeros(shape)

    @torch.no_grad()
    def measure(self, example: Example) -> Measurement:
        """Absolute activation, whether it is above 0, and `z * <W_down, u_y>` of every neuron."""
        if example.is_distractor:  # as in HONES, only the correct candidate of a query counts
            return Measurement(self.zeros())
        with recording(present(self.anatomy.neurons_in), slice(-1, None)) as kept:
            self.anatomy.model(**example.inputs, use_cache=False)
        sums = self.zeros()
        gains = write_gains(self.anatomy, example, self.token_weights) if self.projected else None
        layers = range(self.anatomy.shape.layers)
        activations = [recorded_neurons(self.anatomy, layer, kept, 1)[0, 0].float() for layer in layers]
        check_finite_neurons(activations, example)
        add_routed(sums, self.anatomy.shape, activations)
        for layer, z in enumerate(activations):
            sums["magnitude"][layer] = z.abs().double().cpu()
            sums["active"][layer] = (z > 0).double().cpu()
            if gains is not None:
                sums["contribution"][layer] = readouts.write_in(z, gains[layer]).double().cpu()
        sums["examples"] += 1
        return Measurement(sums)


def random(shape: ModelShape, seed: int) -> tuple[Tensor, Tensor]:
    """Scores of heads [L, H] and neurons [L, I], drawn uniformly from 0 to 1."""
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
    """Direct vocabulary projection, not conditioned on heads: the mean write-in contribution [L, I]."""
    return (totals.sums["contribution"] / _count(totals)).float()


def entropy(totals: Sequence[Totals]) -> Tensor:
    """Selectivity of neurons for the first task, by the entropy of activation probabilities [L, I].

    `p_t` is the share of task t's examples in which the activation is above 0, and `H` the entropy of
    `p / sum(p)` over K tasks (Tang et al. 2024, "Language-specific neurons", equations 2 to 4). The score is
    `p_1 * (ln K - H)` where the first task has the largest p, and `-max(p) * (ln K - H)` elsewhere. The
    factor `p` replaces the paper's percentile, which excludes neurons that rarely fire.

    Args:
        totals: the sums of `NeuronActivity` for the first task, then for the tasks it is compared with.

    Raises: HonesError for fewer than two tasks.
    """
    if len(totals) < 2:
        raise HonesError(
            "entropy compares tasks: give the task to rank for and then the others, as --tasks a,b,c"
        )
    p = torch.stack([task.sums["active"] / _count(task) for task in totals])
    share = p / p.sum(0).clamp(min=torch.finfo(p.dtype).tiny)
    selectivity = math.log(len(totals)) + torch.xlogy(share, share).sum(0)
    own = (p[0] >= p.max(0).values) & (p[0] > 0)
    return (torch.where(own, p[0], -p.max(0).values) * selectivity.clamp(min=0)).float()


def _count(totals: Totals) -> Tensor:
    if not totals.sums["examples"]:
        raise HonesError(
            "none of these examples has a correct candidate to measure neurons on; change --offset or raise "
            "--limit"
        )
    return totals.sums["examples"]
