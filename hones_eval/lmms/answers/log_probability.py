"""Log-probability answers: how likely the gold answer is, a metric that every example has by itself.

The kind replaces a task's metric and not its questions: a task is recorded as its own kind records it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from hones_eval.core import readouts
from hones_eval.lmms.answers.kind import (
    AnswerKind,
    EditedAnswers,
    EditRun,
    OwnMetric,
    RowAnswer,
    SteeringRun,
)
from hones_eval.lmms.answers.next_token import as_text
from hones_eval.lmms.answers.target import Target
from hones_eval.lmms.example import Example

LOG_PROBABILITY = "log_probability"
"""The metric's name, wherever a task's metric is named."""


class LogProbabilityAnswers(AnswerKind):
    """The log-probability of the gold answer, which is also the metric; nothing is decoded."""

    name = LOG_PROBABILITY
    passes_neurons = True
    metric = LOG_PROBABILITY
    replaces_decoding = "not asked for: the metric is the target's log-probability"

    def own_result(self, text: str) -> dict[str, Any] | None:
        """The log-probability by the metric's name."""
        return {LOG_PROBABILITY: float(text)}

    def under_edits(self, run: EditRun, example: Example, numbers: Sequence[int]) -> EditedAnswers:
        """Replay the edits on prompt and target."""
        run.decoder.learn_type(example.inputs, example.settings)
        target = Target(run, example)
        target.replay([run.edits[number] for number in numbers], neurons=True)
        metric = OwnMetric(target.base, target.drops)
        return EditedAnswers(as_text(target.base), {}, target.base, target.drops, 0, metric=metric)

    def under_steerings(self, run: SteeringRun, example: Example, names: Sequence[str]) -> list[RowAnswer]:
        """The target's log-probability after the prompt, and the logits where the target begins."""
        inputs = run.decoder.append_answer(example.inputs, example.settings, example.target_ids[:-1])
        logits = run.logits(inputs, names, len(example.target_ids))
        ids = torch.tensor(example.target_ids, device=logits.device)
        values = readouts.sequence_log_probability(logits, ids).tolist()
        return [RowAnswer(as_text(value), row) for value, row in zip(values, logits[:, 0], strict=True)]
