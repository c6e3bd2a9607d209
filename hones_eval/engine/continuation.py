"""Continue edited answers from their first difference, with the keys and values of the replayed pass.

The replayed pass that shows a difference has already computed everything before it: the keys and values of
the prompt and of the agreeing tokens, and the token that differs. The differing rows of one example are
therefore decoded together from there, each under its own edit.

All rows of a pass share the number of tokens that the cache holds for them, that of the slowest row. A row
whose first difference comes later joins when the others have reached it. Several tokens per row are passed at
once where the next ones can be guessed (see `hones_eval.engine.drafts`): logits of one pass then decide as
many tokens as were guessed right, and one more. Rows that got ahead of the slowest one are fed the tokens
that they have decided already. Rows that have ended are left out once they are half of the batch.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import editing
from hones_eval.engine.caches import KeysValues, RoomyCache
from hones_eval.engine.drafts import Drafts
from hones_eval.engine.passes import ROUNDING, SiteEdit, edits_of_rows
from hones_eval.engine.replay import Replay

# Memory for keys and values of answers that wait to be continued: 1 GiB on a CPU, a share of free GPU memory.
BYTES, SHARE = 2**30, 0.25
# Guesses are cut to so many tokens per pass: with more of them it costs more than with one token per row.
GUESSES = 64
# Ended rows are left out of batches of at least so many rows.
LARGE = 8


class Differing(NamedTuple):
    """An edit whose answer equals the unedited answer before position `place`, where it has `token`.

    `layers` are the keys and values of all earlier tokens, by layer. An edit of None is the unedited model.
    """

    edit: SiteEdit | None
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

    def of(self, number: int, tokens: int, copy: bool = True) -> list[KeysValues]:
        """Keys and values of the first `tokens` tokens under edit `number`; up to its layer, the recorded.

        Without `copy` they keep those of all rows of the chunk in memory.
        """
        assert self.replay.keys_values is not None
        found = []
        for layer, recorded in enumerate(self.replay.keys_values):
            rows, kept = self._layers.get(layer, ({}, recorded))
            if number not in rows:
                found.append(recorded.of_row(0, tokens))
                continue
            own = kept.of_row(rows[number], tokens)
            found.append(own.copied() if copy else own)
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
    """Answers by row, up to the token that ends each.

    `first` are the first row's logits [steps, vocabulary], which chose its tokens after position `start`.
    """

    answers: list[list[int]]
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
    drafts: Drafts | None = None,
) -> Continued:
    """Continue some rows of one example greedily until every row has ended by the rules.

    Args:
        model: one of `candidates`.
        anatomy: the anatomy of the whole model, unedited.
        rules: the example's decoding rules.
        answer: the unedited answer.
        rows: the edits in ascending order of `place`, with the keys and values computed so far.
        drafts: guesses the tokens that come next; by default one token per row is decoded at a time.
    """
    batch = _Batch(anatomy, rules, answer, rows)
    with batch.hooks:
        batch.end(range(len(rows)))
        while batch.alive:
            batch.step(model, drafts)
    answers = [batch.answers[number] for number in range(len(rows))]
    first = torch.stack(batch.first) if batch.first else torch.empty(0, 0)
    return Continued(answers, rows[0].place, first)


class _Batch:
    """Rows that are decoded together: their text so far, and how much of it is decided.

    Columns of `text` hold the prompt and the answer. `decided[row]` counts the columns that are certain; what
    follows in a row is a guess, or not meaningful.
    """

    def __init__(
        self, anatomy: Anatomy, rules: Rules, answer: Sequence[int], rows: Sequence[Differing]
    ) -> None:
        self.anatomy, self.rules, self.answer = anatomy, rules, list(answer)
        self.length = rules.prompt.shape[1]
        # A cache holds more tokens than the text where image tokens are not part of the text.
        self.ahead = rows[0].layers[0].keys.shape[2] - rows[0].place - self.length
        self.edits = [row.edit for row in rows]
        self.numbers = list(range(len(rows)))
        self.text = _text(rules.prompt, answer, rows)
        self.decided = [self.length + row.place + 1 for row in rows]
        self.cache = RoomyCache([row.layers for row in rows])
        self.alive = list(range(len(rows)))
        self.answers: dict[int, list[int]] = {}
        self.first: list[Tensor] = []
        self.hooks = ExitStack()
        self._hooked = 0

    def end(self, rows: Sequence[int]) -> list[int]:
        """Take the rows that have ended out of `alive`; returns the others of `rows`."""
        left: list[int] = []
        for columns in sorted({self.decided[row] for row in rows}):
            same = [row for row in rows if self.decided[row] == columns]
            ended = self.rules.ended(self.text[same, :columns]).tolist()
            for row, has_ended in zip(same, ended, strict=True):
                if has_ended:
                    self.alive.remove(row)
                    self.answers[self.numbers[row]] = self.text[row, self.length : columns].tolist()
                else:
                    left.append(row)
        return left

    def step(self, model: PreTrainedModel, drafts: Drafts | None) -> None:
        """Run one pass, and decide at least one more token of the slowest rows."""
        self._compact()
        slowest = min(self.decided[row] for row in self.alive)
        known = self._guess(drafts, slowest)
        width = max(known[row] for row in self.alive if self.decided[row] == slowest) - slowest + 1
        start, stop = slowest - 1, slowest - 1 + width
        active = 1 + max(row for row in self.alive if self.decided[row] <= stop)
        self._hook(active)
        self.cache.reach(active, start + self.ahead)
        newest = self.text[:active, start:stop]
        logits = model(input_ids=newest, past_key_values=self.cache, use_cache=True).logits[:, -width:]
        before = list(self.decided)
        waiting = [row for row in self.alive if row < active]
        for column in range(start, stop):
            here = [row for row in waiting if self.decided[row] == column + 1]
            if not here:
                continue
            right = self._decide(here, column, logits[:, column - start], known)
            waiting = [row for row in waiting if row not in here or row in right]
        if drafts is not None:
            guessed = [row for row, end in enumerate(known) if end > before[row] and before[row] <= stop]
            drafts.checked(len(guessed), sum(max(0, self.decided[row] - before[row] - 1) for row in guessed))

    def _decide(self, rows: list[int], column: int, logits: Tensor, known: Sequence[int]) -> list[int]:
        """Choose the token after a column for some rows; returns those whose guess was right and go on."""
        every = len(rows) == len(logits)
        seen = self.text[: len(rows)] if every else self.text[rows]
        chosen = self.rules.choices(seen[:, : column + 1], logits if every else logits[rows])
        if self.numbers[rows[0]] == 0:
            self.first.append(logits[rows[0]])
        guessed = [row for row in rows if known[row] > column + 1]
        right = set()
        if guessed:
            agree = (seen[:, column + 1] == chosen).tolist()
            right = {row for row, same in zip(rows, agree, strict=True) if same} & set(guessed)
        self.text[rows, column + 1] = chosen
        for row in rows:
            self.decided[row] += 1
        left = self.end(rows)
        return [row for row in left if row in right]

    def _guess(self, drafts: Drafts | None, slowest: int) -> list[int]:
        """Write guesses after the decided tokens; returns the number of columns that are filled, by row."""
        known = list(self.decided)
        most = slowest + GUESSES // len(self.alive) - 1
        if drafts is not None:
            for row in self.alive:
                tokens = self.text[row, self.length : self.decided[row]].tolist()
                guess = drafts.after(tokens, self.answer)[: max(0, most - self.decided[row])]
                known[row] += len(guess)
                self._widen(known[row] + 1)
                if guess:
                    self.text[row, self.decided[row] : known[row]] = torch.tensor(guess)
        self._widen(max(known) + 1)
        return known

    def _widen(self, columns: int) -> None:
        if (missing := columns - self.text.shape[1]) > 0:
            self.text = torch.cat([self.text, self.text[:, -1:].expand(-1, missing)], dim=1)

    def _hook(self, active: int) -> None:
        """Attach the edits of the first `active` rows."""
        if active == self._hooked:
            return
        self.hooks.close()
        chosen = [(row, edit) for row, edit in enumerate(self.edits[:active]) if edit is not None]
        if chosen:
            self.hooks.enter_context(editing(list(edits_of_rows(self.anatomy, chosen))))
        self._hooked = active

    def _compact(self) -> None:
        """Leave out the rows that have ended, once they are half of a large batch."""
        if len(self.edits) < LARGE or 2 * len(self.alive) > len(self.edits):
            return
        rows = self.alive
        self.cache.keep(rows)
        self.text = self.text[rows]
        self.edits = [self.edits[row] for row in rows]
        self.numbers = [self.numbers[row] for row in rows]
        self.decided = [self.decided[row] for row in rows]
        self.alive = list(range(len(rows)))
        self._hooked = 0


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
