"""The exact effect of replacing every head, on the task's metric and on the answer's log-probability."""

import torch
from torch import Tensor

from hones_eval.core.sites import all_heads, top_heads
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.methods.head_replacement import HeadReplacement
from hones_eval.runs.ablation import Ablation
from hones_eval.runs.measure import Measurement, Totals


class HeadLocalization(Ablation):
    """One pass over the examples with every head replaced in turn (HONES 1)."""

    def __init__(
        self,
        replayer: Replayer,
        examples: TaskExamples,
        replacement: HeadReplacement | None = None,
        log_probability: bool = True,
    ) -> None:
        """Score all heads of the replayer's model on `examples`; by default with mean replacement.

        `log_probability` as in `Ablation`.
        """
        self.heads = all_heads(replayer.anatomy.shape)
        self.replacement = replacement or HeadReplacement.by_mean(replayer.anatomy)
        super().__init__(replayer, examples, self.replacement.of(self.heads), log_probability=log_probability)

    def measure(self, example: Example) -> Measurement:
        """Answer one example with every head in play replaced, and score the answers that differ."""
        self.replacement.prepare(example)
        return super().measure(example)

    def scores(self, totals: Totals) -> Tensor:
        """Drop of the metric [L, H]; the sign is flipped where lower is better."""
        return self.by_layer(self.metric_drops(totals))

    def log_probability_scores(self, totals: Totals) -> Tensor:
        """Mean drop of the gold answer's log-probability [L, H]."""
        return self.by_layer(self.log_probability_drops(totals))

    def cost(self) -> str:
        """The passes per example, and the flags that take fewer."""
        return f"{len(self.in_play)} head passes per example; --budget 0.1 or --race 0.05 take fewer"

    def so_far(self, sums: dict[str, Tensor]) -> str:
        """The heads whose replacement lowers the gold answer's log-probability most, or the metric."""
        if self.run.log_probability:
            scores = self.log_probability_scores(Totals(sums, {}))
        elif self.examples.is_mean:
            scores = self.scores(Totals(sums, {}))
        else:
            return "the metric is computed at the end"
        best = top_heads(scores, min(5, len(self.heads)), self.replayer.anatomy.shape.head_mask())
        return f"best heads so far {', '.join(f'{head.layer}.{head.head}' for head in best)}"

    def by_layer(self, drops: Tensor) -> Tensor:
        """One number per head, in the order of `heads`, as [L, H] float32; 0 for heads that a layer lacks."""
        shape = self.replayer.anatomy.shape
        scores = torch.zeros(shape.layers, shape.heads)
        scores[shape.head_mask()] = drops.float().cpu()
        return scores
