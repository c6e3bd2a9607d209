"""Keys and values: those of a recorded pass, and stand-ins at the place of the model's own cache."""

from typing import Any, NamedTuple

from torch import Tensor
from transformers import Cache, DynamicCache


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
