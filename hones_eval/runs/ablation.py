"""What a task's metric and its target's log-probability lose under one edit at a time."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Self

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.engine.decoding import Decoder
from hones_eval.engine.passes import Passes, Rows, SiteEdit, check_finite
from hones_eval.engine.prefixes import LastTokens
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.answers import choices, margin
from hones_eval.lmms.answers.choices import Choices
from hones_eval.lmms.answers.margin import Margins
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.runs.measure import Measurement, Totals
from hones_eval.runs.next_token import Together


class _Answers(NamedTuple):
    """One example's answers: unedited, and under the edits (by number) that change it."""

    base: str
    changed: Mapping[int, str]

    @classmethod
    def of(cls, record: Any) -> Self:
        """From a record, which is plain JSON."""
        if "margins" in record:
            return cls(record["base"], Margins.of(record["margins"]))
        return cls(record["base"], {int(number): text for number, text in record["changed"].items()})

    def record(self) -> dict[str, Any]:
        """As plain JSON."""
        if isinstance(self.changed, Margins):
            return {"base": self.base, "margins": self.changed.record()}
        return {"base": self.base, "changed": {str(number): text for number, text in self.changed.items()}}


class Ablation:
    """One pass over a task's examples under every one of some edits, by the task's own metric.

    Where the metric is a mean over examples, running sums suffice. A corpus metric (BLEU-4, F1) is computed
    again over the whole corpus for every edit, so the answers that changed are kept.
    """

    def __init__(self, replayer: Replayer, examples: TaskExamples, edits: Sequence[SiteEdit]) -> None:
        """Measure `edits` on `examples` with the replayer's model."""
        self.replayer = replayer
        self.decoder = Decoder(replayer)
        self.examples = examples
        self.edits = list(edits)
        self._number = {edit: number for number, edit in enumerate(self.edits)}
        self.in_play: Sequence[int] = range(len(self.edits))
        """Numbers of the edits that `measure` runs; racing and screening run fewer than all."""
        self.together = Together(replayer, examples, _margin_and_target)

    def zeros(self) -> dict[str, Tensor]:
        """Sums over examples: drops and examples by edit [E], unedited values, and counts."""
        by_edit = ("metric_drop", "log_probability_drop", "measured")
        single = ("metric", "log_probability", "examples", "differing_answers", "plain_examples", "shared")
        sums = {name: torch.zeros(len(self.edits), dtype=torch.float64) for name in by_edit}
        return sums | {name: torch.zeros((), dtype=torch.float64) for name in single}

    def measure(self, example: Example) -> Measurement:
        """Decode, verify under every edit in play, and score the answers that differ."""
        if not example.target_ids:
            raise TaskError(
                f"{example.task}, doc_id {example.doc_id}: its target {example.target!r} has no tokens"
            )
        if self.examples.by_log_probability:
            return self._measure_target(example)
        if example.margin is not None:
            return self._measure_margin(example)
        if example.choices is not None:
            return self._measure_choices(example, example.choices)
        sums = self.zeros()
        decoded = self.decoder.greedy(example.inputs, example.settings)
        target = _Target(example, self._number, sums["log_probability_drop"])
        shared = decoded.passes if decoded.covers(example.target_ids) else None
        if shared is not None:
            target.start(shared)
        changed: dict[int, str] = {}
        answers = _Answers(self.examples.decode(example.index, decoded.tokens), changed)
        edits = [self.edits[number] for number in self.in_play]
        for edit, tokens in decoded.answers(edits, None if shared is None else target.add):
            if tokens != decoded.tokens:
                sums["differing_answers"] += 1
                changed[self._number[edit]] = self.examples.decode(example.index, tokens)
        if shared is None:
            self._replay_target(example, target, edits)
        sums["plain_examples"] += decoded.passes is None
        return self._measured(example, sums, answers, target.base)

    def _measure_margin(self, example: Example) -> Measurement:
        """The margin between two words at the next token, and the target's log-probability there."""
        sums = self.zeros()
        found = self.together.of(example, [self.edits[number] for number in self.in_play])
        base, log_p = found.base.tolist()
        numbers = [self._number[edit] for edit in found.edits]
        margins = torch.full((len(self.edits),), torch.nan)
        margins[numbers] = found.edited[:, 0].float()
        sums["log_probability_drop"][numbers] = log_p - found.edited[:, 1]
        sums["differing_answers"] += ((margins[numbers] > 0) != (base > 0)).sum()
        sums["shared"] += found.shared > 0
        return self._measured(example, sums, _Answers(margin.as_text(base), Margins(margins)), log_p)

    def _measure_choices(self, example: Example, asked: Choices) -> Measurement:
        """The value of every choice, as the wrapper makes it, and the right one's log-probability."""
        sums, numbers = self.zeros(), torch.tensor(self.in_play)
        size = (1 + len(self.edits), len(asked.offered))  # row 0 is unedited
        values, greedy = torch.full(size, torch.nan).double(), torch.zeros(size, dtype=torch.bool)
        log_p, ids = torch.zeros(size[0]).double(), torch.tensor(example.target_ids)
        shared = 0
        for part, member, logits in self._choice_logits(asked):
            rows = [0 if edit is None else 1 + self._number[edit] for edit in part.edits]
            found, is_greedy = asked.offered[member].read(logits, asked.reading)
            values[rows, member], greedy[rows, member] = found.double().cpu(), is_greedy.cpu()
            if member == asked.gold:
                own = logits[:, asked.start : asked.start + len(ids)]
                log_p[rows] = readouts.sequence_log_probability(own, ids.to(own.device)).double().cpu()
            shared = part.shared
        edited = 1 + numbers
        if not bool(values[0].isfinite().all() and values[edited].isfinite().all()):
            self._not_finite(example, asked)
        said = [choices.as_text(*one) for one in zip(values.tolist(), greedy.tolist(), strict=True)]
        answers = _Answers(said[0], {number: said[1 + number] for number in self.in_play})
        sums["log_probability_drop"][numbers] = log_p[0] - log_p[edited]
        sums["differing_answers"] += (values[edited].argmin(1) != values[0].argmin()).sum()
        sums["shared"] += shared > 0
        return self._measured(example, sums, answers, float(log_p[0]))

    def _choice_logits(self, asked: Choices) -> Iterator[tuple[LastTokens, int, Tensor]]:
        """Logits [rows, scored + 1, vocabulary] of every choice, which share their question."""
        edits = [self.edits[number] for number in self.in_play]
        reads = [one.scored + 1 for one in asked.offered]
        sharing = self.together.sharing
        for part in sharing.last_tokens([one.inputs for one in asked.offered], edits, reads):
            for place, member in enumerate(part.members):
                yield part, member, part.logits[:, place, -reads[member] :]

    def _not_finite(self, example: Example, asked: Choices) -> NoReturn:
        where = f"{example.task}, doc_id {example.doc_id}"
        for one in asked.offered:
            check_finite(self.replayer.record(one.inputs, one.scored + 1), where)
        raise HonesError(f"{where}: the logits under an edit are not finite")

    def _measure_target(self, example: Example) -> Measurement:
        """The target's log-probability alone, which is the metric too: nothing is decoded."""
        sums = self.zeros()
        self.decoder.learn_type(example.inputs, example.settings)
        target = _Target(example, self._number, sums["log_probability_drop"])
        self._replay_target(example, target, [self.edits[number] for number in self.in_play])
        sums["metric_drop"] += sums["log_probability_drop"]
        sums["metric"] += target.base
        return self._measured(example, sums, None, target.base)

    def _measured(
        self, example: Example, sums: dict[str, Tensor], answers: _Answers | None, log_probability: float
    ) -> Measurement:
        """What all ways of measuring count alike; answers are scored, or kept where only a corpus can be."""
        sums["measured"][list(self.in_play)] = 1
        sums["log_probability"] += log_probability
        sums["examples"] += 1
        if answers is None:
            return Measurement(sums)
        if not self.examples.is_mean:
            return Measurement(sums, answers.record())
        self._add_mean(example.index, answers, sums)
        return Measurement(sums)

    def metric_drops(self, totals: Totals) -> Tensor:
        """What the metric loses under every edit [E], float64; the sign is flipped where lower is better.

        A mean over the examples that an edit was measured on; 0 where there is none.
        """
        sign = 1.0 if self.examples.higher_is_better else -1.0
        if self.examples.is_mean:
            return sign * totals.sums["metric_drop"] / totals.sums["measured"].clamp(min=1)
        scored = _Scored(self.examples, totals)
        base = self.examples.aggregate([scored.result(index, None) for index in scored.answers])
        drops = torch.zeros(len(self.edits), dtype=torch.float64)
        for number in set().union(*(one.changed for one in scored.answers.values())):
            edited = self.examples.aggregate([scored.result(index, number) for index in scored.answers])
            drops[number] = sign * (base - edited)
        return drops

    def log_probability_drops(self, totals: Totals) -> Tensor:
        """Mean drop of the target's log-probability under every edit [E], float64."""
        return totals.sums["log_probability_drop"] / totals.sums["measured"].clamp(min=1)

    def base_metric(self, totals: Totals) -> float:
        """The metric of the unedited model on these examples."""
        if self.examples.is_mean:
            return float(totals.sums["metric"] / totals.sums["examples"])
        scored = _Scored(self.examples, totals)
        return self.examples.aggregate([scored.result(index, None) for index in scored.answers])

    def log_probability_drop(self, example: Example) -> tuple[Tensor, float]:
        """One example's drop of its target's log-probability [E], and the unedited log-probability."""
        target = _Target(example, self._number, self.zeros()["log_probability_drop"])
        self._replay_target(example, target, self.edits)
        return target.drops, target.base

    def _replay_target(self, example: Example, target: "_Target", edits: Sequence[SiteEdit]) -> None:
        """Replay edits on prompt and target, where the pass over the answer does not read the target."""
        inputs = self.decoder.append(example.inputs, example.target_ids[:-1])
        passes = self.replayer.record(inputs, len(example.target_ids))
        target.start(passes)
        for rows in passes.edited(edits):
            target.add(rows)

    def _add_mean(self, index: int, answers: _Answers, sums: dict[str, Tensor]) -> None:
        def value(text: str) -> float:
            return float(self.examples.score(index, text)[self.examples.metric])

        values = {text: value(text) for text in {answers.base, *answers.changed.values()}}
        sums["metric"] += values[answers.base]
        for number, text in answers.changed.items():
            sums["metric_drop"][number] = values[answers.base] - values[text]


