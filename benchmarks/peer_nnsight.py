"""Heads by log-probability with nnsight, as its users would write it: rows that restart by `skip`.

The layers' outputs of the unedited pass are kept. Per layer, its heads are the rows of one trace of the
language model, in which the layers below are skipped. nnsight is no dependency of this package; without it,
`careful_batch.py` leaves this way out.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hones_eval.core.sites import Head
from hones_eval.engine.prompts import appended


def replaced(x: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Replace head `chosen[i]` in row `i` by the mean of the others; `x` is [rows, tokens, features]."""
    split: Tensor = x.unflatten(-1, (count, -1)).clone()
    rows = torch.arange(len(chosen))
    split[rows, :, chosen] = (split.sum(2) - split[rows, :, chosen]) / (count - 1)
    return split.flatten(2)


def peer_logits(model: Any, heads: Sequence[Head], count: int) -> Callable[[Any], Tensor] | None:
    """A function of an example that returns logits [heads, target, vocabulary]; None without nnsight."""
    if find_spec("nnsight") is None:
        return None
    wrapper: Any = import_module("nnsight").NNsight
    whole, decoder = wrapper(model), wrapper(model.get_decoder())
    depth = len(model.get_decoder().layers)

    def logits(example: Any) -> Tensor:
        inputs, read = appended(example.inputs, example.target_ids[:-1]), len(example.target_ids)
        with whole.trace(**inputs, use_cache=False):
            kept: Any = list().save()  # type: ignore[attr-defined]  # noqa: C408 (a method of nnsight's)
            kept.append(whole.model.language_model.layers[0].input)
            for layer in whole.model.language_model.layers:
                kept.append(layer.output)
        found: list[Tensor] = [torch.empty(0)] * len(heads)
        for start in range(depth):
            numbers = [i for i, head in enumerate(heads) if head.layer == start]
            if not numbers:
                continue
            chosen, rows = torch.tensor([heads[i].head for i in numbers]), len(numbers)
            with decoder.trace(inputs_embeds=kept[0].expand(rows, -1, -1), use_cache=False):
                for i in range(start):
                    decoder.layers[i].skip(kept[i + 1].expand(rows, -1, -1))
                projection = decoder.layers[start].self_attn.o_proj
                projection.input = replaced(projection.input, chosen, count)
                hidden = decoder.norm.output.save()
            for i, row in zip(numbers, model.lm_head(hidden[:, -read:]), strict=True):
                found[i] = row
        return torch.stack(found)

    return logits
