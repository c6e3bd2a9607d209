"""Choose scales on development examples: neurons (HONES 4) and heads (V-SEAM 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, TypeVar

import torch

from hones_eval.choices import HowHeads, HowNeurons, TunedSites
from hones_eval.core.artifact import ExampleSet
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron, matched_random
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.jobs.halving import halve
from hones_eval.jobs.learn import FitSettings, fit
from hones_eval.jobs.tune import TuneSettings, tune, whole_bank
from hones_eval.jobs.verify import refuse_shared_images
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.answers import BASELINE, AnswersUnder, answered
from hones_eval.methods.banks import check_fits
from hones_eval.runs.lightning import Loop

GRID = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
WithStrength = HowHeads | Literal["signed_neurons"]
STRENGTHS: Mapping[WithStrength, Sequence[float]] = {
    "signed": (0.5, 1, 2, 4, 8),
    "topk": (0.25, 0.5, 0.75, 1),
    "signed_neurons": (0.25, 0.5, 0.75, 1),
}


Site = TypeVar("Site", Head, Neuron)
HARDLY = 0.02
"""Learned scales that are all nearer to 1 than this get a warning."""


@dataclass(frozen=True)
class Development:
    """The input of `choose`: a ranking, how many of its sites to scale, and the development examples."""

    ranking: Ranking
    replayer: Replayer
    examples: TaskExamples
    loop: Loop
    neurons: float | None = None
    factors: Sequence[float] = GRID
    groups: int = 3
    settings: FitSettings = field(default_factory=FitSettings)
    heads: int = 10
    epsilon: float = 0.0
    strengths: Sequence[float] | None = None
    """The strengths to try on heads, by default those of `STRENGTHS`. 0 (no change) is always tried too."""
    tune: TuneSettings = field(default_factory=TuneSettings)
    tuned_sites: TunedSites = "all"
    """The sites that `tuned` may scale. `neurons` restricts the neurons to the top share."""
    sites: Sequence[Head | Neuron] | None = None
    """A bank to scale instead of the ranking's selection, for controls."""

    def __post_init__(self) -> None:
        """Reject a ranking of another model, or one that was made from a development image."""
        model = self.replayer.anatomy.model
        check_fits(self.ranking, self.replayer.anatomy.shape, type(model).__name__)
        refuse_shared_images(self.ranking.provenance, self.examples.example_set(), "choosing scales")

    @property
    def bank(self) -> list[Neuron]:
        """The selected neurons, or those of `sites`."""
        if self.sites is None:
            return self.ranking.neurons(self.neurons)
        return [site for site in self.sites if isinstance(site, Neuron)]

    @property
    def tuned_bank(self) -> list[Head | Neuron]:
        """The sites that `tuned` learns scales for: every head and neuron, unless fewer are asked for."""
        if self.sites is not None:
            return list(self.sites)
        everything = whole_bank(self.ranking)
        heads = [site for site in everything if isinstance(site, Head)]
        neurons = [site for site in everything if isinstance(site, Neuron)]
        if self.neurons is not None and self.tuned_sites != "heads":
            neurons = self.ranking.neurons(self.neurons)
        if self.tuned_sites == "heads":
            return [*heads]
        return [*neurons] if self.tuned_sites == "neurons" else [*heads, *neurons]

    @property
    def example_set(self) -> ExampleSet:
        """The development examples."""
        return self.examples.example_set()


def choose(job: Development, how: HowNeurons | HowHeads) -> Steering:
    """Choose scales by the method `how`.

    Returns: the same steering on every process. Its provenance names the development examples.
    """
    steering = _chosen(job, how)
    found = [job.examples.constant_answer_warning(), _hardly_moved(job, steering)]
    warnings = [warning for warning in found if warning is not None]
    if not warnings:
        return steering
    settings = steering.provenance.settings | {"warnings": warnings}
    return replace(steering, provenance=replace(steering.provenance, settings=settings))


def _chosen(job: Development, how: HowNeurons | HowHeads) -> Steering:
    if how == "signed" or how == "topk" or how == "signed_neurons":
        return strength_grid(job, how)
    if how == "halving":
        return halving(job)
    if how == "grid":
        return grid(job)
    if how == "search":
        return search(job)
    if how == "tuned":
        return tuned(job)
    return learned(job, how)


