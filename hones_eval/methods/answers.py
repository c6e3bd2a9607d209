"""One model's answers with nothing changed and under several steerings, on the same examples."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hones_eval import readouts
from hones_eval.anatomy import Anatomy
from hones_eval.errors import HonesError
from hones_eval.examples import Example, TaskExamples
from hones_eval.measure import Measurement, Totals
from hones_eval.steer import attach_to
from hones_eval.steering import Steering

BASELINE = "baseline"


class Answer(NamedTuple):
    """One answer: its result by the task, and what the first step said of the gold answer.

    `probability` is that of the target's first token; `correct` whether the likeliest token is one of the
    target's (V-SEAM 3).
    """

    result: dict[str, Any]
    probability: float
    correct: bool


class Answered(NamedTuple):
    """One example's pictures, and its answers by the name of the steering."""

    pictures: tuple[str, ...]
    answers: dict[str, Answer]


class AnswersUnder:
    """One pass: every example is answered by the model's own `generate` under every steering in turn."""

    def __init__(self, anatomy: Anatomy, examples: TaskExamples, steerings: Mapping[str, Steering]) -> None:
        """Answer with nothing changed, called `baseline`, and under each of `steerings`.

        Raises: MisfitError when a steering was made for a model of another shape.
        """
        if BASELINE in steerings:
            raise HonesError(f"a steering cannot be called {BASELINE!r}: that is the model without one")
        for steering in steerings.values():
            steering.check_fits(anatomy.shape, type(anatomy.model).__name__)
        self.anatomy, self.examples = anatomy, examples
        self.steerings: dict[str, Steering | None] = {BASELINE: None, **steerings}

    def zeros(self) -> dict[str, Tensor]:
        """The count of examples."""
        return {"examples": torch.zeros((), dtype=torch.float64)}

    def measure(self, example: Example) -> Measurement:
        """Answer and score one example; its record is an `Answered`."""
        results: dict[tuple[int, ...], dict[str, Any]] = {}
        answers = {name: self._answer(example, name, results) for name in self.steerings}
        record = Answered(tuple(example.image_hashes), answers)
        return Measurement({"examples": torch.ones((), dtype=torch.float64)}, record)

    def _answer(self, example: Example, name: str, results: dict[tuple[int, ...], dict[str, Any]]) -> Answer:
        tokens, first = self._generate(example, self.steerings[name])
        if not bool(torch.isfinite(first).all()):
            raise HonesError(
                f"{example.task}, doc_id {example.doc_id}: the logits are not finite under {name}"
            )
        key = tuple(tokens)
        if key not in results:
            results[key] = self.examples.score(example.index, self.examples.decode(example.index, tokens))
        target = torch.tensor(example.target_ids[:1], device=first.device)
        probability = float(readouts.answer_probability(first[None], target))
        return Answer(results[key], probability, int(first.argmax()) in example.target_ids)

    @torch.no_grad()
    def _generate(self, example: Example, steering: Steering | None) -> tuple[list[int], Tensor]:
        """New tokens, and the logits [vocabulary] that the first of them was chosen from."""
        model: Any = self.anatomy.model  # every served model mixes in GenerationMixin
        attached = None if steering is None else attach_to(self.anatomy, steering)
        try:
            output = model.generate(
                **example.inputs, **example.settings, return_dict_in_generate=True, output_logits=True
            )
            if attached is not None:
                attached.check_ran()
        finally:
            if attached is not None:
                attached.detach()
        # Counted from the end: some families repeat the prompt in front, some do not.
        return output.sequences[0, -len(output.logits) :].tolist(), output.logits[0][0]


def answered(totals: Totals) -> list[Answered]:
    """The records of a pass, in the order of the examples."""
    return [totals.records[index] for index in sorted(totals.records)]
