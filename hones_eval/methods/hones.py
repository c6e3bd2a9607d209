"""HONES: localize heads by the task's metric, then attribute neurons conditioned on those heads."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.sites import Head, all_heads
from hones_eval.engine.passes import replaced_by_mean
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.runs.ablation import Ablation
from hones_eval.runs.measure import Measurement, Totals


class HeadLocalization(Ablation):
    """Pass 1: every head's drop of the metric and of the target's log-probability (HONES 1)."""

    def __init__(self, replayer: Replayer, examples: TaskExamples) -> None:
        """Score all heads of the replayer's model on `examples`."""
        shape = replayer.anatomy.shape
        self.heads = all_heads(shape)
        super().__init__(replayer, examples, replaced_by_mean(self.heads))

    def scores(self, totals: Totals) -> Tensor:
        """Metric drop [L, H]; the sign is flipped where lower is better."""
        return self.by_layer(self.metric_drops(totals))

    def log_probability_scores(self, totals: Totals) -> Tensor:
        """Mean drop of the target's log-probability [L, H]."""
        return self.by_layer(self.log_probability_drops(totals))

    def by_layer(self, drops: Tensor) -> Tensor:
        """One number per head, in their order, as [L, H] float32; 0 for heads that a layer lacks."""
        shape = self.replayer.anatomy.shape
        scores = torch.zeros(shape.layers, shape.heads)
        scores[shape.head_mask()] = drops.float().cpu()
        return scores


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
        if example.is_distractor:  # of a query's candidates the right one speaks for its answer (HONES 2)
            return Measurement(self.zeros())
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
        if not count:
            raise HonesError("no example shows a right candidate to attribute neurons on: move --offset")
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
