"""The tensors of one prompt, made longer by an answer's tokens or cut short before them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What has the prompt's length; whatever else a model takes belongs to the pictures.
ALONG_THE_PROMPT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


def appended(inputs: Mapping[str, Any], tokens: Sequence[int], answer_type: int = 0) -> dict[str, Any]:
    """The inputs of one example [1, tokens] with answer tokens appended to the prompt.

    What else has the prompt's length grows with it: the attention mask by ones, type ids by the type that an
    answer has in this family (1 where a prompt is attended to in both directions, as in PaliGemma).
    """
    ids: Tensor = inputs["input_ids"]
    new = torch.tensor([list(tokens)], dtype=ids.dtype, device=ids.device)
    grown = {
        "input_ids": new,
        "attention_mask": torch.ones_like(new),
        "token_type_ids": torch.full_like(new, answer_type),
        "mm_token_type_ids": torch.zeros_like(new),
    }
    longer = dict(inputs)
    for name in ALONG_THE_PROMPT & inputs.keys():
        longer[name] = torch.cat([inputs[name], grown[name].to(inputs[name].dtype)], dim=1)
    return longer


def shortened(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The inputs of one example [1, tokens] with the first `length` tokens of the prompt alone."""
    return {name: value[:, :length] if name in ALONG_THE_PROMPT else value for name, value in inputs.items()}
