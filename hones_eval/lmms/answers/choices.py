"""Choice answers: a model's log-likelihood of each of several continuations of a question.

Tasks with `output_type: multiple_choice` ask lmms-eval's models for them, one forward pass per choice, and
take the choice with the smallest value. An answer here is all values of a question as one text.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, NoReturn

import torch
from lmms_eval.api.instance import Instance
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hones_eval.core import readouts
from hones_eval.core.readouts import sequence_log_probability
from hones_eval.engine.passes import check_finite
from hones_eval.engine.prefixes import LastTokens
from hones_eval.engine.prompts import shortened
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.answers.kind import (
    AnswerKind,
    Calls,
    EditedAnswers,
    EditRun,
    RecordedTask,
    Recorder,
    Recording,
    RowAnswer,
    SteeringRun,
)
from hones_eval.lmms.call_capture import Call
from hones_eval.lmms.example import Example
from hones_eval.lmms.targets import choices_of, native_gold

REQUEST = "loglikelihood"
"""lmms-eval's type of the requests."""

VALUES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean loss": lambda log_p, tokens: -log_p / tokens,
    "summed loss": lambda log_p, tokens: -log_p,
    "mean log-likelihood": lambda log_p, tokens: log_p / tokens,
    "summed log-likelihood": lambda log_p, tokens: log_p,
}
"""What wrappers compute from a continuation's log-probability [rows] and its number of tokens."""


class Reading(NamedTuple):
    """How a wrapper reads logits: which of `VALUES` it computes, and which choices it calls greedy.

    A choice is greedy when each of its tokens is the likeliest: where the token is predicted (0), or one
    position later (1), as in `llava_hf`. None where no choice is ever called greedy.
    """

    value: str
    greedy_at: int | None


