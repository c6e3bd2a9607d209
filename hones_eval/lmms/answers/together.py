"""Generated answers to several questions about one image, checked together under every edit.

Questions about one image begin alike. Each question's prompt is followed by the model's own answer, so one
shared prefix (see `hones_eval.engine.prefixes`) serves the checks of all of them: an edit passes the image
once per group instead of once per question. Gold answers that leave the model's answer are further endings of
the same prefix. Only the answers that an edit changes are replayed question by question, and decoded on as
usual.

Sharing pays where questions have most of their tokens in common, as an image has many, and where few answers
change. So the first question of a group is measured alone, and the others are shared if no more than a third
of its answers changed. This depends on the group only: a resumed run, or one with several processes, decides
alike.

Memory: the logits of a group's endings are held for as many edits as run at once, and the unedited keys and
values of the prefix once per ending. Groups are cut so that neither takes more than `MEMORY`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.branches import covered
from hones_eval.engine.decoding import GreedyExample, first_difference
from hones_eval.engine.passes import SiteEdit, check_finite
from hones_eval.engine.prefixes import shared_length
from hones_eval.engine.prompts import own_tokens
from hones_eval.lmms.answers.kind import EditedAnswers, EditRun
from hones_eval.lmms.example import Example

MEMORY = 256 * 2**20
"""Bytes for the logits of one group under the edits that run at once, and for its keys and values."""
FEWEST = 4
"""The smallest group that is worth sharing, as its first question is measured alone."""
SAVING = 0.6
"""The largest share of a group's tokens that may be left to run: a shared prefix takes more layer calls."""
FEW = 1 / 3
"""The share of changed answers up to which questions are checked together."""

Alone = Callable[[EditRun, Example, Sequence[int]], EditedAnswers]


class _Ending(NamedTuple):
    """A prompt with tokens after it, of which the last `read` positions are read."""

    inputs: Mapping[str, Any]
    read: int
    holds_answer: bool
    """Whether the tokens are the model's answer."""
    holds_gold: bool
    """Whether every token of the gold answer is read from it."""


class _Question(NamedTuple):
    """A question of a group, with its decoded answer."""

    example: Example
    decoded: GreedyExample
    endings: list[_Ending]


class Together:
    """Answers examples in order; the first question of a group also answers the others."""

    def __init__(self, alone: Alone) -> None:
        """`alone` answers one example by itself."""
        self._alone = alone
        self._ahead: dict[int, tuple[list[int], EditedAnswers]] = {}
        self._apart: int | None = None  # the first question of a group that is not shared

    def of(self, run: EditRun, example: Example, numbers: Sequence[int]) -> EditedAnswers:
        """Answer one example, unedited and under the edits with these numbers."""
        known, answers = self._ahead.pop(example.index, ([], None))
        if answers is None or known != list(numbers):
            self._ahead = {
                index: (list(numbers), found) for index, found in self._measured(run, example, numbers)
            }
            _, answers = self._ahead.pop(example.index)
        return answers

    def _measured(
        self, run: EditRun, example: Example, numbers: Sequence[int]
    ) -> Iterator[tuple[int, EditedAnswers]]:
        """The answers to the questions of an example's group, or to the example alone."""
        group = run.examples.with_same_images(example.index)
        start = group[0].index
        if run.sharing.inexact or self._apart == start or not worth_sharing(group, run.decoder.anatomy):
            yield example.index, self._alone(run, example, numbers)
            return
        first = self._alone(run, group[0], numbers)
        yield start, first
        if not first.decoded_in_full and first.differing <= FEW * len(numbers):
            yield from self._shared(run, group[1:], numbers)
            return
        self._apart = start
        if example.index != start:
            yield example.index, self._alone(run, example, numbers)

    def _shared(
        self, run: EditRun, group: Sequence[Example], numbers: Sequence[int]
    ) -> Iterator[tuple[int, EditedAnswers]]:
        questions: list[_Question] = []
        for example in group:
            question = _question(run, example)
            if question is None:  # one pass does not show its answer
                yield example.index, self._alone(run, example, numbers)
            else:
                questions.append(question)
        while questions:
            size = _size(run, questions)
            yield from self._of_prefix(run, questions[:size], numbers)
            questions = questions[size:]

    def _of_prefix(
        self, run: EditRun, questions: Sequence[_Question], numbers: Sequence[int]
    ) -> Iterator[tuple[int, EditedAnswers]]:
        """The answers to questions that fit into memory together."""
        endings = [ending for question in questions for ending in question.endings]
        reads = [ending.read for ending in endings]
        inputs = [ending.inputs for ending in endings]
        if run.sharing.inexact or not shared_length(inputs, run.decoder.anatomy, reads):
            for question in questions:
                yield question.example.index, self._alone(run, question.example, numbers)
            return
        owners = [question for question in questions for _ in question.endings]
        found = {question.example.index: _Found() for question in questions}
        shared = 0
        for part in run.sharing.last_tokens(inputs, [run.edits[number] for number in numbers], reads):
            shared = part.shared
            for column, member in enumerate(part.members):
                logits = part.logits[:, column, -reads[member] :]
                question = owners[member]
                found[question.example.index].read(question, endings[member], part.edits, logits)
        for question in questions:
            yield question.example.index, _answers(run, question, found[question.example.index], shared)


