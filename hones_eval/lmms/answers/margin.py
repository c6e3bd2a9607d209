"""Answers that are a margin: how much rather a model would say one word than another at the next token.

A task asks for it by `margin: [Yes, No]` among its `generation_kwargs`. Its answers are then the numbers
`logit(Yes) - logit(No)` as text, wherever they come from: a ranking, a steered wrapper, a masked bank.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hones_eval.errors import HonesError, TaskError, UnsupportedModelError

SETTING = "margin"
TAIL = 24  # tokens at the end of a prompt that decide how the next ones are cut


class Margin(NamedTuple):
    """The tokens with which two words begin behind one prompt."""

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
    two = isinstance(words, list | tuple) and len(words) == 2 and all(isinstance(one, str) for one in words)
    if not two or not all(one.strip() for one in words) or words[0] == words[1]:
        raise TaskError(f"{task}: its generation_kwargs have margin={words!r}, and not two different words")
    return words[0], words[1]


def without(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings as a wrapper takes them, which knows of no margin."""
    return {name: value for name, value in settings.items() if name != SETTING}


def margin_behind(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], words: tuple[str, str]
) -> Margin:
    """The tokens that the two words begin with when a model answers this very prompt.

    Raises: HonesError when both begin with the same token: every margin would be 0.
    """
    first, second = (next_token(tokenizer, prompt, word) for word in words)
    if first == second:
        token = tokenizer.convert_ids_to_tokens(first)
        raise HonesError(
            f"{type(tokenizer).__name__} begins both {words[0]!r} and {words[1]!r} with the token {token!r} "
            f"({first}) behind this prompt, so their margin is always 0: this task needs a tokenizer "
            "that has the words, or other words as margin among its generation_kwargs"
        )
    return Margin(first, second)


def next_token(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: str) -> int:
    """The token behind a prompt in the conversation encoded with the answer; see `answer_tokens`."""
    return answer_tokens(tokenizer, prompt, answer)[0]


def answer_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: str) -> list[int]:
    """The tokens behind a prompt in the conversation encoded with the answer, at least one.

    A space stands before an answer, as in `ASSISTANT: Yes`, where the prompt ends in neither a blank nor a
    special token. Raises: HonesError when the encoded conversation does not go on from the prompt's tokens.
    """
    tail, text = _tail(tokenizer, list(prompt))
    ends = not text or text[-1].isspace() or tail[-1] in tokenizer.all_special_ids
    whole = _encoded(tokenizer, text + ("" if ends else " ") + answer)
    if whole[: len(tail)] != tail or len(whole) == len(tail):
        raise HonesError(
            f"{type(tokenizer).__name__} encodes the prompt's end {text[-20:]!r} otherwise when "
            f"{answer!r} follows, so the answer's first token cannot be told"
        )
    return whole[len(tail) :]


def _tail(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> tuple[list[int], str]:
    """The longest end of a prompt whose text encodes to its own tokens again."""
    for size in range(min(TAIL, len(prompt)), 0, -1):
        tail = prompt[-size:]
        text = str(tokenizer.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if _encoded(tokenizer, text) == tail:
            return tail, text
    raise HonesError(
        f"{type(tokenizer).__name__} does not give a prompt's last tokens again from their text, "
        "so the first token of an answer cannot be told"
    )


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


def as_text(margin: float) -> str:
    """A margin as the text of an answer, nothing rounded."""
    return repr(float(margin))


def as_answer(text: str, words: tuple[str, str]) -> str:
    """The margin that stands for an answer in words: 1 for the first, -1 for the second, 0 for any other."""
    return as_text({words[0]: 1.0, words[1]: -1.0}.get(text, 0.0))


class Margins(Mapping[int, str]):
    """One prompt's margins under many edits, by the edit's number, as texts; kept in four bytes each."""

    def __init__(self, values: Tensor) -> None:
        """`values` [E], in float32; NaN under an edit that was not measured, which is left out."""
        self._values = np.asarray(values.numpy(), dtype="<f4")

    @classmethod
    def of(cls, record: str) -> Self:
        """From `record`."""
        return cls(torch.from_numpy(np.frombuffer(base64.b64decode(record), dtype="<f4").copy()))

    def record(self) -> str:
        """As a text that JSON can hold."""
        return base64.b64encode(self._values.tobytes()).decode("ascii")

    def __getitem__(self, number: int) -> str:
        """The margin under one edit."""
        value = float(self._values[number])
        if value != value:
            raise KeyError(number)
        return as_text(value)

    def __iter__(self) -> Iterator[int]:
        """Numbers of the edits that were measured."""
        measured: list[int] = np.flatnonzero(~np.isnan(self._values)).tolist()
        return iter(measured)

    def __len__(self) -> int:
        """How many edits were measured."""
        return int((~np.isnan(self._values)).sum())


def tokenizer_in(wrapper: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that an lmms-eval model decodes answers with.

    Raises: UnsupportedModelError where it shows none.
    """
    for holder in ("", "processor", "_processor", "_image_processor", "image_processor"):
        found = getattr(getattr(wrapper, holder, None) if holder else wrapper, "tokenizer", None)
        if isinstance(found, PreTrainedTokenizerBase):
            return found
    raise UnsupportedModelError(
        f"{type(wrapper).__name__} shows no tokenizer, as `.tokenizer`, to encode answers"
    )