class Choice(NamedTuple):
    """One choice after its question, as the wrapper passes both to the model."""

    inputs: dict[str, Any]
    """The arguments of `forward`, a batch of one: the prompt and the choice."""
    scored: int
    """How many tokens at the end belong to the choice: those that the wrapper gives labels."""

    @property
    def ids(self) -> list[int]:
        """The tokens that are scored."""
        ids: list[int] = self.inputs["input_ids"][0, -self.scored :].tolist()
        return ids

    def read(self, logits: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        """The choice's value [rows], in float32, and whether it is greedy [rows].

        `logits` [rows, scored + 1, vocabulary] are those of the last positions.
        """
        ids = torch.tensor(self.ids, device=logits.device)
        value = VALUES[reading.value](sequence_log_probability(logits[:, :-1], ids), self.scored)
        if reading.greedy_at is None:
            return value, torch.zeros(len(logits), dtype=torch.bool)
        likeliest = logits.argmax(-1)[:, reading.greedy_at :][:, : self.scored]
        return value, (likeliest == ids).all(-1)


class Choices(NamedTuple):
    """The choices of one question; the details of an example of this kind."""

    offered: list[Choice]
    gold: int
    """The position of the right choice."""
    start: int
    """Where, among its scored tokens, the right choice's own begin: a template's may come first."""
    reading: Reading


def as_text(values: Sequence[float], greedy: Sequence[bool]) -> str:
    """A question's values as the text of an answer, without rounding."""
    return json.dumps([[float(value), bool(flag)] for value, flag in zip(values, greedy, strict=True)])


def from_text(text: str) -> list[tuple[float, bool]]:
    """The inverse of `as_text`."""
    return [(float(value), bool(greedy)) for value, greedy in json.loads(text)]


def preferring(position: int, count: int) -> str:
    """The answer, as text, that prefers one of `count` choices."""
    return as_text([float(i != position) for i in range(count)], [i == position for i in range(count)])


def own_tokens(tokenizer: PreTrainedTokenizerBase, scored: Sequence[int], choice: str) -> tuple[int, int]:
    """Where a choice's own tokens begin and end among those that are scored with it.

    The others belong to a chat template: its end of turn after the choice, or a part of its start of turn
    before it. Where the choice cannot be found in the tokens, all up to the first special one are taken.
    """

    def text(start: int, end: int) -> str:
        return _plain(tokenizer.decode(list(scored[start:end]), clean_up_tokenization_spaces=False))

    wanted, count = _plain(choice), len(scored)
    starts = [start for start in range(count) if text(start, count).startswith(wanted)]
    if starts:
        ends = (end for end in range(starts[-1] + 1, count + 1) if text(starts[-1], end) == wanted)
        if (end := next(ends, None)) is not None:
            return starts[-1], end
    special = set(tokenizer.all_special_ids)
    return 0, next((end for end, token in enumerate(scored) if end and token in special), count)


def _plain(text: Any) -> str:
    return " ".join(str(text).split()).casefold()


def recorded_choice(calls: Calls, request: Instance) -> Choice:
    """What the wrapper passes to `forward` for one choice; its labels tell which tokens are the choice.

    Raises: TaskError when there are no labels, or they are not at the end of one row.
    """
    where = f"{request.task_name}, doc_id {request.doc_id}"
    wrapper = calls.wrapper_name
    arguments = calls.record_forward(request)
    labels = arguments.pop("labels", None)
    if not isinstance(labels, Tensor):
        raise TaskError(
            f"{where}: {wrapper} passes no labels to its model, so the choice's tokens cannot be told from "
            "the question's"
        )
    given = {key: value for key, value in arguments.items() if value is not None}
    inputs = Call.of(calls.model, given).inputs
    tokens = inputs["input_ids"].shape
    scored = int((labels != -100).sum())
    if tokens[0] != 1 or not 0 < scored < tokens[1] or bool((labels[0, -scored:] == -100).any()):
        raise TaskError(
            f"{where}: {wrapper} gives labels to {scored} tokens of input_ids {list(tokens)}; "
            "expected one question followed by a choice"
        )
    return Choice(inputs, scored)


class ChoiceRecorder(Recorder):
    """Records the questions of one multiple-choice task, as one lmms-eval model receives them."""

    shares_prompts = True

    def __init__(self, task: RecordedTask) -> None:
        """Record `task`, after finding how the wrapper reads a choice's value from logits."""
        self.task = task
        self.reading = self._find_reading()

    def texts(self, doc: Mapping[str, Any]) -> list[str]:
        """The choices of a document."""
        return choices_of(self.task.task, doc)

    def position(self, doc: Mapping[str, Any], text: str) -> int:
        """The position of a text among a document's choices. Raises: TaskError when it is not there."""
        texts = self.texts(doc)
        if text not in texts:
            raise TaskError(f"the answer {text!r} is not among the choices {', '.join(map(repr, texts))}")
        return texts.index(text)

    def as_answer(self, doc: Mapping[str, Any], text: str) -> str:
        """The answer that prefers a choice."""
        return preferring(self.position(doc, text), len(self.texts(doc)))

    def wrong_answer(self, doc: Mapping[str, Any]) -> str:
        """The answer that prefers a choice which is not correct: any answer here is one of the choices."""
        texts = self.texts(doc)
        right = native_gold(self.task.task, doc).references
        wrong = next((position for position, text in enumerate(texts) if text not in right), 0)
        return preferring(wrong, len(texts))

    def record(self, index: int, gold: str) -> Recording:
        """The choices with the question before each, the prompt alone, and the tokens of the right choice.

        The prompt ends where the right choice's own tokens begin.

        Raises: TaskError when the gold answer is not among the choices.
        """
        request = self.task.requests[index][0]
        where = f"{request.task_name}, doc_id {request.doc_id}"
        try:
            position = self.position(self.task.document(request.doc_id), gold)
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from None
        offered = [recorded_choice(self.task.calls, choice) for choice in self.task.requests[index]]
        right = offered[position]
        start, end = own_tokens(self.task.tokenizer, right.ids, gold)
        length = int(right.inputs["input_ids"].shape[1]) - right.scored + start
        ids = right.ids[start:end]
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": len(ids) + 1}
        details = Choices(offered, position, start, self.reading)
        return Recording(shortened(right.inputs, length), settings, ids, details)

    def _find_reading(self) -> Reading:
        """How the wrapper reads logits, found on the longest choice, of which a sum is not the mean.

        Raises: TaskError when it is not one of `VALUES`, as the effect of edits on it is then unknown.
        """
        calls = self.task.calls
        request = max(chain.from_iterable(self.task.requests), key=lambda choice: len(str(choice.args[1])))
        choice = recorded_choice(calls, request)
        value = calls.log_likelihood(request)
        greedy_at = next((late for late in (0, 1) if calls.finds_greedy(request, late)), None)
        with torch.no_grad():
            logits = calls.model(**choice.inputs, use_cache=False).logits[:, -choice.scored - 1 :]
        tolerance = torch.finfo(logits.dtype).eps ** 0.5
        for reading in (Reading(name, greedy_at) for name in VALUES):
            found = float(choice.read(logits, reading)[0])
            if math.isclose(found, value, rel_tol=tolerance, abs_tol=tolerance):
                return reading
        raise TaskError(
            f"{request.task_name}, doc_id {request.doc_id}: {calls.wrapper_name} scores a choice as "
            f"{value:g}, which is neither the loss nor the log-likelihood of the tokens that it gives labels"
        )


class ChoiceAnswers(AnswerKind):
    """Answers that are a model's values of several choices; the smallest or largest is the preferred one."""

    name = "choices"
    replaces_decoding = "another choice is preferred"

    def recorder(self, task: RecordedTask) -> Recorder | None:
        """A recorder for tasks whose requests are log-likelihoods."""
        return ChoiceRecorder(task) if task.requests[0][0].request_type == REQUEST else None

    def responses(self, text: str) -> list[Any]:
        """One pair per choice: its value, and whether it is greedy."""
        return list(from_text(text))

    def under_edits(self, run: EditRun, example: Example, numbers: Sequence[int]) -> EditedAnswers:
        """The value of every choice, as the wrapper computes it, and the right one's log-probability."""
        asked: Choices = example.details
        measured, edited = torch.tensor(numbers), 1 + torch.tensor(numbers)
        size = (1 + len(run.edits), len(asked.offered))  # row 0 is unedited
        values, greedy = torch.full(size, torch.nan).double(), torch.zeros(size, dtype=torch.bool)
        log_p, ids = torch.zeros(size[0]).double(), torch.tensor(example.target_ids)
        shared = 0
        for part, member, logits in self._logits(run, asked, numbers):
            rows = [0 if edit is None else 1 + run.numbers[edit] for edit in part.edits]
            found, is_greedy = asked.offered[member].read(logits, asked.reading)
            values[rows, member], greedy[rows, member] = found.double().cpu(), is_greedy.cpu()
            if member == asked.gold:
                own = logits[:, asked.start : asked.start + len(ids)]
                log_p[rows] = readouts.sequence_log_probability(own, ids.to(own.device)).double().cpu()
            shared = part.shared
        if not bool(values[0].isfinite().all() and values[edited].isfinite().all()):
            self._refuse(run, example)
        texts = [as_text(*row) for row in zip(values.tolist(), greedy.tolist(), strict=True)]
        drops = torch.zeros(len(run.edits), dtype=torch.float64)
        drops[measured] = log_p[0] - log_p[edited]
        return EditedAnswers(
            base=texts[0],
            changed={number: texts[1 + number] for number in numbers},
            log_probability=float(log_p[0]),
            drops=drops,
            differing=int((values[edited].argmin(1) != values[0].argmin()).sum()),
            shared=shared > 0,
        )

    def _logits(
        self, run: EditRun, asked: Choices, numbers: Sequence[int]
    ) -> Iterator[tuple[LastTokens, int, Tensor]]:
        """Logits [rows, scored + 1, vocabulary] of every choice; the choices share their question."""
        edits = [run.edits[number] for number in numbers]
        reads = [choice.scored + 1 for choice in asked.offered]
        for part in run.sharing.last_tokens([choice.inputs for choice in asked.offered], edits, reads):
            for column, member in enumerate(part.members):
                yield part, member, part.logits[:, column, -reads[member] :]

    def _refuse(self, run: EditRun, example: Example) -> NoReturn:
        for choice in example.details.offered:
            check_finite(run.replayer.record(choice.inputs, choice.scored + 1), example.where)
        raise HonesError(f"{example.where}: the logits under an edit are not finite")

    def under_steerings(self, run: SteeringRun, example: Example, names: Sequence[str]) -> list[RowAnswer]:
        """The value of every choice, and the logits where the right one begins."""
        asked: Choices = example.details
        read, first = [], torch.empty(0)
        for position, choice in enumerate(asked.offered):
            logits = run.logits(choice.inputs, names, choice.scored + 1)
            read.append(choice.read(logits, asked.reading))
            if position == asked.gold:
                first = logits[:, asked.start]
        values, greedy = (torch.stack(parts, dim=1).tolist() for parts in zip(*read, strict=True))
        texts = [as_text(*row) for row in zip(values, greedy, strict=True)]
        return [RowAnswer(text, logits) for text, logits in zip(texts, first, strict=True)]
