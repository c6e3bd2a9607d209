"""From a method, a model and a task's examples to a ranking."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hones_eval.choices import Method
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import neuron_count, top_heads
from hones_eval.core.weights import weights_digest
from hones_eval.engine.prefixes import SharedReplayer
from hones_eval.engine.replay import Replayer
from hones_eval.jobs.head_search import Savings, localize
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import baselines
from hones_eval.methods.hones import HeadLocalization, NeuronAttribution, inverse_document_frequency
from hones_eval.methods.vseam import HeadContribution
from hones_eval.runs.lightning import Loop
from hones_eval.runs.measure import Totals


@dataclasses.dataclass(frozen=True)
class Discovery:
    """What every method needs: where to measure, on what, how many sites to choose, and the loop."""

    replayer: Replayer
    examples: TaskExamples
    loop: Loop
    provenance: Provenance
    heads: int
    neurons: float
    others: Sequence[TaskExamples] = ()
    """For `entropy`: the tasks that the first one is told apart from."""
    savings: Savings = dataclasses.field(default_factory=Savings)
    """For `hones`: whether heads are raced or screened."""


class _Discover(Protocol):
    def __call__(self, job: Discovery) -> Ranking: ...


def discover(job: Discovery) -> Ranking:
    """Run the provenance's method; every rank gets the same ranking."""
    return _METHODS[job.provenance.method](job)


def _hones(job: Discovery) -> Ranking:
    """Both passes of HONES: localize heads, then attribute neurons conditioned on the best of them."""
    _refuse_impossible(job)
    localization = HeadLocalization(job.replayer, job.examples)
    located = localize(localization, job.loop, job.heads, job.savings, job.provenance.seed)
    totals, head_scores = located.totals, located.scores
    chosen = located.top(job.heads)
    weighted = [head for head in chosen if head_scores[head] > 0]
    attribution = NeuronAttribution(job.replayer, weighted, token_weights=_token_weights(job))
    neuron_totals = job.loop.run(job.examples, attribution, "neurons")
    weights = torch.stack([head_scores[head] for head in weighted]) if weighted else torch.ones(0)
    report = _report(job, len(job.examples)) | {
        "metric": job.examples.metric,
        "higher_is_better": job.examples.higher_is_better,
        "base_metric": localization.base_metric(totals),
        "base_log_probability": float(totals.sums["log_probability"] / totals.sums["examples"]),
        "share_of_answers_that_differ": float(
            totals.sums["differing_answers"] / totals.sums["measured"].sum()
        ),
        "examples_decoded_in_full": int(totals.sums["plain_examples"]),
        "answers_that_differ": _decoding(job.examples, localization.decoder.not_continued),
        "heads": [{"head": list(head), "score": float(head_scores[head])} for head in chosen],
        "heads_with_positive_score": len(weighted),
        "neurons_conditioned_on": "heads" if weighted else "nothing: no chosen head has a positive score",
    }
    report |= job.examples.recorder.report()
    if job.examples.recorder.shares_prompts:
        report |= _sharing(localization.run.sharing, totals)
    if job.examples.recorder.has_distractors:
        report["examples_of_neurons"] = int(neuron_totals.sums["examples"])
    return Ranking(
        provenance=job.provenance,
        head_scores=head_scores,
        head_log_probability=located.log_probability,
        head_examples=located.measured,
        neuron_scores=attribution.importance(neuron_totals, weights),
        report=report | located.report,
    )


def _vseam(job: Discovery) -> Ranking:
    """One pass of V-SEAM: signed, positive and negative heads."""
    _refuse_impossible(job)
    shape = job.provenance.shape
    top_heads(torch.zeros(shape.layers, shape.heads), job.heads)  # refuse an impossible number
    contribution = HeadContribution(job.replayer, job.examples)
    totals = job.loop.run(job.examples, contribution, "heads")
    found = HeadContribution.report(totals, job.heads)
    scores = HeadContribution.scores(totals)
    found["warnings"] += filter(None, [job.examples.constant_answer_warning()])
    found |= _sharing(contribution.readouts.sharing, totals)
    report = _report(job, found["correct_examples"] + found["incorrect_examples"]) | found
    return Ranking(
        provenance=job.provenance,
        head_scores=scores["signed"],
        head_positive=scores["positive"],
        head_negative=scores["negative"],
        report=report,
    )


