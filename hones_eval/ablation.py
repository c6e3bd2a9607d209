"""What a task's metric and its target's log-probability lose under one edit at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hones_eval import readouts
from hones_eval.decoding import Decoder
from hones_eval.errors import TaskError
from hones_eval.examples import Example, TaskExamples
from hones_eval.measure import Measurement, Totals
from hones_eval.replay import Passes, Replayer, Rows, SiteEdit


class _Results(NamedTuple):
    """One example's results: unedited, and under the edits (by number) that change them."""

    base: Any
    changed: dict[int, Any]


class Ablation:
    """One pass over a task's examples under every one of some edits, by the task's own metric.

    Where the metric is a mean over examples, running sums suffice. A corpus metric (BLEU-4, F1) is computed
    again over the whole corpus for every edit, so the results of answers that changed are kept.
    """

    def __init__(self, replayer: Replayer, examples: TaskExamples, edits: Sequence[SiteEdit]) -> None:
        """Measure `edits` on `examples` with the replayer's model."""
        self.replayer = replayer
        self.decoder = Decoder(replayer)
        self.examples = examples
        self.edits = list(edits)
        self._number = {edit: number for number, edit in enumerate(self.edits)}

    def zeros(self) -> dict[str, Tensor]:
        """Sums over examples: drops by edit [E], unedited values, and counts."""
        by_edit = ("metric_drop", "log_probability_drop")
        single = ("metric", "log_probability", "examples", "differing_answers", "plain_examples")
        sums = {name: torch.zeros(len(self.edits), dtype=torch.float64) for name in by_edit}
        return sums | {name: torch.zeros((), dtype=torch.float64) for name in single}

    def measure(self, example: Example) -> Measurement:
        """Decode, verify under every edit, and score the answers that differ."""
        if not example.target_ids:
            raise TaskError(
                f"{example.task}, doc_id {example.doc_id}: its target {example.target!r} has no tokens"
            )
        sums = self.zeros()
        decoded = self.decoder.greedy(example.inputs, example.settings)
        target = _Target(example.target_ids, self._number, sums["log_probability_drop"])
        shared = decoded.passes if decoded.covers(example.target_ids) else None
        if shared is not None:
            target.start(shared)
        results = _Results(self._score(example, decoded.tokens), {})
        known = {tuple(decoded.tokens): results.base}
        for edit, tokens in decoded.answers(self.edits, None if shared is None else target.add):
            if tokens == decoded.tokens:
                continue
            sums["differing_answers"] += 1
            if tuple(tokens) not in known:
                known[tuple(tokens)] = self._score(example, tokens)
            results.changed[self._number[edit]] = known[tuple(tokens)]
        if shared is None:
            self._replay_target(example, target)
        sums["log_probability"] += target.base
        sums["examples"] += 1
        sums["plain_examples"] += decoded.passes is None
        if not self.examples.is_mean:
            return Measurement(sums, results)
        self._add_mean(results, sums)
        return Measurement(sums)

    def metric_drops(self, totals: Totals) -> Tensor:
        """What the metric loses under every edit [E], float64; the sign is flipped where lower is better."""
        sign = 1.0 if self.examples.higher_is_better else -1.0
        if self.examples.is_mean:
            return sign * totals.sums["metric_drop"] / totals.sums["examples"]
        results: list[_Results] = [totals.records[i] for i in sorted(totals.records)]
        base = self.base_metric(totals)
        drops = torch.zeros(len(self.edits), dtype=torch.float64)
        for number in set().union(*(result.changed for result in results)):
            edited = self.examples.aggregate([result.changed.get(number, result.base) for result in results])
            drops[number] = sign * (base - edited)
        return drops

    def log_probability_drops(self, totals: Totals) -> Tensor:
        """Mean drop of the target's log-probability under every edit [E], float64."""
        return totals.sums["log_probability_drop"] / totals.sums["examples"]

    def base_metric(self, totals: Totals) -> float:
        """The metric of the unedited model on these examples."""
        if self.examples.is_mean:
            return float(totals.sums["metric"] / totals.sums["examples"])
        return self.examples.aggregate([totals.records[i].base for i in sorted(totals.records)])

    def log_probability_drop(self, example: Example) -> tuple[Tensor, float]:
        """One example's drop of its target's log-probability [E], and the unedited log-probability."""
        target = _Target(example.target_ids, self._number, self.zeros()["log_probability_drop"])
        self._replay_target(example, target)
        return target.drops, target.base

    def _replay_target(self, example: Example, target: "_Target") -> None:
        """Replay all edits on prompt and target, where the pass over the answer does not read the target."""
        inputs = self.decoder.append(example.inputs, example.target_ids[:-1])
        passes = self.replayer.record(inputs, len(example.target_ids))
        target.start(passes)
        for rows in passes.edited(self.edits):
            target.add(rows)

    def _add_mean(self, results: _Results, sums: dict[str, Tensor]) -> None:
        base = float(results.base[self.examples.metric])
        sums["metric"] += base
        for number, result in results.changed.items():
            sums["metric_drop"][number] = base - float(result[self.examples.metric])

    def _score(self, example: Example, tokens: list[int]) -> Any:
        return self.examples.score(example.index, self.examples.decode(example.index, tokens))


class _Target:
    """One example's target, teacher-forced behind the prompt, and its drops of log-probability [E]."""

    def __init__(self, target_ids: list[int], number: dict[SiteEdit, int], drops: Tensor) -> None:
        self.ids = torch.tensor(target_ids)
        self.number = number
        self.drops = drops
        self.base = 0.0

    def start(self, passes: Passes) -> None:
        """Read the unedited log-probability from a pass whose first read tokens are the target's."""
        self.base = self._read(passes.base_logits[None])[0]

    def add(self, rows: Rows) -> None:
        """Read the log-probabilities under some edits."""
        for edit, value in zip(rows.edits, self._read(rows.logits), strict=True):
            self.drops[self.number[edit]] = self.base - value

    def _read(self, logits: Tensor) -> list[float]:
        ids = self.ids.to(logits.device)
        values: list[float] = readouts.sequence_log_probability(logits[:, : len(ids)], ids).tolist()
        return values
