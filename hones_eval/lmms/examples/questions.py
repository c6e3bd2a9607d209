"""Tasks of choices: what the model is asked, which choice is right, and how the wrapper scores one."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import Task
from transformers import PreTrainedTokenizerBase

from hones_eval.engine import prompts
from hones_eval.errors import TaskError
from hones_eval.lmms.answers import choices
from hones_eval.lmms.answers.choices import Choices, Reading
from hones_eval.lmms.examples.playback import Playback


class Questions:
    """The questions of one multiple-choice task, as one lmms-eval model is asked them."""

    def __init__(
        self,
        task: Task,
        playback: Playback,
        tokenizer: PreTrainedTokenizerBase,
        offered: Sequence[Sequence[Instance]],
    ) -> None:
        """`offered` are every document's requests, one a choice."""
        self.task, self.playback, self.tokenizer, self.offered = task, playback, tokenizer, offered
        self.reading = self._find_reading()

    def texts(self, doc: Mapping[str, Any]) -> list[str]:
        """The choices of a document."""
        return [str(one).strip() for one in self.task.doc_to_choice(dict(doc))]

    def place(self, doc: Mapping[str, Any], text: str) -> int:
        """The place of a text among a document's choices. Raises: TaskError when it is none of them."""
        texts = self.texts(doc)
        if text not in texts:
            raise TaskError(f"the answer {text!r} is none of the choices {', '.join(map(repr, texts))}")
        return texts.index(text)

    def answer(self, doc: Mapping[str, Any], text: str) -> str:
        """The answer, as scoring takes it, that prefers a choice."""
        return choices.preferring(self.place(doc, text), len(self.texts(doc)))

    def wrong_answer(self, doc: Mapping[str, Any], right: Sequence[str]) -> str:
        """One that prefers a choice which is not right: nonsense cannot be said here."""
        texts = self.texts(doc)
        wrong = next((place for place, one in enumerate(texts) if one not in right), 0)
        return choices.preferring(wrong, len(texts))

    def ask(self, index: int, doc: Mapping[str, Any], gold: str) -> tuple[Choices, dict[str, Any], list[int]]:
        """What a question is to the model, its prompt alone, and the tokens of the right choice.

        No forward pass is run. The prompt ends where the right choice's own tokens begin.
        """
        request = self.offered[index][0]
        try:
            place = self.place(doc, gold)
        except TaskError as error:
            raise TaskError(f"{request.task_name}, doc_id {request.doc_id}: {error}") from None
        offered = [self.playback.record_choice(one) for one in self.offered[index]]
        right = offered[place]
        start, end = choices.own_tokens(self.tokenizer, right.ids, gold)
        length = int(right.inputs["input_ids"].shape[1]) - right.scored + start
        asked = Choices(offered, place, start, self.reading)
        return asked, prompts.shortened(right.inputs, length), right.ids[start:end]

    def _find_reading(self) -> Reading:
        """How the wrapper reads logits, found out on the longest choice, of which a sum is not the mean.

        Raises: TaskError when it is in no known way, as what edits do to it could not be told.
        """
        request = max(chain.from_iterable(self.offered), key=lambda one: len(str(one.args[1])))
        choice = self.playback.record_choice(request)
        value = self.playback.score_choice(request)
        greedy_at = next((late for late in (0, 1) if self.playback.finds_greedy(request, late)), None)
        with torch.no_grad():
            logits = self.playback.model(**choice.inputs, use_cache=False).logits[:, -choice.scored - 1 :]
        tolerance = torch.finfo(logits.dtype).eps ** 0.5
        for reading in (Reading(name, greedy_at) for name in choices.VALUES):
            found = float(choice.read(logits, reading)[0])
            if math.isclose(found, value, rel_tol=tolerance, abs_tol=tolerance):
                return reading
        raise TaskError(
            f"{request.task_name}, doc_id {request.doc_id}: {type(self.playback.lmm).__name__} scores a "
            f"choice as {value:g}, neither loss nor log-likelihood of the tokens that it gives labels"
        )
