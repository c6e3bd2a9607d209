"""Tiny random models of every image-text-to-text type, to count those that are served.

A model is built from its type's default configuration with the language model's sizes made small and every
other stack cut to two layers. Images are not shown to these models: the families of `families.py` cover that.
"""

import copy
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

# Types whose generating class is not in that mapping.
OTHERS = {
    "phi4_multimodal": "Phi4MultimodalForCausalLM",
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
}
# Not vision-language models: one reads proteins, the other moves robots.
NOT_OURS = {"evolla", "pi0"}
VOCABULARY = 128

# Sizes of language models by their names in configurations. 4 heads in most.
SIZES = {
    "hidden_size": 64,
    "d_model": 64,
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


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """Build a tiny random model of a type."""
    config = tiny_config(name)
    found = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **OTHERS}[name]
    kind = getattr(hf, found if isinstance(found, str) else found[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            elif label.endswith("bias"):
                parameter.copy_(noise * 0.1)
            else:
                parameter.add_(noise * 0.1)
    return model


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
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"), _TEXT_MROPE),
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), _TEXT_MROPE),
    "glm4v_moe": {
        "text_config.rope_parameters": _MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    },
    "qwen2_5_omni": {"thinker_config.text_config.rope_parameters": _MROPE, "enable_audio_output": False},
    "step3p7": {"text_config.sliding_window": 4},
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "chameleon": {"vocabulary_map": {"<image>": 100, "<s>": 1}},
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}},
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
    "qwen3_omni_moe": {"enable_audio_output": False},
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
