"""Learn scales without hand-tuned settings: held-out loss chooses the learning rate and the epoch.

The development images are cut into folds. For each fold, scales are learned from the other folds, and the
loss is measured on the fold itself. So every development image is held out once, and the settings are chosen
by the loss on all of them. On a quarter of the images alone, a model that is hardly ever wrong may show
nothing to learn. The result is the mean over the folds of the scales at the chosen rate and epoch. Each
fold's scales follow the noise of its own images as well, and the mean keeps what the folds agree on. Folds
may also find different repairs of one fault, whose mean repairs nothing: if the mean's loss on all
development images exceeds the held-out loss, scales are learned once more, from all of them.

The end of a generated answer counts as one more token of it. Otherwise scales are found by which answers
begin well and do not stop.

Where a bank has heads and neurons, the scales of each kind are learned apart, and the held-out loss also
chooses the kind. Learned together they fit the noise of a few dozen images better, and a fault in one of them
worse.

Shifts are learned beside scales if asked for: `z` becomes `s * z + b`. They are two more kinds, heads with
shifts and neurons with shifts, so the held-out loss also tells whether shifts help. Steps, ceiling and
sparsity of a shift are in units of the usual size of the site's activation, which makes them as free of a
dimension as those of a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from hones_eval.choices import CEILING, SPARSITY
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.jobs.learn import FitSettings, fit
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.learning import ActivationSizes, Fold, Learned, SiteSizes, TargetLosses
from hones_eval.runs.lightning import Loop
from hones_eval.stats.clusters import by_images

FEWEST_IMAGES = 8
RATES = (0.2,)
SMALLER_RATES = (0.02,)
"""Tried where the default rates lower the loss nowhere, as in models of tens of thousands of neurons."""
RECORDED = ("epochs", "ceiling", "sparsity", "beta", "seed", "folds")
"""The settings that a steering records as they are."""


@dataclass(frozen=True)
class TuneSettings:
    """How scales are tuned.

    Args:
        rates: the learning rates to try. Where the default lowers the held-out loss of no kind and epoch, a
            tenth of it is tried as well.
        epochs: the most epochs to learn with each rate; the best epoch is kept (early stopping).
        ceiling: the largest scale; the smallest is 0.
        sparsity: how strongly weak sites are held at 1 (`FitSettings.sparsity`).
        beta: the weight of KL(original || scaled), which keeps answers near the model's; 0 by default,
            because the held-out loss already guards against learning too much.
        folds: the number of parts that the images are cut into; each part is held out once.
        seed: of the split, of the order of the examples, and of the random bank.
        shifts: whether shifts are learned beside the scales, where the held-out loss is smaller with them.
    """

    rates: tuple[float, ...] = RATES
    epochs: int = 4
    ceiling: float = CEILING
    sparsity: float = SPARSITY
    beta: float = 0.0
    folds: int = 4
    seed: int = 0
    shifts: bool = False

    def __post_init__(self) -> None:
        """Reject settings that cannot be used."""
        if not self.rates or min(self.rates) <= 0 or self.epochs < 1:
            raise HonesError("tuning needs learning rates above 0 and at least one epoch")
        if self.folds < 2:
            raise HonesError(f"tuning with {self.folds} folds holds nothing out: use 2 or more")
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
            with_end=True,
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
    """Learn one scale, and if asked for a shift, per site of a bank; every process gets the same.

    Scales are learned once per kind of site, learning rate and fold. Then one pass measures, for every image,
    the loss of the target without steering and under the scales of its own fold at the end of every epoch.
    The kind, rate and epoch with the smallest loss win, and the steering has the mean scales of their folds,
    or scales learned from all images where the folds disagree.
    """
    sizes = _sizes(replayer, examples, loop) if settings.shifts else None
    found = _tuned(ranking, replayer, examples, bank, settings, loop, sizes)
    if found.steering is not None or settings.rates != RATES:
        return found
    again = _tuned(ranking, replayer, examples, bank, replace(settings, rates=SMALLER_RATES), loop, sizes)
    losses = "held_out_loss_by_kind_rate_and_epoch"
    tried = {losses: found.report[losses] | again.report[losses], "rates": [*RATES, *SMALLER_RATES]}
    return Tuned(again.steering, again.report | tried)


def _tuned(
    ranking: Ranking,
    replayer: Replayer,
    examples: TaskExamples,
    bank: Sequence[Head | Neuron],
    settings: TuneSettings,
    loop: Loop,
    sizes: SiteSizes | None,
) -> Tuned:
    """Tune with the rates of the settings alone; `sizes` are given where shifts are learned."""
    which = "" if settings.rates == RATES else "-" + "-".join(f"{rate:g}" for rate in settings.rates)
    kinds = _kinds(bank, sizes)
    folds = []
    for number, part in enumerate(folds_by_image(examples, settings.folds, settings.seed), start=1):
        train = sorted({*range(len(examples))} - {*part})
        found: dict[str, Steering] = {}
        for kind, rate in product(kinds, settings.rates):
            name, fitting = f"tune-{kind}-{rate:g}-{number}", settings.fit_settings(rate)
            sites, units = kinds[kind]
            fitted = fit(replayer, examples, sites, fitting, loop, train, name, units)
            for epoch, learned in enumerate(fitted.epochs, start=1):
                found[f"{kind}, {rate:g}, {epoch}"] = _steering(ranking, learned)
        folds.append(Fold(found, part))
    totals = loop.run(examples, TargetLosses(replayer, folds, with_end=True), f"tune-held-out{which}")
    without, *losses = (totals.sums["losses"] / totals.sums["examples"]).tolist()
    by_name = dict(zip(folds[0].steerings, losses, strict=True))
    best = min(by_name, key=by_name.__getitem__)
    report = {
        **{name: getattr(settings, name) for name in RECORDED},
        "rates": list(settings.rates),
        **({"shifts": True} if settings.shifts else {}),
        "sites": len(bank),
        "held_out_loss_without": without,
        "held_out_loss_by_kind_rate_and_epoch": by_name,
    }
    if by_name[best] >= without:
        return Tuned(None, report)
    best_kind, best_rate, best_epoch = best.split(", ")
    chosen = _mean(ranking, [fold.steerings[best] for fold in folds])
    report["loss_of_mean"] = _loss(replayer, examples, chosen, loop, f"tune-mean{which}")
    report["folds_disagree"] = report["loss_of_mean"] > by_name[best]
    if report["folds_disagree"]:
        fitting = settings.fit_settings(float(best_rate))
        sites, units = kinds[best_kind]
        again = fit(replayer, examples, sites, fitting, loop, name=f"tune-all{which}", units=units)
        chosen = _steering(ranking, again.epochs[int(best_epoch) - 1])
    report |= {"kind": best_kind, "learning_rate": float(best_rate), "best_epoch": int(best_epoch)}
    report |= {"held_out_loss": by_name[best], **_changes(chosen, sizes)}
    return Tuned(chosen, report)


class _Kind(NamedTuple):
    """Sites of one kind, and the units of their shifts; None where none are learned."""

    sites: list[Head | Neuron]
    units: torch.Tensor | None


def _kinds(bank: Sequence[Head | Neuron], sizes: SiteSizes | None) -> dict[str, _Kind]:
    """The heads and the neurons of a bank, and each of them once more with shifts, if any are learned."""
    kinds = {
        kind: _Kind(sites, None)
        for kind, of in (("heads", Head), ("neurons", Neuron))
        if (sites := [site for site in bank if isinstance(site, of)])
    }
    if sizes is None:
        return kinds
    shifted = {f"{kind} with shifts": _Kind(sites, sizes.units(sites)) for kind, (sites, _) in kinds.items()}
    return kinds | shifted


def _sizes(replayer: Replayer, examples: TaskExamples, loop: Loop) -> SiteSizes:
    """The usual sizes of all activations on the development examples."""
    totals = loop.run(examples, ActivationSizes(replayer, with_end=True), "tune-sizes")
    return SiteSizes.of(replayer.anatomy.shape, totals)


def _steering(ranking: Ranking, learned: Learned) -> Steering:
    heads, neurons, *shifts = learned
    return scaling.of_sites(ranking, heads, neurons, {}, *shifts)


def _changes(steering: Steering, sizes: SiteSizes | None) -> dict[str, Any]:
    """How many sites are scaled and shifted, and by how much at most."""
    changes = steering.distances
    found = {"largest_change": float(changes.max()), "scaled_sites": int((changes > 0).sum())}
    if sizes is None or not steering.has_shifts:
        return found
    counts = steering.counts
    found["shifted_sites"] = counts.get("shifted_heads", 0) + counts.get("shifted_neurons", 0)
    relative = []
    if steering.head_shifts is not None:
        relative.append(float((steering.head_shifts.abs().amax(-1) / sizes.heads).max()))
    if steering.neuron_shifts is not None:
        relative.append(float((steering.neuron_shifts.abs() / sizes.neurons).max()))
    return found | {"largest_shift": max(relative)}


def _loss(replayer: Replayer, examples: TaskExamples, steering: Steering, loop: Loop, name: str) -> float:
    """The mean loss of the target over all examples, under one steering."""
    measure = TargetLosses(replayer, [Fold({"mean": steering}, range(len(examples)))], with_end=True)
    totals = loop.run(examples, measure, name)
    return float(totals.sums["losses"][1] / totals.sums["examples"])


def _mean(ranking: Ranking, steerings: Sequence[Steering]) -> Steering:
    """The steering with the mean scales and shifts of several."""
    heads = torch.stack([steering.head_scales for steering in steerings]).mean(0)
    neurons = torch.stack([steering.neuron_scales for steering in steerings]).mean(0)
    head_shifts = _mean_shifts([steering.head_shifts for steering in steerings])
    neuron_shifts = _mean_shifts([steering.neuron_shifts for steering in steerings])
    return scaling.of_sites(ranking, heads, neurons, {}, head_shifts, neuron_shifts)


def _mean_shifts(shifts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The mean of shifts, of which None is all 0; None where all are."""
    present = [tensor for tensor in shifts if tensor is not None]
    return torch.stack(present).sum(0) / len(shifts) if present else None


def folds_by_image(examples: TaskExamples, count: int, seed: int) -> list[list[int]]:
    """Cut examples into `count` parts of about equal size that share no image.

    Raises: HonesError with fewer than eight images.
    """
    clusters = by_images([examples[index].image_hashes for index in range(len(examples))])
    groups = [np.flatnonzero(clusters == cluster).tolist() for cluster in np.unique(clusters)]
    if len(groups) < FEWEST_IMAGES:
        raise HonesError(
            f"{len(groups)} development images are too few to hold some out: raise --limit to "
            f"{FEWEST_IMAGES} or more"
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(index for place in order[part::count] for index in groups[place]) for part in range(count)]


def whole_bank(ranking: Ranking) -> list[Head | Neuron]:
    """Every head and every neuron of a ranking's model."""
    shape = ranking.provenance.shape
    layers = range(shape.layers)
    heads = [Head(layer, head) for layer in layers for head in range(shape.heads_of(layer))]
    return [*heads, *(Neuron(layer, i) for layer in layers for i in range(shape.neurons_of(layer)))]
