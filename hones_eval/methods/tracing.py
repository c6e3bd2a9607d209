"""Causal tracing: the places in a model where restoring a clean image's information matters (V-SEAM 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hones_eval.choices import What
from hones_eval.core import readouts
from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.activations import Part
from hones_eval.engine.patching import Patch, Patcher
from hones_eval.engine.tokens import MisalignedError, Places, Roles, align, token_roles, token_texts
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.examples import Example, TaskExamples
from hones_eval.runs.measure import Measurement

WHATS: tuple[What, ...] = get_args(What)
BY_TOKEN: tuple[What, ...] = ("attention", "ffn")


class Reading(NamedTuple):
    """The last position of one pass: the clean answer's probability (sum over its ids) and logit (mean over
    its ids), and the logit difference, clean minus edited answer.
    """

    probability: float
    logit: float
    difference: float


@dataclass(frozen=True, eq=False)
class Pair:
    """One question with its clean and its edited image; `roles` maps a role to the words that play it."""

    index: int
    key: str
    clean: Example
    edited: Example
    roles: Roles


class Pairs(Dataset[Pair]):
    """Pairs of examples of two tasks, matched by their documents' `question_id`, else by their place."""

    def __init__(
        self,
        clean: TaskExamples,
        edited: TaskExamples,
        keys: tuple[Sequence[str], Sequence[str]],
        roles: Sequence[Roles],
        limit: int | None = None,
    ) -> None:
        """Match.

        Args:
            clean: the examples of the clean task.
            edited: those of the edited task.
            keys: for the examples of each, what they are matched by.
            roles: for the clean examples, the words of each role.
            limit: at most so many pairs.

        Raises: TaskError when keys repeat or nothing matches.
        """
        self.clean, self.edited, self.roles = clean, edited, roles
        places = []
        for task, names in zip((clean.task, edited.task), keys, strict=True):
            if len(set(names)) != len(names):
                twice = next(name for name in names if list(names).count(name) > 1)
                raise TaskError(f"task {task}: two documents are called {twice!r}, so pairs are ambiguous")
            places.append({name: place for place, name in enumerate(names)})
        self.keys = [key for key in keys[0] if key in places[1]][:limit]
        self.unmatched = [key for key in keys[0] if key not in places[1]]
        self.places = [(places[0][key], places[1][key]) for key in self.keys]
        if not self.keys:
            raise TaskError(
                f"no document of {clean.task} (the first is {keys[0][0]!r}) has a twin in {edited.task} (the "
                f"first is {keys[1][0]!r})"
            )

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self.keys)

    def __getitem__(self, index: int) -> Pair:
        """Record both examples of a pair; no forward pass is run."""
        clean, edited = self.places[index]
        return Pair(index, self.keys[index], self.clean[clean], self.edited[edited], self.roles[clean])

    def share(self, rank: int, ranks: int) -> list[int]:
        """A rank's part of the pairs."""
        return list(range(rank, len(self), ranks))


class Refused(NamedTuple):
    """A pair that cannot be traced, and why."""

    key: str
    reason: str


@dataclass(frozen=True, eq=False)
class Traced:
    """One pair's readings. `values[what]` is [L + 1, 3] for streams and [T_text, L, 3] token by token, with
    the three fields of `Reading` of every patched pass; for streams the first axis is the layer that reads
    what was put back (L: the final norm).

    `tokens` and `roles` label the text tokens; `right` says whether the likeliest token was one of the clean
    (the edited) answer's on the clean (the edited) image.
    """

    key: str
    answers: tuple[str, str]
    tokens: list[str]
    roles: list[str]
    clean: Reading
    edited: Reading
    right: tuple[bool, bool]
    values: dict[What, Tensor]


