"""Lengthen the tensors of a prompt by answer tokens, or cut them to a shared prefix."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Inputs with one entry per prompt token. All other inputs of a model belong to the images.
ALONG_THE_PROMPT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


def appended(inputs: Mapping[str, Any], tokens: Sequence[int], answer_type: int = 0) -> dict[str, Any]:
    """The inputs of one example [1, tokens] with answer tokens appended to the prompt.

    The other inputs with one entry per prompt token are extended too: the attention mask with ones, type ids
    with the type that answers have in this family (1 where prompts are attended to in both directions, as in
    PaliGemma; else 0).

    Args:
        inputs: the model's inputs for one example; `input_ids` is [1, tokens].
        tokens: the answer's token ids.
        answer_type: the token type of an answer.
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
    """The inputs of one example [1, tokens], cut to the first `length` tokens of the prompt."""
    return {name: value[:, :length] if name in ALONG_THE_PROMPT else value for name, value in inputs.items()}
