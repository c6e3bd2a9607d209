"""The exact effect of the best sites of an estimate, measured one site at a time by replay.

An estimate ranks all sites at little cost, and can be wrong about any of them. Confirming measures the best
`count` heads and neurons: each is removed alone, and the drop of the gold answer's log-probability becomes
its score. So the final order is causal, and only the choice of the candidates is an estimate. A random sample
of the other sites is measured in the same pass. It bounds how many of them the choice has missed.

Effects of single neurons do not add up: where several do the same, masking one of them costs nothing. With
`joint` the best neurons are also masked all together, and each of them alone is restored. What returns of the
gold answer's log-probability is the neuron's joint effect. Neurons are then ranked by the mean of both
effects, each as a share of its largest.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor

from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron, neuron_count, top_heads, top_neurons
from hones_eval.engine.passes import SiteEdit
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.kind import EditRun
from hones_eval.lmms.answers.target import Target
from hones_eval.lmms.examples import Example
from hones_eval.methods.discovery import Discovery
from hones_eval.methods.head_replacement import HeadReplacement
from hones_eval.methods.learning import Fold, TargetLosses
from hones_eval.methods.registry import method
from hones_eval.methods.scaling import scaled_neurons
from hones_eval.runs.measure import Measurement, Totals

SAMPLE = 200
"""The number of other sites of each kind that are measured, at most."""
LEVEL = 0.95


class Candidates(NamedTuple):
    """The sites of one kind that are measured: the best of the estimate, and a random sample of the rest."""

    kind: Literal["heads", "neurons"]
    best: list[Any]
    sample: list[Any]

    @property
    def sites(self) -> list[Any]:
        """Both, in this order."""
        return [*self.best, *self.sample]


class ExactEffects:
    """One pass that measures the drop of the gold answer's log-probability under each of some edits."""

    def __init__(self, run: EditRun, replacement: HeadReplacement) -> None:
        """Measure the edits of `run`."""
        self.edits, self.effects = run, replacement

    def zeros(self) -> dict[str, Tensor]:
        """Sums of drops and of their squares [E], and the count of examples."""
        count = len(self.edits.edits)
        sums = {name: torch.zeros(count, dtype=torch.float64) for name in ("drop", "squares")}
        return sums | {"examples": torch.zeros((), dtype=torch.float64)}

    def measure(self, example: Example) -> Measurement:
        """Replay every edit on one example's prompt and gold answer."""
        self.effects.prepare(example)
        target = Target(self.edits, example)
        target.replay(self.edits.edits)
        one = torch.ones((), dtype=torch.float64)
        return Measurement({"drop": target.drops, "squares": target.drops.square(), "examples": one})


class JointEffects:
    """One pass: what masking all neurons of a bank costs, and what returns when one alone is restored.

    Costs are drops of the gold answer's log-probability.
    """

    def __init__(self, job: Discovery, ranking: Ranking, bank: list[Neuron]) -> None:
        """Measure one bank; every masked bank is a row of a batch."""
        others = [[neuron for neuron in bank if neuron != restored] for restored in bank]
        banks = {"all": bank} | {str(place): rest for place, rest in enumerate(others)}
        masked = {name: scaled_neurons(ranking, rest, 0.0, {}) for name, rest in banks.items()}
        self.count = len(bank)
        self.losses = TargetLosses(job.replayer, [Fold(masked, range(len(job.examples)))])

    def zeros(self) -> dict[str, Tensor]:
        """The sum of the costs of the whole bank, the sums of what returns [neurons], and the examples."""
        sums = {"together": torch.zeros((), dtype=torch.float64)}
        sums["returned"] = torch.zeros(self.count, dtype=torch.float64)
        return sums | {"examples": torch.zeros((), dtype=torch.float64)}

    def measure(self, example: Example) -> Measurement:
        """Measure one example's prompt and gold answer."""
        # The losses are means over the gold answer's tokens.
        losses = self.losses.measure(example).sums["losses"] * len(example.target_ids)
        unedited, together, restored = losses[0], losses[1], losses[2:]
        sums = {"together": together - unedited, "returned": together - restored}
        return Measurement(sums | {"examples": torch.ones((), dtype=torch.float64)})


def check_confirm(job: Discovery) -> None:
    """Raise HonesError for a number of sites that cannot be confirmed, before the work."""
    if job.confirm is None:
        return
    kinds, shape = check_has_estimates(job.provenance.method), job.provenance.shape
    selected = {
        "heads": job.heads,
        "neurons": neuron_count(shape.neuron_mask()[shape.neuron_mask()], job.neurons),
    }
    sites = {"heads": int(shape.head_mask().sum()), "neurons": int(shape.neuron_mask().sum())}
    most = max(kinds, key=lambda kind: sites[kind])
    if not 1 <= job.confirm <= sites[most]:
        raise HonesError(f"--confirm {job.confirm}: the model has {sites[most]} {most}; give 1 to that many")
    for kind in kinds:
        if min(job.confirm, sites[kind]) < selected[kind]:
            raise HonesError(
                f"--confirm {job.confirm} is fewer than the {selected[kind]} {kind} to select: raise "
                f"--confirm, or lower --{kind}"
            )


def check_has_estimates(name: str) -> list[Literal["heads", "neurons"]]:
    """The kinds of sites of which a method only estimates the effect. Raises: HonesError for none."""
    kinds = [kind for kind in method(name).scores if not _is_exact(name, kind)]
    if not kinds:
        raise HonesError(f"--confirm has nothing to do for --method {name}: its scores are exact effects")
    return kinds


