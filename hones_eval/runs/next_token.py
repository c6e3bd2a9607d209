"""What is read at the next token behind prompts that show one picture, measured for all of them at once."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from hones_eval.engine.passes import SiteEdit, check_finite
from hones_eval.engine.prefixes import SharedReplayer
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples


class Read(NamedTuple):
    """What was read behind one prompt: unedited [k], and under each edit [E, k], in float64."""

    base: Tensor
    edits: list[SiteEdit]
    edited: Tensor
    shared: int


class Together:
    """Reads examples one by one; the first of a picture also runs those behind it, which share its prefix."""

    def __init__(
        self, replayer: Replayer, examples: TaskExamples, read: Callable[[Example, Tensor], Tensor]
    ) -> None:
        """`read` makes numbers [rows, k] of an example's next-token logits [rows, vocabulary]."""
        self.sharing = SharedReplayer(replayer)
        self.examples = examples
        self.read = read
        self._ahead: dict[int, Read] = {}

    def of(self, example: Example, edits: Sequence[SiteEdit]) -> Read:
        """What is read behind an example's prompt, unedited and under each edit.

        Raises: HonesError when a reading is not finite, of this example or of one that shows the same.
        """
        known = self._ahead.pop(example.index, None)
        if known is None or known.edits != list(edits):
            self._ahead = self._measured(self.examples.together(example.index), edits)
            known = self._ahead.pop(example.index)
        return known

    def _measured(self, group: Sequence[Example], edits: Sequence[SiteEdit]) -> dict[int, Read]:
        number = {edit: row for row, edit in enumerate([None, *edits])}
        found: list[Tensor | None] = [None] * len(group)
        shared = [0] * len(group)
        for part in self.sharing.last_tokens([one.inputs for one in group], edits):
            rows = [number[edit] for edit in part.edits]
            for place, member in enumerate(part.members):
                values = self.read(group[member], part.logits[:, place, -1]).double().cpu()
                if not bool(torch.isfinite(values).all()):
                    self._not_finite(group[member])
                kept = found[member]
                if kept is None:
                    kept = found[member] = torch.full((len(number), values.shape[1]), torch.nan).double()
                kept[rows] = values
                shared[member] = part.shared
        return {
            one.index: Read(values[0], list(edits), values[1:], length)
            for one, values, length in zip(group, found, shared, strict=True)
            if values is not None
        }

    def _not_finite(self, example: Example) -> NoReturn:
        where = f"{example.task}, doc_id {example.doc_id}"
        check_finite(self.sharing.replayer.record(example.inputs, 1), where)
        raise HonesError(f"{where}: the logits under an edit are not finite")
