"""The effect of single edits on a task's metric and on the log-probability of its gold answers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hones_eval.engine.passes import SiteEdit
from hones_eval.engine.replay import Replayer
from hones_eval.errors import TaskError
from hones_eval.lmms.answers.kind import EditedAnswers, EditRun
from hones_eval.lmms.answers.target import Target
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.runs.measure import Measurement, Totals


class Ablation:
    """One pass over a task's examples under each of several edits, measured by the task's own metric.

    How an example is answered is up to the examples' kind of answer. Where the metric is a mean over
    examples, running sums suffice. A corpus metric (BLEU-4, F1) is computed again over the whole corpus for
    every edit, so the answers that changed are kept.
    """

    def __init__(
        self,
        replayer: Replayer,
        examples: TaskExamples,
        edits: Sequence[SiteEdit],
        margins: bool = False,
        log_probability: bool = True,
    ) -> None:
        """Measure `edits` on `examples` with the replayer's model.

        `margins` adds those of gold answers. Without `log_probability` that of gold answers is left out where
        it takes passes of its own.
        """
        self.replayer = replayer
        self.examples = examples
        self.edits = list(edits)
        self.run = EditRun.of(replayer, examples, self.edits, margins, log_probability)
        self.decoder = self.run.decoder
        self.in_play: Sequence[int] = range(len(self.edits))
        """Numbers of the edits that `measure` runs; racing and screening run fewer than all."""

    def zeros(self) -> dict[str, Tensor]:
        """Sums over examples: drops and examples by edit [E], unedited values, and counts."""
        by_edit = ["metric_drop", "log_probability_drop", "measured"]
        by_edit += ["margin_drop"] if self.run.margins else []
        single = ("metric", "log_probability", "examples", "differing_answers", "plain_examples", "shared")
        sums = {name: torch.zeros(len(self.edits), dtype=torch.float64) for name in by_edit}
        return sums | {name: torch.zeros((), dtype=torch.float64) for name in single}

    def measure(self, example: Example) -> Measurement:
        """Answer one example under every edit in play, and score the answers that differ.

        Raises: TaskError when the example's gold answer has no tokens.
        """
        if not example.target_ids:
            raise TaskError(f"{example.where}: its gold answer {example.target!r} has no tokens")
        answers = self.examples.kind.under_edits(self.run, example, self.in_play)
        sums = self.zeros()
        sums["measured"][list(self.in_play)] = 1
        sums["log_probability_drop"] += answers.drops
        if answers.margin_drops is not None:
            sums["margin_drop"] += answers.margin_drops
        sums["log_probability"] += answers.log_probability
        sums["differing_answers"] += answers.differing
        sums["shared"] += answers.shared
        sums["plain_examples"] += answers.decoded_in_full
        sums["examples"] += 1
        if answers.metric is not None:
            sums["metric"] += answers.metric.base
            sums["metric_drop"] += answers.metric.drops
        elif self.examples.is_mean:
            self._score(example.index, answers, sums)
        else:
            return Measurement(sums, self.examples.kind.record(answers))
        return Measurement(sums)

    def metric_drops(self, totals: Totals) -> Tensor:
        """The drop of the metric under every edit [E], float64; the sign is flipped where lower is better.

        A mean over the examples that an edit was measured on; 0 where there is none.
        """
        sign = 1.0 if self.examples.higher_is_better else -1.0
        if self.examples.is_mean:
            return sign * totals.sums["metric_drop"] / totals.sums["measured"].clamp(min=1)
        corpus = _Corpus(self.examples, totals)
        base = corpus.metric(None)
        drops = torch.zeros(len(self.edits), dtype=torch.float64)
        for number in corpus.changed_by():
            drops[number] = sign * (base - corpus.metric(number))
        return drops

    def log_probability_drops(self, totals: Totals) -> Tensor:
        """Mean drop of the gold answer's log-probability under every edit [E], float64."""
        return totals.sums["log_probability_drop"] / totals.sums["measured"].clamp(min=1)

    def base_metric(self, totals: Totals) -> float:
        """The metric of the unedited model on these examples."""
        if self.examples.is_mean:
            return float(totals.sums["metric"] / totals.sums["examples"])
        return _Corpus(self.examples, totals).metric(None)

    def log_probability_drop(self, example: Example) -> tuple[Tensor, float]:
        """One example's drop of its gold answer's log-probability [E], and the unedited log-probability."""
        target = Target(self.run, example)
        target.replay(self.edits)
        return target.drops, target.base

    def _score(self, index: int, answers: EditedAnswers, sums: dict[str, Tensor]) -> None:
        """Add an example's metric, unedited and under the edits that change its answer."""

        def value(text: str) -> float:
            return float(self.examples.metric_of(index, self.examples.score(index, text)))

        values = {text: value(text) for text in {answers.base, *answers.changed.values()}}
        sums["metric"] += values[answers.base]
        for number, text in answers.changed.items():
            sums["metric_drop"][number] = values[answers.base] - values[text]


class _Answers(NamedTuple):
    """One example's answers: unedited, and under the edits (by number) that change it."""

    base: str
    changed: Mapping[int, str]

    def under(self, number: int | None) -> str:
        """The answer unedited (None) or under the edit with a number."""
        return self.base if number is None else self.changed.get(number, self.base)


class _Corpus:
    """The answers to all examples of a pass, scored as a whole; each answer is scored once."""

    def __init__(self, examples: TaskExamples, totals: Totals) -> None:
        self.examples = examples
        records = {index: totals.records[index] for index in sorted(totals.records)}
        self.answers = {
            index: _Answers(record["base"], examples.kind.changed(record))
            for index, record in records.items()
        }
        self._known: dict[tuple[int, str], Any] = {}

    def changed_by(self) -> set[int]:
        """Numbers of the edits that change some answer."""
        return set[int]().union(*(answers.changed for answers in self.answers.values()))

    def metric(self, number: int | None) -> float:
        """The metric of all answers, unedited (None) or under the edit with a number."""
        return self.examples.aggregate([self._result(index, number) for index in self.answers])

    def _result(self, index: int, number: int | None) -> Any:
        answers = self.answers[index]
        text = answers.under(number)
        if self.examples.kind.many_answers:
            return self.examples.score(index, text)
        if (index, text) not in self._known:
            self._known[index, text] = self.examples.score(index, text)
        return self._known[index, text]
