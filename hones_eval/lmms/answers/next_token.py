"""Batched next-token readouts for prompts that share images, and kinds of answers that are such a readout.

Prompts that show the same images usually begin alike: the candidates of one query, the questions about one
image. They are measured together, with their common prefix computed once per edit (see
`hones_eval.engine.prefixes`). The first example of such a group runs all of them; the results of the others
are kept until they are asked for.
"""

import base64
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from hones_eval.engine.passes import SiteEdit, check_finite
from hones_eval.engine.prefixes import SharedReplayer
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.kind import AnswerKind, EditedAnswers, EditRun, Examples, RowAnswer, SteeringRun
from hones_eval.lmms.example import Example


class Readout(NamedTuple):
    """The numbers read after one prompt: unedited [k], and under each edit [E, k], in float64."""

    base: Tensor
    edits: list[SiteEdit]
    edited: Tensor
    shared: int


class NextTokenReadouts:
    """Reads examples in order; the first with some images also runs the following ones that show the same."""

    def __init__(
        self, sharing: SharedReplayer, examples: Examples, read: Callable[[Example, Tensor], Tensor]
    ) -> None:
        """`read` turns an example's next-token logits [rows, vocabulary] into numbers [rows, k]."""
        self.sharing = sharing
        self.examples = examples
        self.read = read
        self._ahead: dict[int, Readout] = {}

    def of(self, example: Example, edits: Sequence[SiteEdit]) -> Readout:
        """The numbers after an example's prompt, unedited and under each edit.

        Raises: HonesError when a number is not finite, of this example or of one that shows the same images.
        """
        known = self._ahead.pop(example.index, None)
        if known is None or known.edits != list(edits):
            self._ahead = self._measured(self.examples.with_same_images(example.index), edits)
            known = self._ahead.pop(example.index)
        return known

    def _measured(self, group: Sequence[Example], edits: Sequence[SiteEdit]) -> dict[int, Readout]:
        row_of = {edit: row for row, edit in enumerate([None, *edits])}
        found: list[Tensor | None] = [None] * len(group)
        shared = [0] * len(group)
        for part in self.sharing.last_tokens([example.inputs for example in group], edits):
            rows = [row_of[edit] for edit in part.edits]
            for column, member in enumerate(part.members):
                values = self.read(group[member], part.logits[:, column, -1]).double().cpu()
                if not bool(torch.isfinite(values).all()):
                    self._refuse(group[member])
                table = found[member]
                if table is None:
                    table = found[member] = torch.full((len(row_of), values.shape[1]), torch.nan).double()
                table[rows] = values
                shared[member] = part.shared
        return {
            example.index: Readout(table[0], list(edits), table[1:], length)
            for example, table, length in zip(group, found, shared, strict=True)
            if table is not None
        }

    def _refuse(self, example: Example) -> NoReturn:
        check_finite(self.sharing.replayer.record(example.inputs, 1), example.where)
        raise HonesError(f"{example.where}: the logits under an edit are not finite")


class Readable(Protocol):
    """The details of an example whose answer is a number read from next-token logits."""

    def of(self, logits: Tensor) -> Tensor:
        """The answer [...] at a token with logits [..., vocabulary], in float32."""


class NextTokenKind(AnswerKind):
    """A kind whose answer is one number, read from the logits after the prompt; `details` are `Readable`."""

    many_answers = True

    @abstractmethod
    def differs(self, base: float, edited: Tensor) -> Tensor:
        """Whether the answers under edits [E] count as other answers than the unedited one."""

    def under_edits(self, run: EditRun, example: Example, numbers: Sequence[int]) -> EditedAnswers:
        """The number at the next token, and the target's log-probability there."""
        readouts = run.ahead.setdefault(
            self.name, NextTokenReadouts(run.sharing, run.examples, _value_and_target)
        )
        found = readouts.of(example, [run.edits[number] for number in numbers])
        base, log_p = found.base.tolist()
        rows = [run.numbers[edit] for edit in found.edits]
        values = torch.full((len(run.edits),), torch.nan)
        values[rows] = found.edited[:, 0].float()
        drops = torch.zeros(len(run.edits), dtype=torch.float64)
        drops[rows] = log_p - found.edited[:, 1]
        differing = int(self.differs(base, values[rows]).sum())
        return EditedAnswers(
            as_text(base), NumberTexts(values), log_p, drops, differing, shared=found.shared > 0
        )

    def under_steerings(self, run: SteeringRun, example: Example, names: Sequence[str]) -> list[RowAnswer]:
        """The number at the first generated token."""
        first = run.generate(example, names, max_new_tokens=1).logits[0]
        values = example.details.of(first).tolist()
        return [RowAnswer(as_text(value), logits) for value, logits in zip(values, first, strict=True)]

    def record(self, answers: EditedAnswers) -> dict[str, Any]:
        """The numbers under all edits, packed into one text."""
        assert isinstance(answers.changed, NumberTexts)
        return {"base": answers.base, "margins": answers.changed.packed()}

    def changed(self, record: Mapping[str, Any]) -> Mapping[int, str]:
        """The numbers of a `record`, by the edit's number."""
        return NumberTexts.unpack(record["margins"])


def _value_and_target(example: Example, logits: Tensor) -> Tensor:
    """For logits [rows, vocabulary] the answer's number and the target's log-probability: [rows, 2]."""
    log_p = logits.float().log_softmax(-1)[:, example.target_ids[0]]
    return torch.stack([example.details.of(logits), log_p], dim=1)


def as_text(value: float) -> str:
    """A number as the text of an answer, without rounding."""
    return repr(float(value))


class NumberTexts(Mapping[int, str]):
    """One prompt's numbers under many edits as texts, by the edit's number; four bytes per edit."""

    def __init__(self, values: Tensor) -> None:
        """`values` [E] in float32; NaN under an edit that was not measured, which the mapping leaves out."""
        self._values = np.asarray(values.numpy(), dtype="<f4")

    @classmethod
    def unpack(cls, packed: str) -> Self:
        """The inverse of `packed`."""
        return cls(torch.from_numpy(np.frombuffer(base64.b64decode(packed), dtype="<f4").copy()))

    def packed(self) -> str:
        """All values as one text that JSON can hold."""
        return base64.b64encode(self._values.tobytes()).decode("ascii")

    def __getitem__(self, number: int) -> str:
        """The number under one edit. Raises: KeyError when it was not measured."""
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
