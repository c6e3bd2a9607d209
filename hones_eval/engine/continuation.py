"""Decode on from where an edited answer first differs, with the keys and values that the replay has made.

The replayed pass that shows the difference has computed everything up to it: the keys and values of the
prompt and of the tokens that agree, and the token that differs. So the rows of one example go on together,
one token a step, each under its own edit. All have the same length at any time, so that nothing is padded:
a row joins the batch at the place where it differs.
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

# Keys and values that wait to be decoded on from: 1 GiB on a CPU, and on a GPU a share of what is free.
BYTES, SHARE = 2**30, 0.25


class Differing(NamedTuple):
    """An edit whose answer first differs from the unedited one at `place`, where `token` comes instead.

    `layers` has the keys and values of everything before, layer by layer.
    """

    edit: SiteEdit
    place: int
    token: int
    layers: list[KeysValues]


class Rules(Protocol):
    """How an example is decoded."""

    @property
    def prompt(self) -> Tensor:
        """Its tokens [1, tokens] as `generate` sees them."""

    def choices(self, seen: Tensor, logits: Tensor) -> Tensor:
        """The greedy choice [rows] behind tokens [rows, tokens], from logits [rows, vocabulary]."""

    def ended(self, seen: Tensor) -> Tensor:
        """Which rows [rows] end with the last of their tokens [rows, tokens]."""


class KeptKeys:
    """Keys and values of one cut of replayed rows, by their places in it, until it is known which differ."""

    def __init__(self, replay: Replay) -> None:
        """For a replay recorded with `keep`."""
        self.replay = replay
        self._layers: dict[int, tuple[dict[int, int], KeysValues]] = {}

    def __call__(self, layer: int, rows: Sequence[int], kept: KeysValues) -> None:
        """Keep one layer's; see `hones_eval.engine.replay.KeyReader`."""
        self._layers[layer] = ({number: row for row, number in enumerate(rows)}, kept)

    def of(self, number: int, tokens: int) -> list[KeysValues]:
        """The first tokens' keys and values of the edit with a number: the recorded ones up to its layer."""
        assert self.replay.keys_values is not None
        found = []
        for layer, recorded in enumerate(self.replay.keys_values):
            rows, kept = self._layers.get(layer, ({}, recorded))
            found.append(kept.of_row(rows[number], tokens) if number in rows else recorded.of_row(0, tokens))
        return found


def waiting_rows(row: Sequence[KeysValues]) -> int:
    """How many rows as large as this one may wait."""
    size = sum(one.numel() * one.element_size() for layer in row for one in layer)
    device = row[0].keys.device
    room = BYTES if device.type != "cuda" else int(SHARE * torch.cuda.mem_get_info(device)[0])
    return max(1, room // size)


class Continued(NamedTuple):
    """Answers [rows, tokens], with other tokens behind the end of rows that ended before the others.

    `first` has the first row's logits [steps, vocabulary], from which its tokens behind `start + 1` came.
    """

    answers: Tensor
    start: int
    first: Tensor


def speakers(anatomy: Anatomy) -> list[PreTrainedModel]:
    """Models that may take the next token alone: the whole one, or the language model that it wraps."""
    inner = [m for m in anatomy.model.modules() if isinstance(m, PreTrainedModel) and m is not anatomy.model]
    return [anatomy.model, *(m for m in inner if m.get_output_embeddings() is anatomy.unembed)]


@torch.no_grad()
def go_on(
    speaker: PreTrainedModel,
    anatomy: Anatomy,
    rules: Rules,
    answer: Sequence[int],
    rows: Sequence[Differing],
) -> Continued:
    """Decode some rows of one example on, greedily, until every one has ended by the rules.

    Args:
        speaker: one of `speakers`.
        anatomy: of the whole model, unedited.
        rules: of the example.
        answer: the unedited answer.
        rows: the edits, by their places ascending, with what they have computed so far.
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
            logits = speaker(input_ids=newest, past_key_values=cache, use_cache=True).logits[:, -1]
            first.append(logits[0])
            if end == text.shape[1]:
                text = torch.cat([text, text[:, -1:]], dim=1)
            text[:active, end] = rules.choices(text[:active, :end], logits)
    return Continued(text[:, length:], places[0], torch.stack(first) if first else torch.empty(0, 0))


def _text(prompt: Tensor, answer: Sequence[int], rows: Sequence[Differing]) -> Tensor:
    """Prompt, the agreed part of the answer and the differing token of every row, padded to one length."""
    longest = rows[-1].place + 1
    answers = torch.tensor(list(answer[:longest]), device=prompt.device).repeat(len(rows), 1)
    for row, tokens in zip(rows, answers, strict=True):
        tokens[row.place] = row.token
    return torch.cat([prompt.expand(len(rows), -1), answers], dim=1)


def disagreement(continued: Continued, expected: Tensor) -> str | None:
    """Why going on is not exact here, or None.

    Args:
        continued: whose first row was decoded on.
        expected: logits [answer, vocabulary] of one hooked pass over that row's prompt and answer.
    """
    expected = expected[continued.start + 1 :]
    found = continued.first[: len(expected)]
    if not len(expected):
        return None
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= ROUNDING[expected.dtype]:
        return f"logits behind the replayed keys and values differ from those of the full pass by {worst:.1e}"
    return None