def _random(job: Discovery) -> Ranking:
    """Chance: every head and neuron has a random score. No example is run."""
    heads, neurons = baselines.random(job.provenance.shape, job.provenance.seed)
    return _neurons(job, neurons, head_scores=heads)


def _activation(job: Discovery) -> Ranking:
    return _neurons(job, baselines.activation(_activity(job)))


def _write_norm(job: Discovery) -> Ranking:
    return _neurons(job, baselines.write_norm(_activity(job), job.replayer.anatomy))


def _dvp(job: Discovery) -> Ranking:
    pass_ = baselines.NeuronActivity(job.replayer.anatomy, projected=True, token_weights=_token_weights(job))
    return _neurons(job, baselines.dvp(job.loop.run(job.examples, pass_, "neurons")))


def _entropy(job: Discovery) -> Ranking:
    """Neurons that are active in the first task and not in the others."""
    if not job.others:
        baselines.entropy([])  # says what is missing before the work
    totals = [_activity(job)]
    for examples in job.others:
        totals.append(job.loop.run(examples, baselines.NeuronActivity(job.replayer.anatomy), examples.task))
    sets = [*job.provenance.examples, *(examples.example_set() for examples in job.others)]
    told_apart = dataclasses.replace(job, provenance=dataclasses.replace(job.provenance, examples=sets))
    return _neurons(told_apart, baselines.entropy(totals))


def _activity(job: Discovery) -> Totals:
    return job.loop.run(job.examples, baselines.NeuronActivity(job.replayer.anatomy), "neurons")


def _neurons(job: Discovery, scores: Tensor, head_scores: Tensor | None = None) -> Ranking:
    neuron_count(scores, job.neurons)  # refuse an impossible share
    report = {"examples": len(job.examples), "told_apart_from": [one.task for one in job.others]}
    return Ranking(job.provenance, head_scores=head_scores, neuron_scores=scores, report=report)


_METHODS: dict[str, _Discover] = {
    "hones": _hones,
    "vseam": _vseam,
    "random": _random,
    "activation": _activation,
    "write_norm": _write_norm,
    "dvp": _dvp,
    "entropy": _entropy,
}


def provenance(
    anatomy: Anatomy, examples: TaskExamples, method: Method, settings: dict[str, Any], seed: int
) -> Provenance:
    """Who made a ranking, from what."""
    config = anatomy.model.config
    return Provenance(
        base_model=str(getattr(config, "name_or_path", "") or type(anatomy.model).__name__),
        revision=getattr(config, "_commit_hash", None),
        shape=anatomy.shape,
        method=method,
        settings=settings,
        examples=[examples.example_set()],
        seed=seed,
        weights=weights_digest(anatomy.model),
    )


def _refuse_impossible(job: Discovery) -> None:
    """Numbers of heads and neurons that the model does not have are an error before the work."""
    shape = job.provenance.shape
    top_heads(torch.zeros(shape.layers, shape.heads), job.heads)
    neuron_count(torch.zeros(shape.layers, shape.neurons), job.neurons)
    job.savings.check(shape.layers * shape.heads, job.heads, job.loop.world_size)


def _report(job: Discovery, count: float) -> dict[str, Any]:
    return {
        "examples": int(count),
        "replay": "exact" if job.replayer.inexact is None else f"full forward passes: {job.replayer.inexact}",
    }


def _decoding(examples: TaskExamples, stops: str | None) -> str:
    """How the answers that differ were found."""
    if examples.kind.replaces_decoding is not None:
        return examples.kind.replaces_decoding
    return "decoded on from the first difference" if stops is None else f"decoded from the start: {stops}"


def _sharing(sharing: SharedReplayer, totals: Totals) -> dict[str, Any]:
    """What examples on one picture, or the choices of one question, shared."""
    return {
        "prefix_sharing": sharing.inexact or "exact",
        "examples_sharing_a_prefix": int(totals.sums["shared"]),
    }


def _token_weights(job: Discovery) -> Tensor | None:
    """Inverse document frequencies where examples have references (captions), else None."""
    references = job.examples.caption_references()
    if references is None:
        return None
    return inverse_document_frequency(references, job.provenance.shape.vocabulary)
