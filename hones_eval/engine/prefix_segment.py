"""A stretch of tokens that edited passes walk through: what some prompts share, or what each has of its own.

`hones_eval.engine.prefixes` puts one after the other. In every layer the shared stretch leaves the keys
and values of its rows, and the others attend to them, through stand-ins for the model's own cache.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.caches import KeptByLayer
from hones_eval.engine.passes import SiteEdit
from hones_eval.engine.replay import Replay


class Stretch(Replay):
    """Some tokens of a few sequences, as `Replay` has those of one; every edited row has all sequences.

    A batch [rows * sequences, tokens, width] has the sequences of one row side by side.
    """

    def __init__(
        self, anatomy: Anatomy, lengths: Sequence[int], padded: int | None = None, read: int = 1
    ) -> None:
        """For sequences of these lengths, padded on the right to one; of each the last `read` are read.

        Of a shorter one all are, behind its first token again as often as some are missing.
        """
        self.anatomy = anatomy
        self.sequences = len(lengths)
        self.tokens = self.sequences * (padded or lengths[0])
        self.hidden: Tensor | None = None
        self._last = (torch.tensor(lengths)[:, None] + torch.arange(-read, 0)).clamp(min=0)

    def run(self, model: Callable[[], Any]) -> Any:
        """Record a pass of the model; its output."""
        output = self._record(model)
        self.base_logits = self._at_the_end(output.logits)
        return output

    def called_like(self, other: "Stretch") -> None:
        """Call layers with another stretch's arguments."""
        self._calls = [
            dataclasses.replace(call, args=model.args, kwargs=model.kwargs)
            for call, model in zip(self._calls, other._calls, strict=True)
        ]

    def step(self, layer: int, cache: Any, joining: Sequence[SiteEdit]) -> None:
        """Take all rows through a layer, with those that join in it."""
        self.cache = cache
        parts = [] if self.hidden is None else [self.call(layer, self.hidden)]
        parts += [self._enter(layer, list(joining))] if joining else []
        if not parts:
            return
        self.hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        if layer < len(self._between) and (added := self._between[layer]) is not None:
            self.hidden = self.hidden + self._rows(added, len(self.hidden) // self.sequences)

    def logits(self) -> Tensor:
        """Logits [rows, sequences, read, vocabulary] at the top."""
        assert self.hidden is not None
        logits: Tensor = self.anatomy.logits(self._at_the_end(self.hidden))
        return logits.reshape(-1, self.sequences, *logits.shape[1:])

    def _rows(self, recorded: Tensor, count: int) -> Tensor:
        return recorded.repeat(count, 1, 1)

    def _by_row(self, edits: Sequence[SiteEdit]) -> list[tuple[int, SiteEdit]]:
        return [(row, edits[row // self.sequences]) for row in range(len(edits) * self.sequences)]

    def _only_read(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        narrow = function(self._at_the_end(x))
        wide = narrow.new_zeros(*x.shape[:-1], narrow.shape[-1])
        wide[torch.arange(len(x))[:, None], self._ends(x)] = narrow
        return wide

    def _at_the_end(self, x: Tensor) -> Tensor:
        """Every sequence's last tokens [rows * sequences, read, width]."""
        return x[torch.arange(len(x))[:, None], self._ends(x)]

    def _ends(self, x: Tensor) -> Tensor:
        return self._last.to(x.device).repeat(len(x) // self.sequences, 1)


class BehindPrefix:
    """Stands in for a layer's cache while endings pass: each row's sequences attend to the row's prefix."""

    def __init__(self, prefix: KeptByLayer, reach: int) -> None:
        """Attend to the last `reach` tokens of what the prefix has kept in this layer."""
        self._prefix, self._reach = prefix, reach

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the layer attends to: each row's prefix, and itself."""
        kept = self._prefix.kept
        if kept is None:
            raise RuntimeError(f"layer {layer} kept no keys and values of the prefix")
        return self._behind(kept.keys, keys), self._behind(kept.values, values)

    def _behind(self, past: Tensor, new: Tensor) -> Tensor:
        past = past[:, :, -self._reach :]
        both = new.new_empty(*new.shape[:2], past.shape[2] + new.shape[2], new.shape[3])
        by_row = both.unflatten(0, (len(past), -1))
        by_row[..., : past.shape[2], :] = past[:, None]
        both[..., past.shape[2] :, :] = new
        return both
