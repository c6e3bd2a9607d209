"""Answers that are choices: a model's log-likelihood of each of some continuations of a question.

Tasks with `output_type: multiple_choice` ask lmms-eval's models for them, one forward pass a choice, and take
the choice with the smallest value. Their answers here are all values of a question as one text, wherever they
come from: a ranking, a steering that is tried out, a masked bank.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hones_eval.core.readouts import sequence_log_probability

# What wrappers make of a continuation's log-probability [rows] and of how many tokens it has.
VALUES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean loss": lambda log_p, tokens: -log_p / tokens,
    "summed loss": lambda log_p, tokens: -log_p,
    "mean log-likelihood": lambda log_p, tokens: log_p / tokens,
    "summed log-likelihood": lambda log_p, tokens: log_p,
}


class Reading(NamedTuple):
    """How a wrapper reads logits: the value it makes, by a name of `VALUES`, and what it calls greedy.

    Greedy is a choice whose every token is the likeliest, looked for where the token is predicted (0), one
    position later (1), as `llava_hf` does, or nowhere (None).
    """

    value: str
    greedy_at: int | None


class Choice(NamedTuple):
    """One choice behind its question, as the wrapper hands both to the model."""

    inputs: dict[str, Any]
    """What `forward` takes, a batch of one: the prompt and the choice."""
    scored: int
    """How many tokens at the end are the choice's: those that the wrapper gives labels."""

    @property
    def ids(self) -> list[int]:
        """The tokens that are scored."""
        ids: list[int] = self.inputs["input_ids"][0, -self.scored :].tolist()
        return ids

    def read(self, logits: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        """Its value [rows], in float32, and whether it is greedy [rows].

        `logits` [rows, scored + 1, vocabulary] are those of the last positions.
        """
        ids = torch.tensor(self.ids, device=logits.device)
        value = VALUES[reading.value](sequence_log_probability(logits[:, :-1], ids), self.scored)
        if reading.greedy_at is None:
            return value, torch.zeros(len(logits), dtype=torch.bool)
        likeliest = logits.argmax(-1)[:, reading.greedy_at :][:, : self.scored]
        return value, (likeliest == ids).all(-1)


class Choices(NamedTuple):
    """The choices of one question, and the right one."""

    offered: list[Choice]
    gold: int
    """The place of the right one."""
    start: int
    """Where, among its scored tokens, the right choice's own begin: templates may stand before them."""
    reading: Reading


def as_text(values: Sequence[float], greedy: Sequence[bool]) -> str:
    """A question's values as the text of an answer, nothing rounded."""
    return json.dumps([[float(value), bool(one)] for value, one in zip(values, greedy, strict=True)])


def from_text(text: str) -> list[tuple[float, bool]]:
    """The values behind `as_text`, as lmms-eval's scoring takes them."""
    return [(float(value), bool(greedy)) for value, greedy in json.loads(text)]


def preferring(place: int, count: int) -> str:
    """The answer, as text, that prefers one of `count` choices."""
    return as_text([float(i != place) for i in range(count)], [i == place for i in range(count)])


def own_tokens(tokenizer: PreTrainedTokenizerBase, scored: Sequence[int], choice: str) -> tuple[int, int]:
    """Where a choice's own tokens begin and end among those that are scored with it.

    A template's end of turn may stand behind them, and a piece of its beginning before. Where the choice
    cannot be read from the tokens, all are taken up to the first special one.
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