def _margin_and_target(example: Example, logits: Tensor) -> Tensor:
    """For logits [rows, vocabulary] the margin, and the target's log-probability: [rows, 2]."""
    assert example.margin is not None
    log_p = logits.float().log_softmax(-1)[:, example.target_ids[0]]
    return torch.stack([example.margin.of(logits), log_p], dim=1)


class _Scored:
    """The results of a corpus' answers, each scored once; margins are too many to remember."""

    def __init__(self, examples: TaskExamples, totals: Totals) -> None:
        self.examples = examples
        self.answers = {index: _Answers.of(totals.records[index]) for index in sorted(totals.records)}
        self._known: dict[tuple[int, str], Any] = {}

    def result(self, index: int, number: int | None) -> Any:
        """One example's result, unedited (None) or under the edit with a number."""
        answers = self.answers[index]
        text = answers.base if number is None else answers.changed.get(number, answers.base)
        if isinstance(answers.changed, Margins):
            return self.examples.score(index, text)
        if (index, text) not in self._known:
            self._known[index, text] = self.examples.score(index, text)
        return self._known[index, text]


class _Target:
    """One example's target, teacher-forced behind the prompt, and its drops of log-probability [E]."""

    def __init__(self, example: Example, number: dict[SiteEdit, int], drops: Tensor) -> None:
        self.where = f"{example.task}, doc_id {example.doc_id}"
        self.ids = torch.tensor(example.target_ids)
        self.number = number
        self.drops = drops
        self.base = 0.0

    def start(self, passes: Passes) -> None:
        """Read the unedited log-probability from a pass whose first read tokens are the target's.

        Raises: HonesError where it is not finite.
        """
        check_finite(passes, self.where)
        self.base = self._read(passes.base_logits[None])[0]

    def add(self, rows: Rows) -> None:
        """Read the log-probabilities under some edits."""
        for edit, value in zip(rows.edits, self._read(rows.logits), strict=True):
            self.drops[self.number[edit]] = self.base - value

    def _read(self, logits: Tensor) -> list[float]:
        ids = self.ids.to(logits.device)
        values: list[float] = readouts.sequence_log_probability(logits[:, : len(ids)], ids).tolist()
        return values