def confirmed(job: Discovery, ranking: Ranking) -> Ranking:
    """The ranking with the scores of its best sites, and of a random sample, replaced by exact effects.

    Sites that were not measured have the score 0 and are never selected; `head_examples` and
    `neuron_examples` are 0 there. The estimate's scores are kept in the tensors `head_estimate` and
    `neuron_estimate`; with `joint` the two effects in `neuron_single` and `neuron_joint`.
    """
    assert job.confirm is not None
    groups = [
        _candidates(ranking, kind, job.confirm, job.provenance.seed)
        for kind in check_has_estimates(job.provenance.method)
    ]
    replacement = job.replacement
    edits = [edit for group in groups for edit in _edits(group, replacement)]
    effects = ExactEffects(EditRun.of(job.replayer, job.examples, edits), replacement)
    totals = job.loop.run(job.examples, effects, "confirm")
    report = dict(ranking.report or {})
    changes: dict[str, Any] = {}
    start = 0
    for group in groups:
        part = slice(start, start + len(group.sites))
        found, about = _scored(job, ranking, group, totals, part)
        changes |= found
        if job.joint and group.kind == "neurons":
            changes |= _jointly(job, ranking, group, changes["neuron_scores"], about)
        report.setdefault("confirmed", {})[group.kind] = about
        start = part.stop
    report["replay"] = job.report(0)["replay"]
    return dataclasses.replace(ranking, report=report, **changes)


def _is_exact(name: str, kind: str) -> bool:
    row = method(name)
    return row.exact_heads if kind == "heads" else row.exact_neurons


def _candidates(ranking: Ranking, kind: Literal["heads", "neurons"], count: int, seed: int) -> Candidates:
    scores = ranking.head_scores if kind == "heads" else ranking.neuron_scores
    assert scores is not None
    shape = ranking.provenance.shape
    there = shape.head_mask() if kind == "heads" else ranking.measured_neurons()
    count = min(count, int(there.sum()))
    best: list[Any] = (top_heads if kind == "heads" else top_neurons)(
        scores.masked_fill(~there, -torch.inf), count
    )
    taken = set(best)
    site = Head if kind == "heads" else Neuron
    places = there.nonzero().tolist()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    rest = [found for i in order if (found := site(*places[i])) not in taken]
    return Candidates(kind, best, rest[:SAMPLE])


def _edits(group: Candidates, replacement: HeadReplacement) -> list[SiteEdit]:
    if group.kind == "heads":
        return replacement.of(group.sites)
    return [SiteEdit(neuron, "mask") for neuron in group.sites]


def _scored(
    job: Discovery, ranking: Ranking, group: Candidates, totals: Totals, part: slice
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of one kind of site, and its report."""
    name = group.kind.removesuffix("s")
    estimate = getattr(ranking, f"{name}_scores")
    count = int(totals.sums["examples"])
    drops = totals.sums["drop"][part] / count
    squares = totals.sums["squares"][part]
    variance = (squares - count * drops.square()).clamp(min=0) / max(count - 1, 1)
    errors = (variance / count).sqrt()
    scores, measured = torch.zeros_like(estimate), torch.zeros_like(estimate)
    for site, drop in zip(group.sites, drops.tolist(), strict=True):
        scores[site], measured[site] = drop, count
    best = len(group.best)
    shape = job.provenance.shape
    there = shape.head_mask() if name == "head" else ranking.measured_neurons()
    wanted = job.heads if name == "head" else neuron_count(estimate[shape.neuron_mask()], job.neurons)
    last = float(drops[:best].sort(descending=True).values[min(wanted, best) - 1])
    about = {
        "candidates": best,
        "selected": wanted,
        "effect_of_the_last_selected": last,
        "largest_standard_error": float(errors.max()) if count > 1 else None,
        "sampled": len(group.sample),
        "sampled_above_the_last_selected": int((drops[best:] > last).sum()),
        "others": int(there.sum()) - best,
        "share_of_others_above_at_most": missed_bound(int((drops[best:] > last).sum()), len(group.sample)),
    }
    tensors = {
        f"{name}_scores": scores,
        f"{name}_examples": measured,
        f"{name}_estimate": estimate,
    }
    return tensors, about


def _jointly(
    job: Discovery, ranking: Ranking, group: Candidates, single: Tensor, about: dict[str, Any]
) -> dict[str, Tensor]:
    """Scores [L, I] from single and joint effects; adds to the report what the whole bank costs."""
    totals = job.loop.run(job.examples, JointEffects(job, ranking, group.best), "joint")
    returned, joint = totals.sums["returned"] / totals.sums["examples"], torch.zeros_like(single)
    for neuron, effect in zip(group.best, returned.tolist(), strict=True):
        joint[neuron] = effect
    about["drop_when_all_are_masked"] = float(totals.sums["together"] / totals.sums["examples"])
    about["sum_of_single_drops"] = float(sum(single[neuron] for neuron in group.best))
    scores = (_share_of_largest(single) + _share_of_largest(joint)) / 2
    return {"neuron_scores": scores, "neuron_single": single, "neuron_joint": joint}


def _share_of_largest(effects: Tensor) -> Tensor:
    """Effects divided by the largest of them, as they are if none is above 0."""
    largest = float(effects.max())
    return effects / largest if largest > 0 else effects


def missed_bound(above: int, sampled: int) -> float | None:
    """Upper 95 % confidence limit of the share of unmeasured sites above the last selected one.

    The one-sided Clopper-Pearson limit for `above` of `sampled` randomly drawn sites; None without a sample.

    Examples:
        >>> round(missed_bound(0, 200), 4)
        0.0149
    """
    if not sampled:
        return None
    return 1.0 if above == sampled else float(beta.ppf(LEVEL, above + 1, sampled - above))
