"""Key-value caches that record, preallocate or share what a model's attention layers see.

Replay and decoding call a model's layers outside of its own `generate`. The classes here take the role of the
model's cache in such calls: `RecordedCache` keeps the keys and values of one full pass, `KeptByLayer` serves
a single layer of rows that have no past, and `RoomyCache` holds rows that are decoded on, with spare
capacity.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

# Number of tokens by which a `RoomyCache` grows at a time.
ROOM = 32


class KeysValues(NamedTuple):
    """One layer's keys and values, [rows, key-value heads, tokens, width] each."""

    keys: Tensor
    values: Tensor

    def of_row(self, row: int, tokens: int) -> "KeysValues":
        """The first `tokens` tokens of one row, which keep all rows in memory."""
        return KeysValues(*(tensor[row : row + 1, :, :tokens] for tensor in self))

    def copied(self) -> "KeysValues":
        """A copy."""
        return KeysValues(*(tensor.clone() for tensor in self))


class RecordedCache(DynamicCache):
    """The model's own cache for one pass from the start, which also keeps what sliding windows would drop."""

    def __init__(self, config: Any) -> None:
        """Make a cache for a language model's configuration; the pass fills `recorded` by layer."""
        super().__init__(config=config)
        self.recorded: dict[int, KeysValues] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Record and update, as the model's own cache does."""
        self.recorded[layer_idx] = KeysValues(key_states, value_states)
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def of_layers(self, layers: int) -> list[KeysValues] | None:
        """Recorded keys and values by layer; None when some layer has none of its own."""
        known = [self.recorded[i] for i in range(layers) if i in self.recorded]
        return known if len(known) == layers else None


class RoomyCache(Cache):
    """A preallocated cache of several rows, of which the first rows are active and can grow in place."""

    def __init__(self, rows: Sequence[Sequence[KeysValues]]) -> None:
        """Make a cache from every row's keys and values by layer; rows may differ in length."""
        self._roomy = [_RoomyLayer(layer) for layer in zip(*rows, strict=True)]
        super().__init__(layers=list(self._roomy))

    def reach(self, rows: int, tokens: int) -> None:
        """Activate the first `rows` rows with their first `tokens` tokens."""
        for layer in self._roomy:
            layer.reach(rows, tokens)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but some, in the given order."""
        for layer in self._roomy:
            layer.keep(rows)


class _RoomyLayer(DynamicLayer):
    keys: Tensor
    values: Tensor

    def __init__(self, rows: Sequence[KeysValues]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _, heads, _, width = rows[0].keys.shape
        tokens = max(row.keys.shape[2] for row in rows) + ROOM
        # Values may be wider than keys. Memory that is not filled is never read for a row that is still being
        # decoded: a row is active only up to the tokens it has. A row that has ended may read it, but its
        # answer is cut off before that.
        self._keys = rows[0].keys.new_empty(len(rows), heads, tokens, width)
        self._values = rows[0].values.new_empty(len(rows), heads, tokens, rows[0].values.shape[3])
        for number, row in enumerate(rows):
            self._keys[number, :, : row.keys.shape[2]] = row.keys[0]
            self._values[number, :, : row.keys.shape[2]] = row.values[0]
        self.dtype, self.device, self.is_initialized = self._keys.dtype, self._keys.device, True
        self.reach(len(rows), tokens - ROOM)

    def reach(self, rows: int, tokens: int) -> None:
        self.keys, self.values = self._keys[:rows, :, :tokens], self._values[:rows, :, :tokens]

    def keep(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(list(rows), device=self._keys.device)
        self._keys, self._values = self._keys[chosen], self._values[chosen]
        self.reach(len(rows), min(self.keys.shape[2], self._keys.shape[2]))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, _, tokens, _ = self.keys.shape
        grown = tokens + key_states.shape[2]
        if grown > self._keys.shape[2]:
            self._keys, self._values = _with_room(self._keys), _with_room(self._values)
        self._keys[:rows, :, tokens:grown], self._values[:rows, :, tokens:grown] = key_states, value_states
        self.reach(rows, grown)
        return self.keys, self.values


def _with_room(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_empty(*x.shape[:2], ROOM, x.shape[3])], dim=2)


class KeptByLayer:
    """Replaces the cache in a call of one layer on rows without a past, and keeps their keys and values."""

    def __init__(self) -> None:
        """Start with nothing kept."""
        self.kept: KeysValues | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values and return them: the rows attend to themselves only."""
        self.kept = KeysValues(keys, values)
        return keys, values


def is_cache(value: Any) -> bool:
    """Whether an argument of a layer is the model's cache."""
    return isinstance(value, Cache)
