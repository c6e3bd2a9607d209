"""HONES: rank heads by the task's metric, then rank neurons conditioned on the best heads.

The numbered steps (HONES 1 to 4) and the paper are in `docs/glossary.md`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head
from hones_eval.engine.passes import NeuronReader
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.together import worth_sharing
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.methods.discovery import Discovery, sharing_report
from hones_eval.methods.head_replacement import HeadReplacement
from hones_eval.methods.head_search import Located, localize
from hones_eval.methods.localization import HeadLocalization
from hones_eval.methods.projection import check_finite_neurons, write_gains
from hones_eval.methods.routing import add_routed, routed_zeros, unmeasured_report
from hones_eval.runs.measure import Measurement, Totals

NEURON_BYTES = 128 * 2**20
"""Memory up to which neurons are attributed under all heads in the pass that localizes them."""
NEURONS = "neurons."


def rank(job: Discovery) -> Ranking:
    """Run HONES: localize heads, then attribute neurons conditioned on the best; in one pass or in two."""
    job.check_counts()
    shape, seed = job.provenance.shape, job.provenance.seed
    job.savings.check(int(shape.head_mask().sum()), job.heads, job.loop.world_size)
    replacement = job.replacement
    localization = _localization(job, replacement)
    located = localize(localization, job.loop, job.heads, job.savings, seed)
    scores = located.scores
    chosen = located.top(job.heads)
    weighted = [head for head in chosen if scores[head] > 0]
    attribution = NeuronAttribution(
        job.replayer, weighted, token_weights=job.token_weights(), replacement=replacement
    )
    if isinstance(localization, HeadsAndNeurons):
        totals = localization.neuron_totals(located.totals, weighted)
    else:
        totals = job.loop.run(job.examples, attribution, "neurons")
    weights = torch.stack([scores[head] for head in weighted]) if weighted else torch.ones(0)
    report = job.report(len(job.examples)) | _heads_report(job, localization, located, chosen)
    if job.examples.recorder.has_distractors:
        report["examples_of_neurons"] = int(totals.sums["examples"])
    return Ranking(
        provenance=job.provenance,
        head_scores=scores,
        head_log_probability=located.log_probability,
        head_examples=located.measured,
        neuron_scores=attribution.importance(totals, weights),
        neuron_examples=totals.sums.get("routed"),
        report=report | located.report | unmeasured_report(totals, shape),
    )


def _localization(job: Discovery, replacement: HeadReplacement) -> HeadLocalization:
    """The pass over heads.

    Where all heads run on all examples, questions about one image are checked together, if the first group
    shares most of its tokens. Otherwise neurons are attributed in the same pass, if their sums fit into
    memory.
    """
    with_log_probability = not job.savings.metric_only
    shape = job.provenance.shape
    size = int(shape.head_mask().sum()) * shape.layers * shape.neurons * 8
    exact = job.savings.is_exact and job.examples.kind.passes_neurons
    together = exact and worth_sharing(job.examples.with_same_images(0), job.replayer.anatomy)
    if exact and not together and size <= NEURON_BYTES:
        weights = job.token_weights()
        return HeadsAndNeurons(job.replayer, job.examples, replacement, with_log_probability, weights)
    localization = HeadLocalization(job.replayer, job.examples, replacement, with_log_probability)
    localization.run = localization.run._replace(share=together)
    return localization


class NeuronAttribution:
    """One pass that measures write-in contributions, unedited and with each chosen head replaced (HONES 2).

    The contribution of neuron `i` of layer `l` at the last prompt token is
    `c_{l,i} = z_{l,i} * <W_down[:, i], u_y>`. Its drop under the replacement of a head says how much of the
    contribution depends on that head.
    """

    def __init__(
        self,
        replayer: Replayer,
        heads: Sequence[Head],
        rectify: Literal["mean", "item"] = "mean",
        token_weights: Tensor | None = None,
        replacement: HeadReplacement | None = None,
    ) -> None:
        """Condition on `heads`; without any, importance is the mean contribution.

        Args:
            replayer: replays the model.
            heads: the chosen heads that have a positive weight.
            rectify: whether drops are cut at zero after the mean over examples, as in the released code, or
                before (`item`).
            token_weights: inverse document frequencies [vocabulary] for captions; by default all 1.
            replacement: how a head is replaced; by default by the mean of the other heads.
        """
        self.replayer, self.anatomy = replayer, replayer.anatomy
        self.heads = list(heads)
        self.rectify = rectify
        self.token_weights = token_weights
        self.replacement = replacement

    def zeros(self) -> dict[str, Tensor]:
        """`contribution` [L, I] of the unedited pass, `drop` [heads, L, I], and the count of examples."""
        shape = self.anatomy.shape
        return {
            "contribution": torch.zeros(shape.layers, shape.neurons, dtype=torch.float64),
            "drop": torch.zeros(len(self.heads), shape.layers, shape.neurons, dtype=torch.float64),
            "examples": torch.zeros((), dtype=torch.float64),
        } | routed_zeros(shape)

    def measure(self, example: Example) -> Measurement:
        """Contributions and drops of one example, for its own target."""
        if example.is_distractor:  # only the correct candidate of a query has the target in its prompt
            return Measurement(self.zeros())
        replacement = self.replacement or HeadReplacement.by_mean(self.anatomy)
        replacement.prepare(example)
        edits = replacement.of(self.heads)
        passes = self.replayer.record(example.inputs, 1, ahead=edits, neurons=True)
        sums, reader = self.reader(example, [z[0] for z in passes.base_neurons()])
        for _ in passes.edited(edits, reader):
            pass  # the reader takes what is needed; the logits are not
        return Measurement(sums)

    def reader(self, example: Example, base: Sequence[Tensor]) -> tuple[dict[str, Tensor], NeuronReader]:
        """One example's sums, and a reader that adds the drops under edits to them.

        Args:
            example: gives the target.
            base: unedited FFN activations [I] at the last prompt token, by layer.
        """
        gains = write_gains(self.anatomy, example, self.token_weights)
        contributions = [readouts.write_in(z, gain) for z, gain in zip(base, gains, strict=True)]
        check_finite_neurons(contributions, example)
        sums = self.zeros()
        sums["contribution"] += torch.stack([c.double().cpu() for c in contributions])
        add_routed(sums, self.anatomy.shape, base)
        sums["examples"] += 1

        def add(layer: int, rows: Tensor, activations: Tensor) -> None:
            drop = contributions[layer] - readouts.write_in(activations[:, 0], gains[layer])
            drop = drop.clamp(min=0) if self.rectify == "item" else drop
            sums["drop"][rows, layer] = drop.double().cpu()

        return sums, add

    def importance(self, totals: Totals, weights: Tensor) -> Tensor:
        """Importance [L, I]: the weighted mean of the rectified drops over heads.

        `I_{l,i} = sum_h w_h D^h_{l,i} / sum_h w_h` with `D^h = max(0, mean drop)`. Without heads it is the
        mean contribution, the stated fallback.

        Args:
            totals: the sums over all examples.
            weights: one positive weight per head [heads].
        """
        count = totals.sums["examples"]
        if not count:
            raise HonesError(
                "none of these examples has a correct candidate to attribute neurons on; change --offset or "
                "raise --limit"
            )
        if not self.heads:
            return (totals.sums["contribution"] / count).float()
        drops = (totals.sums["drop"] / count).clamp(min=0)
        weights = weights.double()
        return (torch.einsum("h,hli->li", weights, drops) / weights.sum()).float()


class HeadsAndNeurons(HeadLocalization):
    """One pass that localizes heads and attributes neurons under every head.

    The passes that answer an example already compute the FFN activations under every head's replacement. So
    conditioning on all heads at once takes no pass more, where its sums [heads, L, I] fit into memory; the
    heads to condition on are chosen afterwards.
    """

    def __init__(
        self,
        replayer: Replayer,
        examples: TaskExamples,
        replacement: HeadReplacement | None = None,
        log_probability: bool = True,
        token_weights: Tensor | None = None,
    ) -> None:
        """As `HeadLocalization`; `token_weights` as in `NeuronAttribution`."""
        super().__init__(replayer, examples, replacement, log_probability)
        self.attribution = NeuronAttribution(
            replayer, self.heads, token_weights=token_weights, replacement=self.replacement
        )
        self.run = self.run._replace(neurons=self)
        self._sums: dict[str, Tensor] | None = None

    def zeros(self) -> dict[str, Tensor]:
        """The sums of both."""
        return super().zeros() | _prefixed(self.attribution.zeros())

    def start(self, example: Example, base: Sequence[Tensor], numbers: Sequence[int]) -> NeuronReader:
        """See `hones_eval.lmms.answers.kind.NeuronSink`."""
        self._sums, reader = self.attribution.reader(example, base)
        heads = torch.tensor(list(numbers))
        return lambda layer, rows, activations: reader(layer, heads[rows], activations)

    def measure(self, example: Example) -> Measurement:
        """Both of one example; neurons in passes of their own where its answers cannot be verified by one."""
        self._sums = None
        measured = super().measure(example)
        if self._sums is None or example.is_distractor:
            self._sums = self.attribution.measure(example).sums
        return measured._replace(sums=measured.sums | _prefixed(self._sums))

    def neuron_totals(self, totals: Totals, heads: Sequence[Head]) -> Totals:
        """The totals that `NeuronAttribution` of some of the heads would have."""
        sums = {name: totals.sums[f"{NEURONS}{name}"] for name in self.attribution.zeros()}
        chosen = [self.heads.index(head) for head in heads]
        return Totals(sums | {"drop": sums["drop"][chosen]}, {})


def _prefixed(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{NEURONS}{name}": value for name, value in sums.items()}


def _heads_report(
    job: Discovery, localization: HeadLocalization, located: Located, chosen: Sequence[Head]
) -> dict[str, Any]:
    totals, scores = located.totals, located.scores
    positive = sum(bool(scores[head] > 0) for head in chosen)
    report = {
        "metric": job.examples.metric,
        "higher_is_better": job.examples.higher_is_better,
        "base_metric": localization.base_metric(totals),
        "base_log_probability": float(totals.sums["log_probability"] / totals.sums["examples"])
        if localization.run.log_probability
        else None,
        "share_of_answers_that_differ": float(
            totals.sums["differing_answers"] / totals.sums["measured"].sum()
        ),
        "examples_decoded_in_full": int(totals.sums["plain_examples"]),
        "answers_that_differ": _decoding(job.examples, localization.decoder.not_continued),
        "heads": [{"head": list(head), "score": float(scores[head])} for head in chosen],
        "heads_with_positive_score": positive,
        "neurons_conditioned_on": "heads" if positive else "nothing: no chosen head has a positive score",
    }
    report |= job.examples.recorder.report()
    if job.examples.recorder.shares_prompts or localization.run.share:
        report |= sharing_report(localization.run.sharing, totals)
    return report


def _decoding(examples: TaskExamples, stops: str | None) -> str:
    """How the answers that differ from the unedited one were decoded."""
    if examples.kind.replaces_decoding is not None:
        return examples.kind.replaces_decoding
    return "decoded on from the first difference" if stops is None else f"decoded from the start: {stops}"
