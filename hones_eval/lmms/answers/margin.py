"""Margin answers: how much a model prefers one word to another at the next token.

A task asks for them with `margin: [Yes, No]` among its `generation_kwargs`. Its answers are then the numbers
`logit(Yes) - logit(No)` as text, in a ranking as well as from a steered wrapper.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hones_eval.engine.prompts import own_tokens
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.answers.kind import NextTokenReader, RecordedTask, Recorder, Recording
from hones_eval.lmms.answers.next_token import NextTokenKind, as_text
from hones_eval.lmms.answers.tokens import next_token

SETTING = "margin"
PROOF_EXAMPLES = 64  # a score of whole queries needs at least one whole query


class Margin(NamedTuple):
    """The tokens with which two words begin after one prompt."""

    yes: int
    no: int

    def of(self, logits: Tensor) -> Tensor:
        """The margin [...] at a token with logits [..., vocabulary], in float32."""
        return logits[..., self.yes].float() - logits[..., self.no].float()


def words_of(settings: Mapping[str, Any], task: str) -> tuple[str, str] | None:
    """The two words of a task that asks for a margin, from its generation settings; None for other tasks.

    Raises: TaskError when there are not two different words.
    """
    words = settings.get(SETTING)
    if words is None:
        return None
    two = isinstance(words, list | tuple) and len(words) == 2 and all(isinstance(word, str) for word in words)
    if not two or not all(word.strip() for word in words) or words[0] == words[1]:
        raise TaskError(
            f"{task}: margin={words!r} in its generation_kwargs should be two different words, as in "
            "margin: [Yes, No]"
        )
    return words[0], words[1]


def margin_after(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], words: tuple[str, str]) -> Margin:
    """The tokens with which the two words begin when a model answers this prompt.

    Raises: HonesError when both begin with the same token, so that every margin would be 0.
    """
    first, second = (next_token(tokenizer, prompt, word) for word in words)
    if first == second:
        token = tokenizer.convert_ids_to_tokens(first)
        raise HonesError(
            f"{type(tokenizer).__name__} begins both {words[0]!r} and {words[1]!r} with the token {token!r} "
            f"({first}) after this prompt, so their margin is always 0: this task needs a tokenizer "
            "that has the words, or other words as margin among its generation_kwargs"
        )
    return Margin(first, second)


def as_answer(text: str, words: tuple[str, str]) -> str:
    """The margin that stands for an answer in words: 1 for the first, -1 for the second, 0 for any other."""
    return as_text({words[0]: 1.0, words[1]: -1.0}.get(text, 0.0))


class MarginRecorder(Recorder):
    """Records prompts with the tokens of the two words after each."""

    proof_examples = PROOF_EXAMPLES
    shares_prompts = True
    has_distractors = True

    def __init__(self, task: RecordedTask, words: tuple[str, str]) -> None:
        """Record `task`, whose answers are margins of the first of `words` over the second."""
        self.task = task
        self.words = words

    def record(self, index: int, gold: str) -> Recording:
        """The prompt; the target is the token of the word that the gold answer is.

        Raises: TaskError naming task and document when the words' tokens are unknown or the same.
        """
        request = self.task.requests[index][0]
        inputs, settings = self.task.calls.record(request)
        try:
            margin = margin_after(self.task.tokenizer, own_tokens(inputs)[0].tolist(), self.words)
        except HonesError as error:
            raise TaskError(f"{request.task_name}, doc_id {request.doc_id}: {error}") from error
        ids = [margin.yes if gold == self.words[0] else margin.no]
        return Recording(inputs, settings, ids, margin, is_distractor=ids != [margin.yes])

    def as_answer(self, doc: Mapping[str, Any], text: str) -> str:
        """The margin that stands for an answer in words."""
        return as_answer(text, self.words)

    def wrong_answer(self, doc: Mapping[str, Any]) -> str:
        """A margin of 0."""
        return as_text(0.0)

    def report(self) -> dict[str, Any]:
        """The two words."""
        return {"margin": " - ".join(self.words)}


class MarginReader:
    """Reads the margin from the logits of one `generate` call of a steered wrapper."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: tuple[str, str]) -> None:
        """`text` is None until a call was read."""
        self.text: str | None = None
        self._tokenizer, self._words = tokenizer, words

    def read(self, prompt: Tensor, logits: Tensor) -> None:
        """Read the margin from the logits [1, vocabulary] after a prompt [1, tokens].

        Raises: HonesError when there is more than one row, or the margin is not finite.
        """
        if len(prompt) != 1 or len(logits) != 1:
            raise HonesError(f"margins are read from one prompt at a time, not from {len(prompt)}")
        margin = margin_after(self._tokenizer, prompt[0].tolist(), self._words)
        value = float(margin.of(logits[0]))
        if not math.isfinite(value):
            raise HonesError(f"the margin between {' and '.join(self._words)} is {value}")
        self.text = as_text(value)


class MarginAnswers(NextTokenKind):
    """Answers that are margins between two words."""

    name = "margin"
    settings = frozenset({SETTING})

    def recorder(self, task: RecordedTask) -> Recorder | None:
        """A recorder for tasks that name two words."""
        words = words_of(task.settings, str(task.requests[0][0].task_name))
        return None if words is None else MarginRecorder(task, words)

    def differs(self, base: float, edited: Tensor) -> Tensor:
        """Whether the other word is preferred."""
        return (edited > 0) != (base > 0)

    def reader(
        self, settings: Mapping[str, Any], task: str, tokenizer: PreTrainedTokenizerBase
    ) -> NextTokenReader | None:
        """A reader of the margin between the two words that the settings name."""
        words = words_of(settings, task)
        return None if words is None else MarginReader(tokenizer, words)
