"""Arguments and outputs of decoder layers and their parts, when they are called with other rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hones_eval.core.probing import STATES
from hones_eval.engine.caches import is_cache


def argument_of_rows(value: Any, rows: int, name: str, broadcast: bool) -> Any:
    """A recorded argument of a layer, expanded to a number of rows where it does not serve any number.

    Args:
        value: as it was recorded for one row.
        rows: the number of rows of the call.
        name: of the argument; empty for one that is given by position.
        broadcast: whether masks and position embeddings of one row serve any number of rows.
    """
    if isinstance(value, tuple) and not broadcast:
        return tuple(argument_of_rows(part, rows, name, broadcast) for part in value)
    if name in STATES and isinstance(value, Tensor):  # several images may come one after the other
        value = value.reshape(1, -1, value.shape[-1])
    if not isinstance(value, Tensor) or value.shape[:1] != (1,):
        return value
    # The masks of flash attention are [batch, tokens], which do not broadcast over rows as 4-D masks do;
    # nor do token ids, and the kinds of tokens, by which ERNIE 4.5 VL chooses experts.
    by_row = value.dtype != torch.long or "token_type" in name or name.endswith("input_ids")
    is_mask = value.ndim == 2 and by_row
    # The states [batch, tokens, width] that cross-attention reads are cut into heads for every row.
    is_states = value.ndim == 3
    is_masks = value.ndim == 4 and not broadcast
    return value.expand(rows, *value.shape[1:]) if is_mask or is_states or is_masks else value


def by_row_only(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a layer's call on one row that do not serve any number of rows as they are."""
    named = [*(("", value) for value in args), *kwargs.items()]
    return [
        value
        for name, value in named
        if is_cache(value) or argument_of_rows(value, 2, name, broadcast=True) is not value
    ]


def only_read(function: Callable[[Tensor], Tensor], read: slice, x: Tensor) -> Tensor:
    """Apply a position-wise function to the positions that are read; the result is zero elsewhere."""
    narrow = function(x[:, read])
    wide = narrow.new_zeros(*x.shape[:-1], narrow.shape[-1])
    wide[:, read] = narrow
    return wide


def on_first_rows(
    forward: Callable[..., Any], count: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The output of an attention's forward function on the first `count` rows of the batch it is given."""
    if args:
        return forward(args[0][:count], *args[1:], **kwargs)
    return forward(**{**kwargs, "hidden_states": kwargs["hidden_states"][:count]})


def with_more_rows(output: Any, rows: Tensor) -> Any:
    """An output with rows added after those of its first tensor."""
    return with_tensor(output, torch.cat([tensor_of(output), rows]))


def returning(recorded: Any, first: Tensor) -> Callable[..., Any]:
    """A forward function that returns a recorded output with another first tensor."""
    result = with_tensor(recorded, first)
    return lambda *_, **__: result


def tensor_of(output: Any) -> Tensor:
    """A module's output tensor: the output itself, or the first entry of a tuple."""
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first


def with_tensor(output: Any, first: Tensor) -> Any:
    """A module's output with another output tensor."""
    return (first, *output[1:]) if isinstance(output, tuple) else first
