"""The input of a method: model, examples, loop and settings; and what the reports of methods share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hones_eval.core.artifact import Provenance
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import neuron_count, top_heads
from hones_eval.engine.prefixes import SharedReplayer
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods.attribution import AttributionSettings
from hones_eval.methods.head_replacement import HeadReplacement
from hones_eval.methods.head_search import Savings
from hones_eval.methods.projection import inverse_document_frequency
from hones_eval.methods.routing import unmeasured_report
from hones_eval.runs.lightning import Loop
from hones_eval.runs.measure import Totals


@dataclasses.dataclass(frozen=True)
class Discovery:
    """One ranking job: what to measure, on which examples, and how many sites to select."""

    replayer: Replayer
    examples: TaskExamples
    loop: Loop
    provenance: Provenance
    heads: int
    neurons: float
    others: Sequence[TaskExamples] = ()
    """For methods that contrast tasks: the tasks that the first one is compared with."""
    savings: Savings = dataclasses.field(default_factory=Savings)
    """For methods that search heads: whether heads are raced or screened."""
    edit: str = "mean"
    """The name of the head edit that replaces a head."""
    attribution: AttributionSettings = dataclasses.field(default_factory=AttributionSettings)
    """For `atp`."""
    confirm: int | None = None
    """The number of best heads, and of best neurons, whose effect is measured exactly after the method."""
    joint: bool = False
    """Whether the confirmed neurons are also masked together, and each restored alone."""

    @property
    def replacement(self) -> HeadReplacement:
        """The head edit on these examples, with the job's seed."""
        return HeadReplacement(self.edit, self.replayer.anatomy, self.examples, self.provenance.seed)

    def check_counts(self) -> None:
        """Raise HonesError for numbers of heads and neurons that the model does not have, before the work."""
        shape = self.provenance.shape
        top_heads(torch.zeros(shape.layers, shape.heads), self.heads, shape.head_mask())
        neuron_count(torch.zeros(shape.layers, shape.neurons), self.neurons)

    def report(self, count: float) -> dict[str, Any]:
        """The report's first entries: the number of examples, and whether replay was exact."""
        inexact = self.replayer.inexact
        return {
            "examples": int(count),
            "replay": "exact" if inexact is None else f"full forward passes: {inexact}",
        }

    def token_weights(self) -> Tensor | None:
        """Inverse document frequencies [vocabulary] where examples have references (captions), else None."""
        references = self.examples.caption_references()
        if references is None:
            return None
        return inverse_document_frequency(references, self.provenance.shape.vocabulary)

    def neuron_ranking(
        self, scores: Tensor, totals: Totals | None = None, head_scores: Tensor | None = None
    ) -> Ranking:
        """The ranking of a method that only scores neurons, or that scores heads without a report.

        `totals` are the sums that the scores were made of, which tell the neurons that were never routed to.
        """
        neuron_count(scores, self.neurons)  # refuses an impossible fraction
        report = {
            "examples": len(self.examples),
            "told_apart_from": [examples.task for examples in self.others],
        }
        routed = None
        if totals is not None:
            routed = totals.sums.get("routed")
            report |= unmeasured_report(totals, self.provenance.shape)
        return Ranking(
            self.provenance,
            head_scores=head_scores,
            neuron_scores=scores,
            neuron_examples=routed,
            report=report,
        )


def sharing_report(sharing: SharedReplayer, totals: Totals) -> dict[str, Any]:
    """Whether examples with the same image, or the choices of one question, shared their prefix."""
    return {
        "prefix_sharing": sharing.inexact or "exact",
        "examples_sharing_a_prefix": int(totals.sums["shared"]),
    }
