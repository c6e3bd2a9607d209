"""Shifts as differences of mean activations: of right and wrong answers, or of two tasks.

This is the direction of inference-time intervention and of contrastive activation addition, restricted to the
chosen heads and neurons. Activations are those at the last token of the prompt, where an answer begins.
"""

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hones_eval.engine.passes import last_activations
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.methods.answers import BASELINE, AnswersUnder
from hones_eval.runs.measure import Measurement, Totals

GROUPS = ("right", "wrong")


class MeanActivations:
    """One pass: sums of the activations of all heads and neurons, of all or of right and wrong answers."""

    def __init__(self, replayer: Replayer, examples: TaskExamples, *, by_answer: bool) -> None:
        """Sum over all examples, or with `by_answer` over those answered rightly and wrongly, apart."""
        self.anatomy, self.examples = replayer.anatomy, examples
        self.groups = GROUPS if by_answer else ("all",)
        self._answers = AnswersUnder(replayer, examples, {}) if by_answer else None

    def zeros(self) -> dict[str, Tensor]:
        """Per group the sums of heads [L, H, d] and of neurons [L, I], and the count of examples."""
        shape = self.anatomy.shape
        sizes = {
            "heads": (shape.layers, shape.heads, shape.head_width),
            "neurons": (shape.layers, shape.neurons),
            "examples": (),
        }
        return {
            f"{group} {name}": torch.zeros(size, dtype=torch.float64)
            for group in self.groups
            for name, size in sizes.items()
        }

    @torch.no_grad()
    def measure(self, example: Example) -> Measurement:
        """Record one example's activations at the last prompt token, in the group of its answer."""
        heads, neurons = last_activations(self.anatomy, example.inputs, 1)
        group = self._group(example)
        sums = self.zeros()
        sums[f"{group} heads"], sums[f"{group} neurons"] = heads[0], neurons[0]
        sums[f"{group} examples"] = torch.ones((), dtype=torch.float64)
        return Measurement(sums)

    def _group(self, example: Example) -> str:
        """By the model's own answer: right with a metric of one half or more, or less if lower is better."""
        if self._answers is None:
            return "all"
        answer: Any = self._answers.measure(example).record.answers[BASELINE]
        value = self.examples.metric_of(example.index, answer.result)
        if not isinstance(value, Real | np.bool_):
            raise HonesError(
                f"{self.examples.metric} of {self.examples.task} is no number per example, so right and "
                "wrong answers are not known: choose another --metric, or compare two tasks with --against"
            )
        return GROUPS[0] if (float(value) >= 0.5) == self.examples.higher_is_better else GROUPS[1]


def difference(of: Totals, minus: Totals, group: str, other: str) -> tuple[Tensor, Tensor]:
    """Differences of the means of two groups: of heads [L, H, d] and of neurons [L, I], float32.

    Raises: HonesError when a group has no example.
    """
    counts = [float(of.sums[f"{group} examples"]), float(minus.sums[f"{other} examples"])]
    if not all(counts):
        empty = other if counts[0] else group
        raise HonesError(
            f"no development example was answered {empty}ly, so there is no difference of means: use more "
            "examples, or compare two tasks with --against"
        )
    heads, neurons = (
        (of.sums[f"{group} {kind}"] / counts[0] - minus.sums[f"{other} {kind}"] / counts[1]).float()
        for kind in ("heads", "neurons")
    )
    return heads, neurons
