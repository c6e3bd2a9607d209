"""Lengthen the tensors of a prompt by answer tokens, or cut them to a shared prefix.

An encoder-decoder reads its prompt in the encoder. The sequence of its decoder begins with a start token, and
the answer follows that: such inputs have `decoder_input_ids`, which `started` adds to what a wrapper gives.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.errors import HonesError

# Inputs with one entry per prompt token. All other inputs of a model belong to the images.
# The masks of cross-attention [batch, tokens, images, ...] tell which images a token may see.
STATE_MASKS = frozenset({"cross_attention_mask", "image_attention_mask"})
ALONG_THE_PROMPT = STATE_MASKS | {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
# The decoder's own sequence in an encoder-decoder, and its mask.
ANSWER_IDS, ANSWER_MASK = "decoder_input_ids", "decoder_attention_mask"


def own_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """The token ids [batch, tokens] of the sequence that the decoder's layers process."""
    ids: Tensor = inputs[ANSWER_IDS] if ANSWER_IDS in inputs else inputs["input_ids"]
    return ids


def started(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a model, with the decoder's start token where it is an encoder-decoder.

    Raises: HonesError when an encoder-decoder states no start token.
    """
    if not is_encoder_decoder(model) or ANSWER_IDS in inputs:
        return dict(inputs)
    settings = [part.generation_config for part in _generating(model)]
    configs = [*settings, model.config, model.config.get_text_config(decoder=True)]
    names = ("decoder_start_token_id", "bos_token_id")
    starts = [getattr(config, name, None) for name in names for config in configs]
    start = next((start for start in starts if isinstance(start, int)), None)
    if start is None:
        raise HonesError(
            f"{type(model).__name__} states no decoder_start_token_id: set it in its generation_config"
        )
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    return {**inputs, ANSWER_IDS: torch.full((len(first), 1), start, device=first.device)}


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a model, or the language model inside it, reads its prompt in an encoder."""
    configs: list[Any] = [model.config, model.config.get_text_config(decoder=True)]
    return any(getattr(config, "is_encoder_decoder", False) for config in configs)


def _generating(model: PreTrainedModel) -> list[Any]:
    """The model and the models inside it that have generation settings, the innermost ones first."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in reversed(parts) if getattr(part, "generation_config", None) is not None]


def appended(inputs: Mapping[str, Any], tokens: Sequence[int], answer_type: int = 0) -> dict[str, Any]:
    """The inputs of one example [1, tokens] with answer tokens appended to the prompt.

    The other inputs with one entry per prompt token are extended too: the attention mask with ones, type ids
    with the type that answers have in this family (1 where prompts are attended to in both directions, as in
    PaliGemma; else 0).

    In an encoder-decoder the answer follows the decoder's start token instead, and the prompt stays as it is.

    Args:
        inputs: the model's inputs for one example; `input_ids` is [1, tokens].
        tokens: the answer's token ids.
        answer_type: the token type of an answer.
    """
    ids = own_tokens(inputs)
    new = torch.tensor([list(tokens)], dtype=ids.dtype, device=ids.device)
    if ANSWER_IDS in inputs:
        longer = {**inputs, ANSWER_IDS: torch.cat([ids, new], dim=1)}
        if (mask := inputs.get(ANSWER_MASK)) is not None:
            longer[ANSWER_MASK] = torch.cat([mask, torch.ones_like(new).to(mask)], dim=1)
        return longer
    grown = {
        "input_ids": new,
        "attention_mask": torch.ones_like(new),
        "token_type_ids": torch.full_like(new, answer_type),
        "mm_token_type_ids": torch.zeros_like(new),
    }
    longer = dict(inputs)
    for name in STATE_MASKS & inputs.keys():  # an answer sees the images that the last token sees
        last: Tensor = inputs[name][:, -1:]
        grown[name] = last.expand(-1, new.shape[1], *last.shape[2:])
    for name in ALONG_THE_PROMPT & inputs.keys():
        longer[name] = torch.cat([inputs[name], grown[name].to(inputs[name].dtype)], dim=1)
    return longer


def shortened(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The inputs of one example [1, tokens], cut to the first `length` tokens of the prompt."""
    return {name: value[:, :length] if name in ALONG_THE_PROMPT else value for name, value in inputs.items()}
