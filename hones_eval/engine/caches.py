"""Keys and values: those of a recorded pass, and stand-ins at the place of the model's own cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens that a `RoomyCache` makes room for at a time.
ROOM = 32


class KeysValues(NamedTuple):
    """One layer's keys and values, [rows, key-value heads, tokens, width] each."""

    keys: Tensor
    values: Tensor

    def of_row(self, row: int, tokens: int) -> "KeysValues":
        """One row's first tokens, in memory of their own."""
        return KeysValues(*(one[row : row + 1, :, :tokens].clone() for one in self))


class RecordedCache(DynamicCache):
    """The model's own cache, for one pass from the start; also keeps what sliding windows would let go."""

    def __init__(self, config: Any) -> None:
        """For a language model's configuration; `recorded` has an entry a layer after the pass."""
        super().__init__(config=config)
        self.recorded: dict[int, KeysValues] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the model's own."""
        self.recorded[layer_idx] = KeysValues(key_states, value_states)
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def of_layers(self, layers: int) -> list[KeysValues] | None:
        """What was recorded, layer by layer; None where a layer has nothing of its own."""
        known = [self.recorded[i] for i in range(layers) if i in self.recorded]
        return known if len(known) == layers else None


class RoomyCache(Cache):
    """Keys and values of some rows, of which the first take part, with room behind for what they add."""

    def __init__(self, rows: Sequence[Sequence[KeysValues]]) -> None:
        """From every row's keys and values, layer by layer; rows may have different numbers of tokens."""
        self._roomy = [_RoomyLayer(layer) for layer in zip(*rows, strict=True)]
        super().__init__(layers=list(self._roomy))

    def reach(self, rows: int, tokens: int) -> None:
        """Have the first rows and their first tokens take part."""
        for layer in self._roomy:
            layer.reach(rows, tokens)


class _RoomyLayer(DynamicLayer):
    keys: Tensor
    values: Tensor

    def __init__(self, rows: Sequence[KeysValues]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _, heads, _, width = rows[0].keys.shape
        tokens = max(row.keys.shape[2] for row in rows) + ROOM
        # Values may be of another width than keys. No row that goes on reads what is not filled: it takes
        # part only up to the tokens that it has. A row that has ended may read it, and is cut off before.
        self._keys = rows[0].keys.new_empty(len(rows), heads, tokens, width)
        self._values = rows[0].values.new_empty(len(rows), heads, tokens, rows[0].values.shape[3])
        for number, row in enumerate(rows):
            self._keys[number, :, : row.keys.shape[2]] = row.keys[0]
            self._values[number, :, : row.keys.shape[2]] = row.values[0]
        self.dtype, self.device, self.is_initialized = self._keys.dtype, self._keys.device, True
        self.reach(len(rows), tokens - ROOM)

    def reach(self, rows: int, tokens: int) -> None:
        self.keys, self.values = self._keys[:rows, :, :tokens], self._values[:rows, :, :tokens]

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
    """Stands in for a layer's cache while rows without a past walk through it, and keeps theirs."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self.kept: KeysValues | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the layer attends to: itself."""
        self.kept = KeysValues(keys, values)
        return keys, values


def is_cache(value: Any) -> bool:
    """Whether a layer's argument is the model's cache."""
    return isinstance(value, Cache)