def _hardly_moved(job: Development, steering: Steering) -> str | None:
    """A warning when scales were learned but none is far enough from 1 to matter; None otherwise.

    Where shifts were learned as well, the scales need not have moved.
    """
    if steering.has_shifts:
        return None
    changes = steering.distances
    dtype, largest = job.replayer.anatomy.model.dtype, float(changes.max())
    if largest == 0:
        return None
    if steering.rounded_away(dtype) == int((changes > 0).sum()):
        kind = str(dtype).removeprefix("torch.")
        return (
            f"no scale moved beyond rounding in {kind} (the largest change is {largest:.2g}), so this "
            "steering changes nothing: use --how tuned, or a larger --learning_rate"
        )
    if largest < HARDLY:
        return (
            f"no scale moved by more than {largest:.2g}, which is unlikely to change an answer: use "
            "--how tuned, or a larger --learning_rate"
        )
    return None


def tuned(job: Development) -> Steering:
    """Learn the scales of heads or neurons; held-out loss chooses the kind, the learning rate and the epoch.

    The chosen scales must not lower the metric on the development examples. If they do, or if no scales lower
    the held-out loss, the result is the steering that changes nothing.
    """
    bank = job.tuned_bank
    found = tune(job.ranking, job.replayer, job.examples, bank, job.tune, job.loop)
    return _unless_worse(job, "tuned", found.steering, found.report)


def halving(job: Development) -> Steering:
    """Choose a factor for each group of the selected sites by successive halving, without gradients.

    The groups are the ranking's best heads and its selected neurons, each cut between layers into `groups`
    parts. The chosen factors must not lower the metric on the development examples.
    """
    groups: list[list[Head | Neuron]] = []
    if job.tuned_sites in ("all", "heads") and (heads := _best_heads(job)):
        groups += [[*group] for group in layer_groups(heads, job.groups)]
    if job.tuned_sites in ("all", "neurons") and (neurons := _best_neurons(job)):
        groups += [[*group] for group in layer_groups(neurons, job.groups)]
    if not groups:
        raise HonesError("the ranking has no scores of the sites to scale: rank with heads or neurons")
    settings = (job.factors, job.loop, job.tune.seed)
    found = halve(job.ranking, job.replayer, job.examples, groups, *settings)
    return _unless_worse(job, "halving", found.steering, found.report)


def _best_heads(job: Development) -> list[Head]:
    if job.sites is not None:
        return [site for site in job.sites if isinstance(site, Head)]
    if job.ranking.head_scores is None:
        return []
    return job.ranking.heads(min(job.heads, job.ranking.measured_heads))


def _best_neurons(job: Development) -> list[Neuron]:
    return [] if job.sites is None and job.ranking.neuron_scores is None else job.bank


def _unless_worse(
    job: Development, how: str, steering: Steering | None, report: Mapping[str, Any]
) -> Steering:
    """A steering chosen by its loss, unless it lowers the metric: then, or for None, one without change."""
    settings: dict[str, Any] = {"how": how, "metric": job.examples.metric, **report}
    shape = job.ranking.provenance.shape
    unchanged = scaling.of_sites(
        job.ranking, torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.neurons), {}
    )
    if steering is None:
        return scaling.chosen(unchanged, settings, job.example_set)
    values = measure_candidates(job, {how: steering}, how)
    settings |= {"baseline": values[BASELINE], "best": values[how]}
    sign = 1.0 if job.examples.higher_is_better else -1.0
    kept = steering if sign * (values[how] - values[BASELINE]) >= 0 else unchanged
    return scaling.chosen(kept, settings, job.example_set)


def grid(job: Development) -> Steering:
    """Scale the whole bank by the one factor with the best metric on the development examples."""
    bank = job.bank
    candidates = {str(factor): _grouped(job, [bank], [factor]) for factor in job.factors}
    found = measure_candidates(job, candidates, "grid")
    best = best_of(job, [found[str(factor)] for factor in job.factors], [abs(f - 1) for f in job.factors])
    factor = job.factors[best]
    settings = {
        "how": "grid",
        "factor": factor,
        "count": len(bank),
        "metric": job.examples.metric,
        "baseline": found[BASELINE],
        "metric_by_factor": {str(factor): found[str(factor)] for factor in job.factors},
    }
    return scaling.chosen(candidates[str(factor)], settings, job.example_set)


