"""V-SEAM: heads that help and heads that hurt the probability of the answer's first token."""

import torch
from torch import Tensor

from hones_eval import readouts
from hones_eval.examples import Example
from hones_eval.measure import Measurement, Totals
from hones_eval.replay import Replayer, replaced_by_mean
from hones_eval.sites import Head


class HeadContribution:
    """One pass: signed, positive and negative scores of every head (V-SEAM 3)."""

    def __init__(self, replayer: Replayer) -> None:
        """Score all heads of the replayer's model."""
        self.replayer = replayer
        shape = replayer.anatomy.shape
        self.heads = [Head(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]

    def zeros(self) -> dict[str, Tensor]:
        """Sums of drops [L, H] by kind, and the numbers of correct and incorrect examples."""
        shape = self.replayer.anatomy.shape
        kinds = ("signed", "positive", "negative")
        sums = {kind: torch.zeros(shape.layers, shape.heads, dtype=torch.float64) for kind in kinds}
        return sums | {name: torch.zeros((), dtype=torch.float64) for name in ("correct", "incorrect", "p")}

    def measure(self, example: Example) -> Measurement:
        """Drop of the first answer token's probability with each head replaced."""
        passes = self.replayer.record(example.inputs, 1)
        first = torch.tensor(example.target_ids[:1], device=passes.base_logits.device)
        p = readouts.answer_probability(passes.base_logits, first)
        sums = self.zeros()
        for rows in passes.edited(replaced_by_mean(self.heads)):
            drops = (p - readouts.answer_probability(rows.logits[:, 0], first)).tolist()
            for head, drop in zip(rows.heads, drops, strict=True):
                sums["signed"][head] = drop
        # "Correct" as the paper counts it: the likeliest token is one of the answer's tokens.
        correct = int(passes.base_logits[0].argmax()) in example.target_ids
        sums["positive" if correct else "negative"] = (sums["signed"] * (1 if correct else -1)).clamp(min=0)
        sums["correct" if correct else "incorrect"] += 1
        sums["p"] += float(p)
        return Measurement(sums)

    @staticmethod
    def scores(totals: Totals) -> dict[str, Tensor]:
        """Means [L, H]: `signed` over all, `positive` over correct and `negative` over incorrect examples."""
        sums = totals.sums
        return {
            "signed": (sums["signed"] / (sums["correct"] + sums["incorrect"])).float(),
            "positive": (sums["positive"] / sums["correct"].clamp(min=1)).float(),
            "negative": (sums["negative"] / sums["incorrect"].clamp(min=1)).float(),
        }
