"""Answers of one model to the same examples, unsteered and under several steerings."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.changes import row_edits
from hones_eval.core.hooks import Edit, Site
from hones_eval.core.scope import Scope, ScopeTracker, editing_in
from hones_eval.core.steering import Steering
from hones_eval.engine.decoding import Decoder, cut_at_end, end_tokens, repeat_example
from hones_eval.engine.passes import refuse_not_finite
from hones_eval.engine.prompts import own_tokens
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.kind import RowAnswer
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.runs.measure import Measurement, Totals

BASELINE = "baseline"


class Answer(NamedTuple):
    """One answer: its result by the task, and how the first step rated the gold answer.

    `probability` is that of the target's first token; `correct` says whether the likeliest token is one of
    the target's (V-SEAM 3).
    """

    result: dict[str, Any]
    probability: float
    correct: bool


class Answered(NamedTuple):
    """One example's images, as hashes, and its answers by the name of the steering."""

    image_hashes: tuple[str, ...]
    answers: dict[str, Answer]


class AnswersUnder:
    """One pass: the model's own `generate` answers every example, unsteered and under every steering.

    The steerings are the rows of a batch, as many as the replayer runs at once. In row `i` heads and neurons
    are multiplied by the scales of steering `i`.
    """

    def __init__(
        self,
        replayer: Replayer,
        examples: TaskExamples,
        steerings: Mapping[str, Steering],
        scope: str | Scope | None = None,
    ) -> None:
        """Answer unsteered, under the name `baseline`, and under each of `steerings`.

        `scope` are the tokens that the steerings act on, by default those of the replayer.

        Raises: MisfitError when a steering was made for a model of another shape.
        """
        self.anatomy, self.limit = replayer.anatomy, replayer.limit
        self.decoder = Decoder(replayer)
        if BASELINE in steerings:
            raise HonesError(f"a steering cannot be named {BASELINE!r}: that is the unsteered model")
        for steering in steerings.values():
            steering.check_fits(self.anatomy.shape, type(self.anatomy.model).__name__)
        self.examples = examples
        self.steerings = dict(steerings)
        self.scope = replayer.scope if scope is None else Scope.parse(scope)
        self._tracker = None if self.scope.is_all else ScopeTracker(self.anatomy, self.scope)
        self._edits: dict[tuple[str, ...], list[tuple[Site, Edit]]] = {}

    def zeros(self) -> dict[str, Tensor]:
        """The count of examples."""
        return {"examples": torch.zeros((), dtype=torch.float64)}

    def measure(self, example: Example) -> Measurement:
        """Answer and score one example; its record is an `Answered`."""
        if self._tracker is not None and "image" in self.scope.names and not example.image_hashes:
            raise HonesError(f"{example.where}: it shows no image, so scope={self.scope} does not apply")
        kind, names = self.examples.kind, list(self.steerings)
        answers = dict(zip([BASELINE], kind.under_steerings(self, example, []), strict=True))
        length = own_tokens(example.inputs).shape[1]
        if self._ends_by_token(example):
            for chunk, rows in self.limit.chunks(
                names, length, lambda chunk: (chunk, kind.under_steerings(self, example, chunk))
            ):
                answers |= zip(chunk, rows, strict=True)
        else:
            answers |= {name: kind.under_steerings(self, example, [name])[0] for name in names}
        results: dict[str, dict[str, Any]] = {}
        scored = {name: self._scored(example, name, answer, results) for name, answer in answers.items()}
        record = Answered(tuple(example.image_hashes), scored)
        return Measurement({"examples": torch.ones((), dtype=torch.float64)}, record)

    def _scored(
        self, example: Example, name: str, answer: RowAnswer, results: dict[str, dict[str, Any]]
    ) -> Answer:
        """Score one row's answer; `results` are those of the same example's answers so far, by text."""
        if not bool(torch.isfinite(answer.first).all()):
            with self._steered(() if name == BASELINE else (name,)):
                refuse_not_finite(self.anatomy, example.inputs, f"{example.where}, under {name}")
        if answer.text not in results:
            results[answer.text] = self.examples.score(example.index, answer.text)
        target = torch.tensor(example.target_ids[:1], device=answer.first.device)
        probability = float(readouts.answer_probability(answer.first[None], target))
        correct = int(answer.first.argmax()) in example.target_ids
        return Answer(results[answer.text], probability, correct)

    @torch.no_grad()
    def generate(self, example: Example, names: Sequence[str], **settings: Any) -> Any:
        """The output of `generate` with logits; one row per named steering, one unsteered row for none."""
        model: Any = self.anatomy.model  # every served model mixes in GenerationMixin
        with self._steered(tuple(names)):
            return model.generate(
                **repeat_example(example.inputs, max(1, len(names))),
                **(example.settings | settings),
                return_dict_in_generate=True,
                output_logits=True,
            )

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any], names: Sequence[str], read: int) -> Tensor:
        """Logits [rows, read, vocabulary] at the last positions, each row under its own steering."""
        rows = repeat_example(inputs, max(1, len(names)))
        with self._steered(tuple(names), answer=read - 1):
            logits: Tensor = self.anatomy.model(**rows, use_cache=False).logits
        return logits[:, -read:]

    def answers(self, example: Example, output: Any) -> list[str]:
        """The texts that the wrapper makes of the new tokens of every row of a `generate`."""
        # Counted from the end, as only some families return the prompt before the new tokens.
        new = output.sequences[:, -len(output.logits) :].tolist()
        ends = end_tokens(self.anatomy.model, example.settings)
        return [self.examples.decode(example.index, cut_at_end(tokens, ends)) for tokens in new]

    @contextmanager
    def _steered(self, names: tuple[str, ...], answer: int = 0) -> Iterator[None]:
        """Steer row `i` by the steering `names[i]`; the last `answer` tokens of a pass are the answer's."""
        with editing_in(self._tracker, self._row_edits(names), answer):
            yield

    def _row_edits(self, names: tuple[str, ...]) -> list[tuple[Site, Edit]]:
        """An edit for each linear layer whose input is scaled by any of the steerings."""
        if names not in self._edits:
            self._edits[names] = row_edits(self.anatomy, [self.steerings[name] for name in names])
        return self._edits[names]

    def _ends_by_token(self, example: Example) -> bool:
        """Whether each row ends by its own tokens; stop strings and other criteria see the whole batch."""
        criteria = ("stopping_criteria", "stop_strings")
        return not any(example.settings.get(name) or self._config(name) for name in criteria)

    def _config(self, name: str) -> Any:
        return getattr(self.anatomy.model.generation_config, name, None)


def answered(totals: Totals) -> list[Answered]:
    """The records of a pass, in the order of the examples; also of a pass that was resumed."""
    records = [totals.records[index] for index in sorted(totals.records)]
    return [
        Answered(tuple(image_hashes), {name: Answer(*values) for name, values in answers.items()})
        for image_hashes, answers in records
    ]
