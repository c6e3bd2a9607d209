"""V-SEAM: heads that help and heads that hurt the probability of the answer's first token."""

from typing import Any

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.sites import all_heads, top_heads
from hones_eval.engine.passes import replaced_by_mean
from hones_eval.engine.prefixes import SharedReplayer
from hones_eval.engine.replay import Replayer
from hones_eval.errors import TaskError
from hones_eval.lmms.answers.next_token import NextTokenReadouts
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.runs.measure import Measurement, Totals

KINDS = ("signed", "positive", "negative")


class HeadContribution:
    """One pass: signed, positive and negative scores of every head (V-SEAM 3).

    Questions on one picture share the work up to where they differ.
    """

    def __init__(self, replayer: Replayer, examples: TaskExamples) -> None:
        """Score all heads of the replayer's model on `examples`."""
        self.replayer = replayer
        self.readouts = NextTokenReadouts(SharedReplayer(replayer), examples, _probability_and_correct)
        shape = replayer.anatomy.shape
        self.heads = all_heads(shape)

    def zeros(self) -> dict[str, Tensor]:
        """Sums of drops [L, H] by kind and of their squares, and counts of examples."""
        shape = self.replayer.anatomy.shape
        names = [*KINDS, *map(_squares, KINDS)]
        sums = {name: torch.zeros(shape.layers, shape.heads, dtype=torch.float64) for name in names}
        counts = ("correct", "incorrect", "without_tokens", "p", "shared")
        return sums | {name: torch.zeros((), dtype=torch.float64) for name in counts}

    def measure(self, example: Example) -> Measurement:
        """Drop of the first answer token's probability with each head replaced.

        An example whose answer has no tokens adds nothing; its record is its name.
        """
        sums = self.zeros()
        if not example.target_ids:
            sums["without_tokens"] += 1
            return Measurement(sums, f"{example.task}, doc_id {example.doc_id}")
        found = self.readouts.of(example, replaced_by_mean(self.heads))
        p, correct = found.base.tolist()
        for edit, value in zip(found.edits, found.edited[:, 0].tolist(), strict=True):
            sums["signed"][edit.site] = p - value
        sums["positive" if correct else "negative"] = (sums["signed"] * (1 if correct else -1)).clamp(min=0)
        sums |= {_squares(kind): sums[kind].square() for kind in KINDS}
        sums["correct" if correct else "incorrect"] += 1
        sums["p"] += p
        sums["shared"] += found.shared > 0
        return Measurement(sums)

    @staticmethod
    def scores(totals: Totals) -> dict[str, Tensor]:
        """Means [L, H]: `signed` over all, `positive` over correct and `negative` over incorrect examples.

        A kind without an example is all zeros; `report` says so.
        """
        counts = _counts(totals)
        return {kind: (totals.sums[kind] / max(counts[kind], 1)).float() for kind in KINDS}

    @staticmethod
    def standard_errors(totals: Totals) -> dict[str, Tensor | None]:
        """Standard errors [L, H] of `scores`, from the examples' spread; None for fewer than two examples."""
        errors: dict[str, Tensor | None] = {}
        for kind, count in _counts(totals).items():
            total, squares = totals.sums[kind], totals.sums[_squares(kind)]
            # A sum of squares rounds to just below what it should be where all examples agree.
            variance = (squares - total.square() / max(count, 1)).clamp(min=0) / max(count - 1, 1)
            errors[kind] = (variance / count).sqrt() if count > 1 else None
        return errors

    @staticmethod
    def report(totals: Totals, heads: int) -> dict[str, Any]:
        """Subset sizes, base probability, the `heads` best of each kind with standard errors, and warnings.

        Raises: TaskError when no example's answer has a token.
        """
        counts = _counts(totals)
        nameless = [totals.records[i] for i in sorted(totals.records) if totals.records[i] is not None]
        if not counts["signed"]:
            raise TaskError(f"no answer of {len(nameless)} examples has a token, the first of {nameless[0]}")
        scores, errors = HeadContribution.scores(totals), HeadContribution.standard_errors(totals)
        warnings = [
            f"no example is {what}, so {kind} scores are not measured and stand as 0"
            for kind, what in (("positive", "correct"), ("negative", "incorrect"))
            if not counts[kind]
        ]
        if nameless:
            warnings.append(
                f"{len(nameless)} examples count for nothing, as their answers have no tokens: {nameless[0]}"
            )
        return {
            "correct_examples": counts["positive"],
            "incorrect_examples": counts["negative"],
            "examples_without_answer_tokens": nameless,
            "base_probability": float(totals.sums["p"] / counts["signed"]),
            "top_positive": _best(scores["positive"], errors["positive"], heads),
            "top_negative": _best(scores["negative"], errors["negative"], heads),
            "standard_errors": {kind: None if e is None else e.tolist() for kind, e in errors.items()},
            "warnings": warnings,
        }


def _probability_and_correct(example: Example, logits: Tensor) -> Tensor:
    """For logits [rows, vocabulary] the probability of the answer's first token, and correctness: [rows, 2].

    "Correct" as the paper counts it: the likeliest token is one of the answer's tokens.
    """
    if not example.target_ids:  # beside others on its picture; nothing is read of it
        return torch.zeros(len(logits), 2)
    ids = torch.tensor(example.target_ids, device=logits.device)
    correct = torch.isin(logits.argmax(-1), ids)
    return torch.stack([readouts.answer_probability(logits, ids[:1]), correct.float()], dim=1)


def _squares(kind: str) -> str:
    return f"{kind}_squares"


def _counts(totals: Totals) -> dict[str, int]:
    """How many examples each kind of score is a mean over."""
    correct, incorrect = int(totals.sums["correct"]), int(totals.sums["incorrect"])
    return {"signed": correct + incorrect, "positive": correct, "negative": incorrect}


def _best(scores: Tensor, errors: Tensor | None, count: int) -> list[dict[str, Any]]:
    return [
        {
            "head": list(head),
            "score": float(scores[head]),
            "standard_error": None if errors is None else float(errors[head]),
        }
        for head in top_heads(scores, count)
        if scores[head] > 0
    ]