def worth_sharing(group: Sequence[Example], anatomy: Anatomy) -> bool:
    """Whether prompts about one image share enough tokens."""
    prompts = [example.inputs for example in group]
    if len(group) < FEWEST or anatomy.reads_states or not all("input_ids" in inputs for inputs in prompts):
        return False
    lengths = [own_tokens(inputs).shape[1] for inputs in prompts]
    if not (prefix := shared_length(prompts, anatomy)):
        return False
    left = prefix + len(group) * (max(lengths) - prefix)
    return left <= SAVING * sum(lengths)


def _question(run: EditRun, example: Example) -> _Question | None:
    """A decoded question and its endings; None where one pass does not show its answer."""
    decoded = run.decoder.greedy(example.inputs, example.settings)
    if decoded.passes is None:
        return None
    decoded.forget()
    tokens, target = decoded.tokens, example.target_ids
    holds_gold = run.log_probability and covered(tokens, target) == len(target)
    endings = [_Ending(run.decoder.append(example.inputs, tokens[:-1]), len(tokens), True, holds_gold)]
    if run.log_probability and not holds_gold:
        inputs = run.decoder.append(example.inputs, target[:-1])
        endings.append(_Ending(inputs, len(target), False, True))
    return _Question(example, decoded, endings)


def _size(run: EditRun, questions: Sequence[_Question]) -> int:
    """The number of questions, from the first on, that fit into memory together; at least two."""
    anatomy, shape = run.decoder.anatomy, run.decoder.anatomy.shape
    weight = anatomy.unembed.weight
    length = max(own_tokens(question.endings[0].inputs).shape[1] for question in questions)
    rows = min(run.replayer.limit.rows(length), len(run.edits))
    kept = 2 * shape.layers * shape.heads * shape.head_width * length
    logits = rows * max(ending.read for question in questions for ending in question.endings) * len(weight)
    return max(2, MEMORY // (2 * max(kept, logits) * weight.element_size()))


class _Found:
    """What one question's endings show: the edits that change its answer, and its log-probabilities."""

    def __init__(self) -> None:
        self.changing: list[SiteEdit] = []
        self.values: dict[SiteEdit | None, float] = {}
        self.finite = True

    def read(
        self, question: _Question, ending: "_Ending", edits: Sequence[SiteEdit | None], logits: Tensor
    ) -> None:
        """Read logits [edits, read, vocabulary] of one ending; an edit of None is the unedited model."""
        self.finite &= bool(torch.isfinite(logits).all())
        if ending.holds_answer:
            for edit, tokens in zip(edits, question.decoded.choices(logits), strict=True):
                if edit is not None and first_difference(tokens, question.decoded.tokens) is not None:
                    self.changing.append(edit)
        if ending.holds_gold:
            ids = torch.tensor(question.example.target_ids, device=logits.device)
            values = readouts.sequence_log_probability(logits[:, : len(ids)], ids).tolist()
            self.values |= zip(edits, values, strict=True)


def _answers(run: EditRun, question: _Question, found: _Found, shared: int) -> EditedAnswers:
    """One question's answers; those that edits change are decoded, by a replay of these edits alone."""
    example, decoded = question.example, question.decoded
    changed: dict[int, str] = {}
    if not found.finite or found.changing:
        decoded.recall()
        assert decoded.passes is not None
        check_finite(decoded.passes, example.where)
        for edit, tokens in decoded.answers(found.changing):
            if tokens != decoded.tokens:
                changed[run.numbers[edit]] = run.examples.decode(example.index, tokens)
        decoded.forget()
    base = found.values.pop(None, 0.0)
    drops = torch.zeros(len(run.edits), dtype=torch.float64)
    for measured, value in found.values.items():
        assert measured is not None
        drops[run.numbers[measured]] = base - value
    return EditedAnswers(
        base=run.examples.decode(example.index, decoded.tokens),
        changed=changed,
        log_probability=base,
        drops=drops,
        differing=len(changed),
        shared=shared > 0,
    )
