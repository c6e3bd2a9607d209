"""Tiny random models of every image-text-to-text type, to count those that are served.

A model is built from its type's default configuration with the language model's sizes made small and every
other stack cut to two layers. Only models that cannot run without an image are shown one, of noise: the
families of `families.py` cover the rest.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from hones_eval.engine.prompts import started

# Types whose generating class is not in that mapping.
OTHERS = {
    "phi4_multimodal": "Phi4MultimodalForCausalLM",
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
}
# Not vision-language models: one reads proteins, the other moves robots.
NOT_OURS = {"evolla", "pi0"}
VOCABULARY = 128
BLOCK = 100_003
# Parts that read images and sound: without an image they are never called, and their weights stay undrawn.
UNUSED = ("vision", "visual", "audio", "vqmodel", "image_tower", "token2wav")

# Sizes of language models by their names in configurations. 4 heads in most.
SIZES = {
    "hidden_size": 64,
    "d_model": 64,
    "embed_dim": 64,
    "n_embd": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "d_kv": 16,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "decoder_layers": 4,
    "encoder_layers": 2,
    "layers": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "expert_intermediate_size": 24,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "share_expert_dim": 24,
    "moe_hidden_size": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "first_k_dense_replace": 1,
    "rotary_dim": 8,
    "decoder_dim": 64,
}
DEPTHS = (
    "num_hidden_layers",
    "depth",
    "num_layers",
    "layers",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
)


def names() -> list[str]:
    """Every type of the census, in alphabetical order."""
    return sorted(({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} | {*OTHERS}) - NOT_OURS)


def build(name: str, seed: int = 0, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Build a tiny random model of a type, by default from its `tiny_config`."""
    config = tiny_config(name) if config is None else config
    found = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **OTHERS}[name]
    kind = getattr(hf, found if isinstance(found, str) else found[0])
    with torch.random.fork_rng(devices=[]), no_init_weights():
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config).float().eval()
    model.config.architectures = [kind.__name__]  # as a checkpoint states it
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(BLOCK, generator=generator)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            unused = any(part in label for part in UNUSED) and "vision_moe" not in label  # ERNIE's experts
            if name not in NEED_IMAGES and unused:
                continue
            noise = _noise(parameter, block, generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
            elif label.endswith("bias"):
                parameter.copy_(noise * 0.1)
            else:  # norm gains
                parameter.copy_(1 + noise * 0.1)
    return model


def _noise(parameter: Tensor, block: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of a parameter's shape; large ones, of stacks that are not tested, repeat one block of it."""
    size = parameter.numel()
    if size <= len(block):
        return torch.randn(parameter.shape, generator=generator)
    start = int(torch.randint(len(block), (1,), generator=generator))
    return block.roll(start).repeat(-(-size // len(block)))[:size].view(parameter.shape)


def tiny_config(name: str) -> PreTrainedConfig:
    """A type's default configuration with small sizes."""
    kind = getattr(hf, CONFIG_MAPPING_NAMES[name])
    content = shrunk(kind().to_dict(), text=name in PLAIN)
    for path, value in CHANGES.get(name, {}).items():
        *parents, last = path.split(".")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
    return kind(
        **{key: value for key, value in content.items() if key not in ("model_type", "architectures")}
    )


# Types without a configuration of their own for the language model.
PLAIN = {"fuyu", "git", "phi4_multimodal", "mistral4", "udop", "idefics", "pix2struct"}
TEXTS = (
    "text_config",
    "language_config",
    "llm_config",
    "decoder",
    "decoder_config",
    "thinker_config",
    "text_encoder",
)
_GEMMA4 = {"text_config.per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}}}
_GEMMA4["text_config.layer_types"] = ["sliding_attention", "full_attention"] * 2  # type: ignore[assignment]
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_TEXT_MROPE = {"text_config.rope_parameters": _MROPE}
CHANGES: dict[str, dict[str, Any]] = {
    "kimi_k25": {"text_config.head_dim": 8},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl"), _TEXT_MROPE),
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), _TEXT_MROPE),
    "glm4v_moe": {
        "text_config.rope_parameters": _MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    },
    "qwen2_5_omni_thinker": _TEXT_MROPE | {"vision_start_token_id": 120, "audio_start_token_id": 121},
    "qwen2_5_omni": {
        "thinker_config.text_config.rope_parameters": _MROPE,
        "thinker_config.vision_start_token_id": 120,
        "thinker_config.audio_start_token_id": 121,
        "enable_audio_output": False,
    },
    "step3p7": {"text_config.sliding_window": 4},
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "chameleon": {"vocabulary_map": {"<image>": 100, "<s>": 1}},
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}},
    **{name: {"image_token_index": 100} for name in ("blip-2", "instructblip")},
    "instructblipvideo": {"video_token_index": 100},
    **{name: {"decoder_start_token_id": 0} for name in ("udop", "vision-encoder-decoder")},
    "florence2": {"vision_config.projection_dim": 64},
    "ovis2": {"hidden_size": 64},
    "pp_formulanet": {"vision_config.decoder_hidden_size": 64},
    "pix2struct": {"vision_config.hidden_size": 64, "vision_config.num_attention_heads": 4},
    "mllama": {
        "vision_config.image_size": 56,
        "vision_config.num_global_layers": 1,
        "vision_config.max_num_tiles": 1,
        "vision_config.supported_aspect_ratios": [[1, 1]],
        "vision_config.intermediate_layers_indices": [0],
        "vision_config.vision_output_dim": 2560,
    },
    "cosmos3_edge": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    },
    "deepseek_ocr2": {
        "text_config.num_experts_per_tok": 2,
        "text_config.n_group": 1,
        "text_config.topk_group": 1,
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "diffusion_gemma": _GEMMA4
    | {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 24},
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "gemma3n": {"text_config.intermediate_size": 96, "text_config.activation_sparsity_pattern": [0.0] * 4},
    "cohere_compass": {
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dots3_note": {
        "text_config.per_layer_config": {
            layer: {"num_attention_heads": 2, "num_key_value_heads": 2} for layer in ("1", "3")
        },
        "text_config.num_key_value_heads": 4,
        "text_config.layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "vision_config.per_layer_config": {},
        "vision_config.adapter_out_dim": 64,
        "audio_config.adapter_out_dim": 64,
    },
    "ernie4_5_vl_moe": {
        "text_config.moe_num_experts": 4,
        "text_config.moe_intermediate_size": [24, 24],
        "text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [3, 3, 2],
        },
    },
    "glm5_next": {
        "text_config.index_kpool": 2,
        "text_config.num_key_value_heads": 4,
        "text_config.qk_rope_head_dim": 0,
    },
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "granite_docling": {"vision_config.out_hidden_size": 64},
    "hunyuan_vl": {
        "text_config.head_dim": 16,
        "text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "xdrope_section": [2, 2, 2, 2],
        },
    },
    "inkling2": {"vision_config.text_hidden_size": 64},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1, 2, 3], "text_config.num_key_value_heads": 4},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0], "adapter_config.text_hidden_size": 64},
    "muse_spark": {"audio_config.num_hidden_layers": 4, "text_config.layer_rope_theta": [1e4, 0, 1e4, 1e4]},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120, "audio_start_token_id": 121},
    "qwen3_omni_moe": {
        "thinker_config.vision_start_token_id": 120,
        "thinker_config.audio_start_token_id": 121,
        "enable_audio_output": False,
    },
    "perception_lm": {
        "vision_config.architecture": "vit_pe_core_large_patch14_336",
        "vision_config.model_args": {"embed_dim": 1024, "depth": 1},
    },
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 4,
        "text_config.hc_lowrank": 8,
    },
}


