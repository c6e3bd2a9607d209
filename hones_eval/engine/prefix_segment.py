"""A segment of the tokens of grouped prompts: their shared prefix, or their own endings as one batch.

`hones_eval.engine.prefixes` walks both segments up the layers together. In every layer the prefix leaves the
keys and values of its rows, and the endings attend to them through a replacement of the model's cache.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.caches import KeptByLayer
from hones_eval.engine.passes import SiteEdit
from hones_eval.engine.replay import WAYS, Replay


class PrefixSegment(Replay):
    """A recorded pass over a segment of several sequences, as `Replay` is over all tokens of one.

    Every edit acts on all sequences. A batch is [edits * sequences, tokens, width], with the sequences of one
    edit next to each other.
    """

    def __init__(
        self, anatomy: Anatomy, lengths: Sequence[int], padded: int | None = None, read: int = 1
    ) -> None:
        """Make a segment of sequences, padded on the right; the last `read` tokens of each are read.

        Of a sequence that is shorter than `read`, the first token is repeated in front.
        """
        self.anatomy = anatomy
        self.ways = WAYS[0]
        self.sequences = len(lengths)
        self.tokens = self.sequences * (padded or lengths[0])
        self.hidden: Tensor | None = None
        self._last = (torch.tensor(lengths)[:, None] + torch.arange(-read, 0)).clamp(min=0)

    def run(self, model: Callable[[], Any]) -> Any:
        """Run `model`, record its pass, and return its output."""
        output = self._record(model)
        self.base_logits = self._at_the_end(output.logits)
        return output

    def called_like(self, other: "PrefixSegment") -> None:
        """Call the layers with the arguments that another segment recorded."""
        self._calls = [
            dataclasses.replace(call, args=theirs.args, kwargs=theirs.kwargs)
            for call, theirs in zip(self._calls, other._calls, strict=True)
        ]

    def step(self, layer: int, cache: Any, joining: Sequence[SiteEdit]) -> None:
        """Take all rows through a layer, and add the rows that are edited in it."""
        self.cache = cache
        parts = [] if self.hidden is None else [self.call(layer, self.hidden)]
        parts += [self._enter(layer, list(joining))] if joining else []
        if not parts:
            return
        self.hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        if layer < len(self._between) and (added := self._between[layer]) is not None:
            self.hidden = self.hidden + self._rows(added, len(self.hidden) // self.sequences)

    def logits(self) -> Tensor:
        """Logits [rows, sequences, read, vocabulary] after the last layer."""
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


class AfterPrefix:
    """Replaces the cache in a call of one layer on endings, which then attend to their row's prefix."""

    def __init__(self, prefix: KeptByLayer, reach: int) -> None:
        """Attend to the last `reach` tokens of the prefix in this layer."""
        self._prefix, self._reach = prefix, reach

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return each row's prefix followed by the new keys and values."""
        kept = self._prefix.kept
        if kept is None:
            raise RuntimeError(f"layer {layer} kept no keys and values of the prefix")
        return self._joined(kept.keys, keys), self._joined(kept.values, values)

    def _joined(self, past: Tensor, new: Tensor) -> Tensor:
        past = past[:, :, -self._reach :]
        both = new.new_empty(*new.shape[:2], past.shape[2] + new.shape[2], new.shape[3])
        by_row = both.unflatten(0, (len(past), -1))
        by_row[..., : past.shape[2], :] = past[:, None]
        both[..., past.shape[2] :, :] = new
        return both