def search(job: Development) -> Steering:
    """Choose one factor per group of neighbouring layers by coordinate search, without gradients.

    The search visits the groups twice, starting from the last layers. At each visit it tries every factor
    for this group, keeps the other groups' factors, and takes the best. It makes two passes over the
    examples per group.
    """
    groups = layer_groups(job.bank, job.groups)
    chosen = [1.0] * len(groups)
    value = baseline = float("nan")
    trace = []
    for number, group in enumerate([*reversed(range(len(groups)))] * 2):
        tried = [[*chosen[:group], factor, *chosen[group + 1 :]] for factor in job.factors]
        candidates = {str(factors): _grouped(job, groups, factors) for factors in tried}
        found = measure_candidates(job, candidates, f"search {number + 1}")
        baseline = found[BASELINE]
        distances = [sum(abs(factor - 1) for factor in factors) for factors in tried]
        chosen = tried[best_of(job, [found[str(factors)] for factors in tried], distances)]
        value = found[str(chosen)]
        trace.append({"group": group, "factors": chosen, "metric": value})
    settings = {
        "how": "search",
        "factors": chosen,
        "layers": [sorted({neuron.layer for neuron in group}) for group in groups],
        "count": len(job.bank),
        "metric": job.examples.metric,
        "baseline": baseline,
        "best": value,
        "trace": trace,
    }
    return scaling.chosen(_grouped(job, groups, chosen), settings, job.example_set)


def strength_grid(job: Development, how: WithStrength) -> Steering:
    """Scale sites by their scores, with the strengths that have the best metric on the development examples.

    `signed` tries every lambda; `topk` tries every pair of an enhancement and a suppression (V-SEAM 4).
    `signed_neurons` tries every largest change of a neuron.

    Raises: HonesError when no strength changes a scale.
    """
    tried = sorted({0.0, *(STRENGTHS[how] if job.strengths is None else job.strengths)})
    if how == "signed":
        candidates = {
            f"{strength:g}": scaling.signed(job.ranking, strength, job.epsilon) for strength in tried
        }
    elif how == "signed_neurons":
        candidates = {
            f"{strength:g}": scaling.signed_neurons(job.ranking, strength, job.neurons) for strength in tried
        }
    else:
        candidates = {
            f"{up:g}, {down:g}": scaling.topk(job.ranking, job.heads, up, down)
            for up, down in product(tried, repeat=2)
        }
    if all(candidate.is_noop for candidate in candidates.values()):
        raise HonesError(
            f"--how {how}: no strength changes any scale, because every "
            f"{'neuron' if how == 'signed_neurons' else 'head'} of the ranking has the score 0; rank with "
            "more examples"
        )
    found = measure_candidates(job, candidates, how)
    distances = [
        float((candidate.head_scales - 1).abs().sum() + (candidate.neuron_scales - 1).abs().sum())
        for candidate in candidates.values()
    ]
    best = list(candidates)[best_of(job, [found[name] for name in candidates], distances)]
    settings = {
        "metric": job.examples.metric,
        "baseline": found[BASELINE],
        "best": found[best],
        "metric_by_strength": {name: found[name] for name in candidates},
    }
    return scaling.chosen(candidates[best], settings, job.example_set)


def learned(job: Development, how: Literal["learned", "learned_no_kl", "random"]) -> Steering:
    """Learn the scales by gradient descent; `random` learns those of a layer-matched random bank."""
    settings = learned_settings(job.settings, how)
    bank: Sequence[Head | Neuron] = job.bank if job.sites is None else job.sites
    if how == "random":
        bank = matched_random(job.bank, job.ranking.provenance.shape, settings.seed)
    fitted = fit(job.replayer, job.examples, bank, settings, job.loop)
    recorded = {"how": how, "count": len(bank), **fitted.report}
    heads, neurons = fitted.learned.head_scales, fitted.learned.neuron_scales
    steering = scaling.of_sites(job.ranking, heads, neurons, {})
    return scaling.chosen(steering, recorded, job.example_set)


def learned_settings(settings: FitSettings, how: HowNeurons) -> FitSettings:
    """The learning settings of `how`: `learned_no_kl` drops the KL term."""
    return replace(settings, beta=0.0) if how == "learned_no_kl" else settings


def layer_groups(bank: Sequence[Site], count: int) -> list[list[Site]]:
    """Cut the bank between layers into at most `count` groups of about equal size, lowest layers first."""
    if count < 1:
        raise HonesError(f"--groups {count}: give 1 or more")
    layers = sorted({site.layer for site in bank})
    groups: dict[int, list[Site]] = {}
    below = 0
    for layer in layers:
        members = [site for site in bank if site.layer == layer]
        # A layer joins the group that the middle one of its neurons falls into. By the first one, a layer
        # with many neurons would be put into the group that it only begins in.
        group = int((below + len(members) / 2) / len(bank) * count)
        groups.setdefault(min(group, count - 1), []).extend(members)
        below += len(members)
    return [groups[key] for key in sorted(groups)]


def _grouped(job: Development, groups: Sequence[Sequence[Neuron]], factors: Sequence[float]) -> Steering:
    return scaling.of_neurons(job.ranking, scaling.grouped_scales(job.ranking, groups, factors), {})