def inputs(name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Nine tokens of text for a model, with an image of noise where it needs one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (1, 9), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    needs = NEED_IMAGES.get(name)
    return started(model, given if needs is None else needs(model, given, generator))


def _pixels(model: PreTrainedModel, generator: torch.Generator, *before: int) -> Tensor:
    config: Any = getattr(model.config, "vision_config", None) or model.config.encoder
    size = getattr(config, "image_size", 64)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(*before, 3, height, width, generator=generator)


def _image(model: PreTrainedModel, given: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return given | {"pixel_values": _pixels(model, generator, 1)}


def _image_alone(
    model: PreTrainedModel, given: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    return {"pixel_values": _pixels(model, generator, 1)}


def _queries(
    model: PreTrainedModel, given: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """An image, or a video of two frames, whose queries are the image tokens at the start of the text."""
    config: Any = model.config
    frames = 2 if "video" in config.model_type else 1
    token = getattr(config, "video_token_index", None) if frames == 2 else config.image_token_index
    image = torch.full((1, frames * config.num_query_tokens), token)
    ids = torch.cat([image, given["input_ids"]], dim=1)
    pixels = _pixels(model, generator, *((1, frames) if frames == 2 else (1,)))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if config.model_type.startswith("instructblip"):
        found["qformer_input_ids"] = given["input_ids"]
    return found


def _florence(
    model: PreTrainedModel, given: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    pixels = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        features = model.get_image_features(pixels).pooler_output
    image = torch.full((1, features.shape[-2]), model.config.image_token_id)
    ids = torch.cat([image, given["input_ids"]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _kosmos(
    model: PreTrainedModel, given: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    config: Any = model.config
    image = torch.full((1, config.latent_query_num), 3)
    ids = torch.cat([given["input_ids"][:, :1], image, given["input_ids"][:, 1:]], dim=1)
    places = torch.zeros_like(ids)
    places[:, 1 : 1 + config.latent_query_num] = 1
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_embeds_position_mask": places}
    if config.model_type == "kosmos-2":
        return found | {"pixel_values": _pixels(model, generator, 1)}
    return found | _patches(model, given, generator) | {"width": torch.ones(1), "height": torch.ones(1)}


def _patches(
    model: PreTrainedModel, given: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Four patches with their row and column, as Pix2Struct's processor gives them."""
    width = next(m.in_features for path, m in model.named_modules() if path.endswith("patch_projection"))
    patches = torch.randn(1, 4, width, generator=generator)
    places = torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])[None]
    return {"flattened_patches": torch.cat([places, patches], dim=2)}


def _boxes(model: PreTrainedModel, given: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return given | {"bbox": torch.rand(1, 9, 4, generator=generator)}


def _crossed(
    model: PreTrainedModel, given: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    return given | {
        "pixel_values": _pixels(model, generator, 1, 1),
        "image_attention_mask": torch.ones(1, 9, 1, dtype=torch.long),
    }


def _tiles(model: PreTrainedModel, given: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    tiles = model.config.vision_config.max_num_tiles
    ones = torch.ones(1, 1, dtype=torch.long)
    return given | {
        "pixel_values": _pixels(model, generator, 1, 1, tiles),
        "aspect_ratio_ids": ones,
        "aspect_ratio_mask": ones[..., None].expand(1, 1, tiles),
        "cross_attention_mask": torch.ones(1, 9, 1, tiles, dtype=torch.long),
    }


Needs = Callable[[PreTrainedModel, dict[str, Tensor], torch.Generator], dict[str, Tensor]]
# Types whose forward pass needs an image, or the places of words in one.
NEED_IMAGES: dict[str, Needs] = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _queries),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), _kosmos),
    **dict.fromkeys(("pp_formulanet", "vision-encoder-decoder"), _image_alone),
    "blip": _image,
    "florence2": _florence,
    "idefics": _crossed,
    "mllama": _tiles,
    "pix2struct": _patches,
    "udop": _boxes,
}


def shrunk(content: dict[str, Any], text: bool) -> dict[str, Any]:
    """Shrink the sizes of a configuration: all of a language model's, the number of layers of others."""
    small: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and "model_type" in value:
            small[key] = shrunk(value, key in TEXTS)
        elif text and key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[key] = SIZES[key]
        elif key in DEPTHS and isinstance(value, int):
            small[key] = min(value, 2)
        elif key == "vocab_size" and isinstance(value, int):
            small[key] = VOCABULARY
        elif (key.endswith("token_id") or key.endswith("token_index")) and isinstance(value, int):
            small[key] = min(value, VOCABULARY - 1 - len(small) % 8)
        elif key in ("eos_token_id", "bos_token_id", "pad_token_id") and isinstance(value, list):
            small[key] = [min(token, VOCABULARY - 9) for token in value]
        elif key == "out_hidden_size" and isinstance(value, int):
            small[key] = 64
        elif key in (
            "layer_types",
            "mlp_layer_types",
            "indexer_types",
            "no_rope_layers",
            "layers_block_type",
            "mlp_only_layers",
        ) and isinstance(value, list):
            continue
        else:
            small[key] = copy.deepcopy(value)
    return small
