"""Learn scales without hand-tuned settings: held-out loss chooses the learning rate and the epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.jobs.learn import FitSettings, fit
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.learning import TargetLosses
from hones_eval.runs.lightning import Loop

FEWEST_IMAGES = 8


@dataclass(frozen=True)
class TuneSettings:
    """How scales are tuned. Scales have no unit, so the same rates serve every model and task.

    Args:
        rates: the learning rates to try.
        epochs: the most epochs to learn with each rate; the best epoch is kept (early stopping).
        ceiling: the largest scale; the smallest is 0.
        sparsity: how strongly weak sites are held at 1 (`FitSettings.sparsity`).
        beta: the weight of KL(original || scaled), which keeps answers near the model's; 0 by default,
            because the held-out loss already guards against learning too much.
        held_out: the share of the images that choose the rate and the epoch, and are not learned from.
        seed: of the split, of the order of the examples, and of the random bank.
    """

    rates: tuple[float, ...] = (0.1, 0.3)
    epochs: int = 8
    ceiling: float = 4.0
    sparsity: float = 0.2
    beta: float = 0.0
    held_out: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that cannot be used."""
        if not self.rates or min(self.rates) <= 0 or self.epochs < 1:
            raise HonesError("tuning needs learning rates above 0 and at least one epoch")
        if self.ceiling <= 1:
            raise HonesError(f"--ceiling {self.ceiling:g}: the largest scale must be above 1")
        if not 0 <= self.sparsity < 1:
            raise HonesError(f"--sparsity {self.sparsity:g}: give 0 or more, and less than 1")

    def fit_settings(self, rate: float) -> FitSettings:
        """The settings of one run of learning."""
        return FitSettings(
            beta=self.beta,
            learning_rate=rate,
            epochs=self.epochs,
            limit=self.ceiling - 1,
            floor=-1.0,
            sparsity=self.sparsity,
            seed=self.seed,
        )


class Tuned(NamedTuple):
    """The steering with the smallest held-out loss, or None where no steering lowers it, and a report."""

    steering: Steering | None
    report: dict[str, Any]


def tune(
    ranking: Ranking,
    replayer: Replayer,
    examples: TaskExamples,
    bank: Sequence[Head | Neuron],
    settings: TuneSettings,
    loop: Loop,
) -> Tuned:
    """Learn one scale per site of a bank; every process gets the same.

    The development images are split in two. Scales are learned on one part, once per learning rate. Then one
    pass over the other part measures the loss of the target under the scales at the end of every epoch of
    every rate, and without steering. The smallest held-out loss wins.
    """
    train, held_out = split_by_image(examples, settings.held_out, settings.seed)
    candidates: dict[str, Steering] = {}
    for rate in settings.rates:
        name = f"tune-{rate:g}"
        fitted = fit(replayer, examples, bank, settings.fit_settings(rate), loop, train, name)
        for epoch, (heads, neurons) in enumerate(fitted.epochs, start=1):
            candidates[f"{rate:g}, {epoch}"] = scaling.of_sites(ranking, heads, neurons, {})
    totals = loop.run(examples, TargetLosses(replayer, candidates, held_out), "tune-held-out")
    losses = (totals.sums["losses"] / totals.sums["examples"]).tolist()
    by_name = dict(zip(candidates, losses[1:], strict=True))
    best = min(by_name, key=by_name.__getitem__)
    report = {
        "rates": list(settings.rates),
        "epochs": settings.epochs,
        "ceiling": settings.ceiling,
        "sparsity": settings.sparsity,
        "beta": settings.beta,
        "seed": settings.seed,
        "sites": len(bank),
        "learned_from": len(train),
        "held_out": len(held_out),
        "held_out_loss_without": losses[0],
        "held_out_loss_by_rate_and_epoch": by_name,
    }
    if by_name[best] >= losses[0]:
        return Tuned(None, report)
    best_rate, best_epoch = best.split(", ")
    chosen = candidates[best]
    changes = torch.cat([(chosen.head_scales - 1).flatten(), (chosen.neuron_scales - 1).flatten()]).abs()
    report |= {"learning_rate": float(best_rate), "best_epoch": int(best_epoch)}
    report |= {"held_out_loss": by_name[best]}
    report |= {"largest_change": float(changes.max()), "scaled_sites": int((changes > 0).sum())}
    return Tuned(chosen, report)


def split_by_image(examples: TaskExamples, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split examples into two parts that share no image: the second holds about `share` of the images.

    Raises: HonesError with fewer than eight images.
    """
    owners: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(examples)):
        shown = tuple(sorted(set(examples[index].image_hashes))) or (f"none {index}",)
        owners.setdefault(shown, []).append(index)
    groups = list(owners.values())
    if len(groups) < FEWEST_IMAGES:
        raise HonesError(
            f"{len(groups)} development images are too few to hold some out: raise --limit to "
            f"{FEWEST_IMAGES} or more"
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(share * len(groups)))
    held_out = sorted(index for place in order[:count] for index in groups[place])
    return sorted({*range(len(examples))} - {*held_out}), held_out


def whole_bank(ranking: Ranking) -> list[Head | Neuron]:
    """Every head and every neuron of a ranking's model."""
    shape = ranking.provenance.shape
    layers = range(shape.layers)
    heads = [Head(layer, head) for layer in layers for head in range(shape.heads_of(layer))]
    return [*heads, *(Neuron(layer, i) for layer in layers for i in range(shape.neurons_of(layer)))]
