"""Continue edited answers from their first difference, with the keys and values of the replayed pass.

The replayed pass that shows a difference has already computed everything before it: the keys and values of
the prompt and of the agreeing tokens, and the token that differs. The differing rows of one example are
therefore decoded together from there, one token per step, each under its own edit. No padding is needed,
because all rows have the same length at every step: a row joins the batch at the step at which it differs.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import editing
from hones_eval.engine.caches import KeysValues, RoomyCache
from hones_eval.engine.passes import ROUNDING, SiteEdit, site_edits
from hones_eval.engine.replay import Replay

# Memory for keys and values of answers that wait to be continued: 1 GiB on a CPU, a share of free GPU memory.
BYTES, SHARE = 2**30, 0.25


class Differing(NamedTuple):
    """An edit whose answer first differs from the unedited answer at position `place`, where it has `token`.

    `layers` are the keys and values of all earlier tokens, by layer.
    """

    edit: SiteEdit
    place: int
    token: int
    layers: list[KeysValues]


class Rules(Protocol):
    """The rules by which one example is decoded greedily."""

    @property
    def prompt(self) -> Tensor:
        """The prompt's tokens [1, tokens] as `generate` sees them."""

    def choices(self, seen: Tensor, logits: Tensor) -> Tensor:
        """The greedy next token [rows] after tokens [rows, tokens], from logits [rows, vocabulary]."""

    def ended(self, seen: Tensor) -> Tensor:
        """Whether each row [rows] ends with the last of its tokens [rows, tokens]."""


class KeptKeys:
    """Keys and values of one chunk of replayed rows, kept until it is known which answers differ."""

    def __init__(self, replay: Replay) -> None:
        """For a replay recorded with `keep`."""
        self.replay = replay
        self._layers: dict[int, tuple[dict[int, int], KeysValues]] = {}

    def __call__(self, layer: int, rows: Sequence[int], kept: KeysValues) -> None:
        """Keep the keys and values of one layer; see `hones_eval.engine.replay.KeyReader`."""
        self._layers[layer] = ({number: row for row, number in enumerate(rows)}, kept)

    def of(self, number: int, tokens: int) -> list[KeysValues]:
        """Keys and values of the first `tokens` tokens under edit `number`; up to its layer, the recorded."""
        assert self.replay.keys_values is not None
        found = []
        for layer, recorded in enumerate(self.replay.keys_values):
            rows, kept = self._layers.get(layer, ({}, recorded))
            found.append(kept.of_row(rows[number], tokens) if number in rows else recorded.of_row(0, tokens))
        return found

    def of_rows(self, layer: int, start: int, count: int, tokens: int) -> KeysValues:
        """Keys and values of the first `tokens` tokens of consecutive rows that passed a layer's attention.

        `start` and `count` number rows in the order in which the chunk was replayed.
        """
        _, kept = self._layers[layer]
        return KeysValues(*(tensor[start : start + count, :, :tokens] for tensor in kept))


def waiting_rows(row: Sequence[KeysValues]) -> int:
    """How many rows of this size may wait."""
    size = sum(tensor.numel() * tensor.element_size() for layer in row for tensor in layer)
    device = row[0].keys.device
    room = BYTES if device.type != "cuda" else int(SHARE * torch.cuda.mem_get_info(device)[0])
    return max(1, room // size)


class Continued(NamedTuple):
    """Answers [rows, tokens]; what follows the end of a row that ended early is meaningless.

    `first` are the first row's logits [steps, vocabulary], which chose its tokens after position `start`.
    """

    answers: Tensor
    start: int
    first: Tensor


def candidates(anatomy: Anatomy) -> list[PreTrainedModel]:
    """Models that may accept the next token alone: the whole model, or the language model inside it."""
    inner = [m for m in anatomy.model.modules() if isinstance(m, PreTrainedModel) and m is not anatomy.model]
    return [anatomy.model, *(m for m in inner if m.get_output_embeddings() is anatomy.unembed)]


@torch.no_grad()
def continue_decoding(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rules: Rules,
    answer: Sequence[int],
    rows: Sequence[Differing],
) -> Continued:
    """Continue some rows of one example greedily until every row has ended by the rules.

    Args:
        model: one of `candidates`.
        anatomy: the anatomy of the whole model, unedited.
        rules: the example's decoding rules.
        answer: the unedited answer.
        rows: the edits in ascending order of `place`, with the keys and values computed so far.
    """
    length, prompt = rules.prompt.shape[1], rows[0].layers[0].keys.shape[2] - rows[0].place
    places = [row.place for row in rows]
    text = _text(rules.prompt, answer, rows)
    cache = RoomyCache([row.layers for row in rows])
    ended = torch.zeros(len(rows), dtype=torch.bool, device=text.device)
    first: list[Tensor] = []
    hooked = 0
    with ExitStack() as hooks:
        for place in itertools.count(places[0]):
            active, end = bisect_right(places, place), length + place + 1
            ended[:active] |= rules.ended(text[:active, :end])
            if bool(ended[:active].all()):
                if active == len(rows):
                    break
                continue
            if active > hooked:
                hooks.close()
                edits = list(site_edits(anatomy, [row.edit for row in rows[:active]]))
                hooks.enter_context(editing(edits))
                hooked = active
            cache.reach(active, prompt + place)
            newest = text[:active, end - 1 : end]
            logits = model(input_ids=newest, past_key_values=cache, use_cache=True).logits[:, -1]
            first.append(logits[0])
            if end == text.shape[1]:
                text = torch.cat([text, text[:, -1:]], dim=1)
            text[:active, end] = rules.choices(text[:active, :end], logits)
    return Continued(text[:, length:], places[0], torch.stack(first) if first else torch.empty(0, 0))


def _text(prompt: Tensor, answer: Sequence[int], rows: Sequence[Differing]) -> Tensor:
    """Every row's prompt, agreeing part of the answer and differing token, padded to one length."""
    longest = rows[-1].place + 1
    answers = torch.tensor(list(answer[:longest]), device=prompt.device).repeat(len(rows), 1)
    for row, tokens in zip(rows, answers, strict=True):
        tokens[row.place] = row.token
    return torch.cat([prompt.expand(len(rows), -1), answers], dim=1)


def disagreement(continued: Continued, expected: Tensor) -> str | None:
    """Why continuing is not exact for this model, or None.

    Args:
        continued: the result of `continue_decoding`, whose first row is compared.
        expected: logits [answer, vocabulary] of a hooked pass over that row's prompt and answer.
    """
    expected = expected[continued.start + 1 :]
    found = continued.first[: len(expected)]
    if not len(expected):
        return None
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= ROUNDING[expected.dtype]:
        return f"logits from replayed keys and values differ from those of a full pass by {worst:.1e}"
    return None
