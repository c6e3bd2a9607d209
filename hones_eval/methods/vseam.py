"""V-SEAM: rank heads that raise or lower the probability of the answer's first token.

The numbered steps (V-SEAM 1 to 4) and the paper are in `docs/glossary.md`.
"""

from typing import Any

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import all_heads, top_heads
from hones_eval.engine.prefixes import SharedReplayer
from hones_eval.engine.replay import Replayer
from hones_eval.errors import TaskError
from hones_eval.lmms.answers.next_token import NextTokenReadouts
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.methods.discovery import Discovery, sharing_report
from hones_eval.methods.head_replacement import HeadReplacement
from hones_eval.runs.measure import Measurement, Totals

KINDS = ("signed", "positive", "negative")


def rank(job: Discovery) -> Ranking:
    """Run the pass of V-SEAM 3, and rank heads by their signed scores."""
    job.check_counts()
    contribution = HeadContribution(job.replayer, job.examples, job.replacement)
    totals = job.loop.run(job.examples, contribution, "heads")
    found = HeadContribution.report(totals, job.heads)
    scores = HeadContribution.scores(totals)
    found["warnings"] += filter(None, [job.examples.constant_answer_warning()])
    found |= sharing_report(contribution.readouts.sharing, totals)
    report = job.report(found["correct_examples"] + found["incorrect_examples"]) | found
    return Ranking(
        provenance=job.provenance,
        head_scores=scores["signed"],
        head_positive=scores["positive"],
        head_negative=scores["negative"],
        report=report,
    )


class HeadContribution:
    """One pass that measures signed, positive and negative scores of every head (V-SEAM 3).

    Questions about one image share the computation of their common prefix.
    """

    def __init__(
        self, replayer: Replayer, examples: TaskExamples, replacement: HeadReplacement | None = None
    ) -> None:
        """Score all heads of the replayer's model on `examples`; by default with mean replacement."""
        self.replayer = replayer
        self.replacement = replacement or HeadReplacement.by_mean(replayer.anatomy)
        self.readouts = NextTokenReadouts(SharedReplayer(replayer), examples, _probability_and_correct)
        shape = replayer.anatomy.shape
        self.heads = all_heads(shape)

    def zeros(self) -> dict[str, Tensor]:
        """Sums of drops [L, H] per kind and of their squares, and counts of examples."""
        shape = self.replayer.anatomy.shape
        names = [*KINDS, *map(_squares, KINDS)]
        sums = {name: torch.zeros(shape.layers, shape.heads, dtype=torch.float64) for name in names}
        counts = ("correct", "incorrect", "without_tokens", "p", "shared")
        return sums | {name: torch.zeros((), dtype=torch.float64) for name in counts}

    def measure(self, example: Example) -> Measurement:
        """Drop of the probability of the answer's first token with each head replaced.

        An example whose answer has no tokens adds nothing to the scores; its record names it.
        """
        sums = self.zeros()
        if not example.target_ids:
            sums["without_tokens"] += 1
            return Measurement(sums, example.where)
        self.replacement.prepare(example)
        found = self.readouts.of(example, self.replacement.of(self.heads))
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

        A kind that has no example is all zeros; `report` warns of it.
        """
        counts = _counts(totals)
        return {kind: (totals.sums[kind] / max(counts[kind], 1)).float() for kind in KINDS}

    @staticmethod
    def standard_errors(totals: Totals) -> dict[str, Tensor | None]:
        """Standard errors [L, H] of `scores` over examples; None for fewer than two examples."""
        errors: dict[str, Tensor | None] = {}
        for kind, count in _counts(totals).items():
            total, squares = totals.sums[kind], totals.sums[_squares(kind)]
            # Where all examples agree, rounding can leave the sum of squares just below the squared sum.
            variance = (squares - total.square() / max(count, 1)).clamp(min=0) / max(count - 1, 1)
            errors[kind] = (variance / count).sqrt() if count > 1 else None
        return errors

    @staticmethod
    def report(totals: Totals, heads: int) -> dict[str, Any]:
        """Numbers of examples, base probability, the `heads` best heads of each kind, and warnings.

        Raises: TaskError when no example's answer has a token.
        """
        counts = _counts(totals)
        skipped = [totals.records[i] for i in sorted(totals.records) if totals.records[i] is not None]
        if not counts["signed"]:
            raise TaskError(
                f"none of {len(skipped)} examples has an answer with tokens; the first is {skipped[0]}"
            )
        scores, errors = HeadContribution.scores(totals), HeadContribution.standard_errors(totals)
        warnings = [
            f"no example is {subset}, so {kind} scores are not measured and are stored as 0"
            for kind, subset in (("positive", "correct"), ("negative", "incorrect"))
            if not counts[kind]
        ]
        if skipped:
            examples = "1 example" if len(skipped) == 1 else f"{len(skipped)} examples"
            warnings.append(f"skipped {examples} whose answers have no tokens; the first is {skipped[0]}")
        return {
            "correct_examples": counts["positive"],
            "incorrect_examples": counts["negative"],
            "examples_without_answer_tokens": skipped,
            "base_probability": float(totals.sums["p"] / counts["signed"]),
            "top_positive": _best(scores["positive"], errors["positive"], heads),
            "top_negative": _best(scores["negative"], errors["negative"], heads),
            "standard_errors": {kind: None if e is None else e.tolist() for kind, e in errors.items()},
            "warnings": warnings,
        }


def _probability_and_correct(example: Example, logits: Tensor) -> Tensor:
    """The probability of the answer's first token, and whether the answer is correct: [rows, 2].

    Args:
        example: gives the answer's tokens.
        logits: at the last prompt token [rows, vocabulary]. As in the paper, the answer counts as correct
            when the likeliest token is one of the answer's tokens.
    """
    if not example.target_ids:  # it was only run together with other questions about its image
        return torch.zeros(len(logits), 2)
    ids = torch.tensor(example.target_ids, device=logits.device)
    correct = torch.isin(logits.argmax(-1), ids)
    return torch.stack([readouts.answer_probability(logits, ids[:1]), correct.float()], dim=1)


def _squares(kind: str) -> str:
    return f"{kind}_squares"


def _counts(totals: Totals) -> dict[str, int]:
    """The number of examples that each kind of score is averaged over."""
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
