"""Small models without a processor: of a family that is refused by name, and of families that are served."""

from collections.abc import Callable
from typing import Any, NamedTuple

import census
import transformers as hf
from family_parts import VISION
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 120
IMAGE_TOKEN = 119
QFORMER = {**VISION, "vocab_size": 50, "cross_attention_frequency": 1}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class Refused(NamedTuple):
    """A model class and a configuration of it."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig


def instructblip_opt() -> Refused:
    config = hf.InstructBlipConfig(text_config=hf.OPTConfig(**OPT), **_blip())
    return Refused(hf.InstructBlipForConditionalGeneration, config)


def instructblip_t5() -> Refused:
    text = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",  # as Flan-T5 has it
        decoder_start_token_id=0,
    )
    return Refused(
        hf.InstructBlipForConditionalGeneration, hf.InstructBlipConfig(text_config=text, **_blip())
    )


def blip2_opt() -> Refused:
    config = hf.Blip2Config(text_config=hf.OPTConfig(**OPT), **_blip())
    return Refused(hf.Blip2ForConditionalGeneration, config)


def _blip() -> dict[str, Any]:
    return {
        "vision_config": {**VISION, "image_size": 32, "patch_size": 16},
        "qformer_config": QFORMER,
        "num_query_tokens": 4,
        "image_token_index": IMAGE_TOKEN,
    }


def florence2() -> Refused:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    text = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64, pad_token_id=1, **layers, **heads
    )
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 4,
        "projection_dim": 32,
    }
    config = hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    return Refused(hf.Florence2ForConditionalGeneration, config)


def aria() -> Refused:
    text = {**_llama_like(), "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = hf.AriaConfig(
        text_config=text,
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE_TOKEN,
    )
    return Refused(hf.AriaForConditionalGeneration, config)


def mllama() -> Refused:
    config = hf.MllamaConfig(
        text_config={**_llama_like(), "num_hidden_layers": 3, "cross_attention_layers": [1]},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        image_token_index=IMAGE_TOKEN,
    )
    return Refused(hf.MllamaForConditionalGeneration, config)


def diffusion_gemma() -> Refused:
    """It writes a block of tokens at once, and has no decoder that answers token by token."""
    return Refused(hf.DiffusionGemmaForBlockDiffusion, census.tiny_config("diffusion_gemma"))


def _llama_like() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


REFUSED: dict[str, Callable[[], Refused]] = {recipe.__name__: recipe for recipe in (diffusion_gemma,)}
# Served, but built here without a processor.
SERVED: dict[str, Callable[[], Refused]] = {
    recipe.__name__: recipe
    for recipe in (instructblip_opt, instructblip_t5, blip2_opt, florence2, aria, mllama)
}