class CausalTrace:
    """One pass over pairs: clean activations put back into the edited input's pass, one place at a time."""

    def __init__(
        self,
        anatomy: Anatomy,
        tokenizer: PreTrainedTokenizerBase,
        whats: Sequence[What],
        rows: int | None = None,
    ) -> None:
        """Trace the places `whats` of the anatomy's model, `rows` patched passes at once."""
        self.anatomy, self.tokenizer, self.whats = anatomy, tokenizer, list(whats)
        self.patcher = Patcher(anatomy, rows)

    def zeros(self) -> dict[str, Tensor]:
        """The number of pairs by outcome."""
        return {name: torch.zeros((), dtype=torch.float64) for name in ("traced", "refused")}

    def measure(self, pair: Pair) -> Measurement:
        """Trace one pair; its record is a `Traced`, or a `Refused` that names what is wrong with it."""
        sums = self.zeros()
        try:
            record: Traced | Refused = self._trace(pair)
        except (_NotTraceable, MisalignedError) as reason:
            record = Refused(pair.key, str(reason))
        sums["refused" if isinstance(record, Refused) else "traced"] += 1
        return Measurement(sums, record)

    def _trace(self, pair: Pair) -> Traced:
        reader = _Reader.of(pair)
        places = align(self.anatomy, pair.clean.inputs, pair.edited.inputs)
        if "image" in self.whats and isinstance(places.image, str):
            raise _NotTraceable(places.image)
        patches = self.patcher.record(pair.clean.inputs, pair.edited.inputs)
        values = {}
        for what in self.whats:
            cells = self._cells(what, places)
            readings = torch.empty(len(cells), 3, dtype=torch.float64)
            for rows in patches.patched(cells):
                readings[rows.places] = reader.read(rows.logits)
            depth = len(self.anatomy.layers)
            values[what] = readings.unflatten(0, (-1, depth)) if what in BY_TOKEN else readings
        clean, edited = (
            reader.read(logits[None])[0] for logits in (patches.clean_logits, patches.edited_logits)
        )
        tokens = token_texts(self.tokenizer, [pair.edited.inputs["input_ids"][0, p] for p, _ in places.text])
        return Traced(
            key=pair.key,
            answers=(pair.clean.target, pair.edited.target),
            tokens=tokens,
            roles=token_roles(tokens, pair.roles),
            clean=Reading(*clean.tolist()),
            edited=Reading(*edited.tolist()),
            right=(
                int(patches.clean_logits.argmax()) in pair.clean.target_ids,
                int(patches.edited_logits.argmax()) in pair.edited.target_ids,
            ),
            values=values,
        )

    def _cells(self, what: What, places: Places) -> list[Patch]:
        """Every place where clean activations are put back: by depth, or by token and layer."""
        depth = len(self.anatomy.layers)
        if what in BY_TOKEN:
            part: Part = "attention" if what == "attention" else "ffn"
            cells = product(places.text, range(depth))
            return [Patch(part, layer, (position,), (source,)) for (position, source), layer in cells]
        assert not isinstance(places.image, str) or what != "image"
        together = {"image": places.image, "text": places.text, "last": places.text[-1:]}[what]
        positions, sources = zip(*together, strict=True)
        return [Patch("stream", layer, positions, sources) for layer in range(depth + 1)]


class _NotTraceable(HonesError):
    """A pair that has to be left out, and why."""


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads logits for one pair's two answers."""

    clean_ids: Tensor
    edited_ids: Tensor

    @classmethod
    def of(cls, pair: Pair) -> "_Reader":
        clean, edited = (list(dict.fromkeys(example.target_ids)) for example in (pair.clean, pair.edited))
        if pair.clean.target.strip().lower() == pair.edited.target.strip().lower():
            raise _NotTraceable(f"its clean and edited answers agree: {pair.clean.target!r}")
        for example, ids in ((pair.clean, clean), (pair.edited, edited)):
            if not ids:
                raise _NotTraceable(f"the answer {example.target!r} has no tokens")
        if set(clean) == set(edited):
            raise _NotTraceable(
                f"the answers {pair.clean.target!r} and {pair.edited.target!r} have the same tokens"
            )
        return cls(torch.tensor(clean), torch.tensor(edited))

    def read(self, logits: Tensor) -> Tensor:
        """The fields of `Reading` [rows, 3], float64."""
        clean, edited = self.clean_ids.to(logits.device), self.edited_ids.to(logits.device)
        columns = (
            readouts.answer_probability(logits, clean),
            logits[:, clean].float().mean(-1),
            readouts.logit_difference(logits, clean, edited),
        )
        return torch.stack(columns, -1).double().cpu()
