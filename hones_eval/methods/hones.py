"""HONES: localize heads by the task's metric, then attribute neurons conditioned on those heads."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hones_eval import readouts
from hones_eval.decoding import Decoder
from hones_eval.errors import HonesError
from hones_eval.examples import Example, TaskExamples
from hones_eval.measure import Measurement, Totals
from hones_eval.replay import Passes, Replayer, Rows, replaced_by_mean
from hones_eval.sites import Head, Neuron


class _Record(NamedTuple):
    """One example's results [metric value]: unedited, and for the heads under which they change."""

    base: Any
    changed: dict[Head | Neuron, Any]


class HeadLocalization:
    """Pass 1: every head's drop of the metric and of the target's log-probability (HONES 1)."""

    def __init__(self, replayer: Replayer, examples: TaskExamples) -> None:
        """Score all heads of the replayer's model on `examples`."""
        self.anatomy = replayer.anatomy
        self.decoder = Decoder(replayer)
        self.examples = examples
        shape = self.anatomy.shape
        self.heads = [Head(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]

    def zeros(self) -> dict[str, Tensor]:
        """`log_probability` [L, H], and counts."""
        shape = self.anatomy.shape
        return {
            "log_probability": torch.zeros(shape.layers, shape.heads, dtype=torch.float64),
            "base_log_probability": torch.zeros((), dtype=torch.float64),
            "examples": torch.zeros((), dtype=torch.float64),
            "differing_answers": torch.zeros((), dtype=torch.float64),
            "plain_examples": torch.zeros((), dtype=torch.float64),
        }

    def measure(self, example: Example) -> Measurement:
        """Decode, verify under every head's replacement, and score the answers that differ."""
        decoded = self.decoder.greedy(example.inputs, example.settings)
        drops = _LogProbabilityDrop(self, example)
        shared = decoded.covers(example.target_ids)
        if shared and decoded.passes is not None:
            drops.start(decoded.passes)
        results = {tuple(decoded.tokens): self._score(example, decoded.tokens)}
        record = _Record(results[tuple(decoded.tokens)], {})
        differing = 0
        for edit, tokens in decoded.answers(replaced_by_mean(self.heads), drops.add if shared else None):
            if tokens == decoded.tokens:
                continue
            differing += 1
            key = tuple(tokens)
            if key not in results:
                results[key] = self._score(example, tokens)
            if results[key] != record.base:
                record.changed[edit.site] = results[key]
        if not shared:
            drops.replay()
        one = torch.ones((), dtype=torch.float64)
        sums = {
            "log_probability": drops.drops,
            "base_log_probability": drops.base.double().cpu(),
            "examples": one,
            "differing_answers": one * differing,
            "plain_examples": one * (decoded.passes is None),
        }
        return Measurement(sums, record)

    def scores(self, totals: Totals) -> Tensor:
        """Metric drop [L, H] over the whole corpus; the sign is flipped where lower is better."""
        sign = 1.0 if self.examples.higher_is_better else -1.0
        records: list[_Record] = [totals.records[i] for i in sorted(totals.records)]
        base = self.examples.aggregate([record.base for record in records])
        touched = set().union(*(record.changed for record in records))
        shape = self.anatomy.shape
        scores = torch.zeros(shape.layers, shape.heads)
        for head in touched:
            edited = self.examples.aggregate([record.changed.get(head, record.base) for record in records])
            scores[head] = sign * (base - edited)
        return scores

    def base_metric(self, totals: Totals) -> float:
        """The metric of the unedited model on these examples."""
        return self.examples.aggregate([totals.records[i].base for i in sorted(totals.records)])

    def log_probability_drop(self, example: Example) -> tuple[Tensor, float]:
        """Drop of one example's target log-probability [L, H], and the unedited log-probability."""
        drops = _LogProbabilityDrop(self, example)
        drops.replay()
        return drops.drops, float(drops.base)

    def _score(self, example: Example, tokens: list[int]) -> Any:
        return self.examples.score(example.index, self.examples.decode(example.index, tokens))


class _LogProbabilityDrop:
    """One example's drop of its target's log-probability [L, H], teacher-forced behind the prompt."""

    def __init__(self, localization: HeadLocalization, example: Example) -> None:
        self.localization, self.example = localization, example
        self.drops = localization.zeros()["log_probability"]
        self.base = torch.zeros(())
        self.target = torch.tensor(example.target_ids)

    def replay(self) -> None:
        """Replay all heads on prompt and target, where the pass over the answer does not read the target."""
        decoder = self.localization.decoder
        inputs = decoder.append(self.example.inputs, self.example.target_ids[:-1])
        passes = decoder.replayer.record(inputs, len(self.target))
        self.start(passes)
        for rows in passes.edited(replaced_by_mean(self.localization.heads)):
            self.add(rows)

    def start(self, passes: Passes) -> None:
        """Read the unedited log-probability from a pass whose first read tokens are the target's."""
        self.base = self._read(passes.base_logits[None])[0]

    def add(self, rows: Rows) -> None:
        """Read some heads' log-probabilities."""
        for head, drop in zip(rows.heads, (self.base - self._read(rows.logits)).tolist(), strict=True):
            self.drops[head] = drop

    def _read(self, logits: Tensor) -> Tensor:
        target = self.target.to(logits.device)
        return readouts.sequence_log_probability(logits[:, : len(target)], target)


class NeuronAttribution:
    """Pass 2: every neuron's write-in contribution, unedited and with each chosen head replaced (HONES 2)."""

    def __init__(
        self,
        replayer: Replayer,
        heads: Sequence[Head],
        rectify: Literal["mean", "item"] = "mean",
        token_weights: Tensor | None = None,
    ) -> None:
        """Condition on `heads`, at least one.

        Args:
            replayer: replays the model.
            heads: those with a positive weight among the chosen ones.
            rectify: whether drops are cut at zero after the mean over items (the released code) or before.
            token_weights: inverse document frequencies [vocabulary] for captions; default all 1.
        """
        self.replayer, self.anatomy = replayer, replayer.anatomy
        self.heads = list(heads)
        self.rectify = rectify
        self.token_weights = token_weights

    def zeros(self) -> dict[str, Tensor]:
        """`contribution` [L, I] of the unedited pass, `drop` [heads, L, I], and the count of examples."""
        shape = self.anatomy.shape
        return {
            "contribution": torch.zeros(shape.layers, shape.neurons, dtype=torch.float64),
            "drop": torch.zeros(len(self.heads), shape.layers, shape.neurons, dtype=torch.float64),
            "examples": torch.zeros((), dtype=torch.float64),
        }

    def measure(self, example: Example) -> Measurement:
        """Contributions at the last prompt token, for this example's target."""
        gains = self._gains(example)
        passes = self.replayer.record(example.inputs, 1)
        base = [readouts.write_in(z[0], gain) for z, gain in zip(passes.base_neurons(), gains, strict=True)]
        for layer, contribution in enumerate(base):
            if not bool(torch.isfinite(contribution).all()):
                raise HonesError(
                    f"{example.task} document {example.doc_id}: "
                    f"the FFN activations of layer {layer} are not finite"
                )
        sums = self.zeros()
        sums["contribution"] += torch.stack([c.double().cpu() for c in base])
        sums["examples"] += 1

        def add(layer: int, rows: Tensor, activations: Tensor) -> None:
            drop = base[layer] - readouts.write_in(activations[:, 0], gains[layer])
            drop = drop.clamp(min=0) if self.rectify == "item" else drop
            sums["drop"][rows, layer] = drop.double().cpu()

        for _ in passes.edited(replaced_by_mean(self.heads), add):
            pass
        return Measurement(sums)

    def importance(self, totals: Totals, weights: Tensor) -> Tensor:
        """Importance [L, I]: the head-weighted mean of the rectified drops; weights [heads] are positive.

        Without heads it is the mean contribution itself, the stated fallback.
        """
        count = totals.sums["examples"]
        if not self.heads:
            return (totals.sums["contribution"] / count).float()
        drops = (totals.sums["drop"] / count).clamp(min=0)
        weights = weights.double()
        return (torch.einsum("h,hli->li", weights, drops) / weights.sum()).float()

    def _gains(self, example: Example) -> list[Tensor]:
        weights = None if self.token_weights is None else self.token_weights[example.target_ids].tolist()
        direction = readouts.target_direction(self.anatomy.unembedding, example.target_ids, weights)
        layers = range(self.anatomy.shape.layers)
        return [readouts.write_gain(self.anatomy.down_weight(layer), direction) for layer in layers]


def inverse_document_frequency(documents: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Smoothed `ln((n + 1) / (df + 1)) + 1` of every token [vocabulary]; one document an item (HONES 2)."""
    frequency = torch.zeros(vocabulary, dtype=torch.float64)
    for document in documents:
        frequency[sorted(set(document))] += 1
    return torch.log((len(documents) + 1) / (frequency + 1)) + 1