def measure_candidates(job: Development, candidates: Mapping[str, Steering], name: str) -> dict[str, float]:
    """Measure the metric under every candidate and without steering, in one pass called `name`."""
    steerings = {key: steering for key, steering in candidates.items() if not steering.is_noop}
    totals = job.loop.run(job.examples, AnswersUnder(job.replayer, job.examples, steerings), name)
    records = answered(totals)
    found = {
        key: job.examples.aggregate([record.answers[key].result for record in records])
        for key in (BASELINE, *steerings)
    }
    # A candidate that changes nothing was not run: its value is the baseline's.
    return {key: found.get(key, found[BASELINE]) for key in (BASELINE, *candidates)}


def best_of(job: Development, values: Sequence[float], distances: Sequence[float]) -> int:
    """The index of the best value; among equal values, of the one that changes the model least."""
    sign = 1.0 if job.examples.higher_is_better else -1.0
    order = [(sign * value, -distance) for value, distance in zip(values, distances, strict=True)]
    return order.index(max(order))


def summary(settings: Mapping[str, Any]) -> str:
    """One line about how scales were chosen, from a steering's settings."""
    if settings["how"] == "grid":
        best = settings["metric_by_factor"][str(settings["factor"])]
        choice = f"factor {settings['factor']:g} is best"
    elif settings["how"] == "search":
        best = settings["best"]
        choice = f"factors {', '.join(format(factor, 'g') for factor in settings['factors'])} are best"
    elif settings["how"] == "signed":
        best, choice = settings["best"], f"strength {settings['lambda']:g} is best"
    elif settings["how"] == "topk":
        best = settings["best"]
        choice = f"enhancing by {settings['enhance']:g} and suppressing by {settings['suppress']:g} is best"
        if both := settings.get("in_both_lists"):
            choice += f" ({len(both)} heads in both lists go by their larger score)"
    elif settings["how"] == "mean_difference":
        groups = " and ".join(f"{count} {group}" for group, count in settings["examples"].items())
        if "best" not in settings:
            return f"mean difference of {groups} examples, times {settings['strength']:g}; not tested"
        best = settings["best"]
        choice = f"the mean difference of {groups} examples, strength {settings['strength']:g}, is best"
    elif settings["how"] == "signed_neurons":
        best, choice = settings["best"], f"strength {settings['strength']:g} is best"
    elif settings["how"] == "tuned":
        return _summary_of_tuned(settings)
    elif settings["how"] == "halving":
        return _summary_of_halving(settings)
    else:
        losses = [epoch["cross_entropy"] for epoch in settings["epoch_losses"]]
        return (
            f"{settings['steps']} steps; cross-entropy {losses[0]:.4g} in the first epoch, "
            f"{losses[-1]:.4g} in the last; the largest change of a scale is {settings['largest_change']:.2g}"
        )
    values = f"{settings['baseline']:.4g} without steering, {best:.4g} with it"
    return f"{choice} on development examples: {settings['metric']} {values}"


def _summary_of_halving(settings: Mapping[str, Any]) -> str:
    """One line about factors that were chosen by successive halving."""
    if "factors" not in settings:
        return (
            f"none of {settings['candidates']} candidates lowers the loss of {settings['loss_without']:.4g}"
        )
    factors = ", ".join(
        f"{factor:g} for {group['sites']} {group['kind']}"
        for factor, group in zip(settings["factors"], settings["groups"], strict=True)
        if factor != 1
    )
    return (
        f"best of {settings['candidates']} candidates: {factors}; loss {settings['loss_without']:.4g} "
        f"without steering, {settings['loss']:.4g} with it; on development examples {settings['metric']} "
        f"{settings['baseline']:.4g} without steering, {settings['best']:.4g} with it"
    )


def _summary_of_tuned(settings: Mapping[str, Any]) -> str:
    """One line about tuned scales."""
    before = settings["held_out_loss_without"]
    if "held_out_loss" not in settings:
        return f"no learned scales lower the held-out loss of {before:.4g}"
    return (
        f"held-out loss {before:.4g} without steering, {settings['held_out_loss']:.4g} with it "
        f"({settings['kind']}, learning rate {settings['learning_rate']:g}, epoch "
        f"{settings['best_epoch']}); on development examples "
        f"{settings['metric']} {settings['baseline']:.4g} without steering, {settings['best']:.4g} with it; "
        f"{settings['scaled_sites']} of {settings['sites']} sites are scaled, by at most "
        f"{settings['largest_change']:.2g}"
        + (
            f"; {settings['shifted_sites']} are shifted, by at most {settings['largest_shift']:.2g} times "
            "their usual activation"
            if "shifted_sites" in settings
            else ""
        )
        + ("; folds disagree, so scales were learned from all images" if settings["folds_disagree"] else "")
    )
