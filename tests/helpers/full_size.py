"""Published full-size shapes of vision-language models, from their model cards.

A row has the type and the sizes of the language model: set in its configuration, they have to be found.
`ffn` is the width of a dense FFN, `expert_width` that of each routed expert.
"""

from typing import Any, NamedTuple

import transformers as hf
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


class Shape(NamedTuple):
    """One published model."""

    name: str
    kind: str
    layers: int
    heads: int
    kv_heads: int
    width: int
    hidden: int
    ffn: int
    experts: int = 0
    expert_width: int = 0


SHAPES = [
    Shape("Qwen2-VL-2B", "qwen2_vl", 28, 12, 2, 128, 1536, 8960),
    Shape("Qwen2-VL-7B", "qwen2_vl", 28, 28, 4, 128, 3584, 18944),
    Shape("Qwen2-VL-72B", "qwen2_vl", 80, 64, 8, 128, 8192, 29568),
    Shape("Qwen2.5-VL-3B", "qwen2_5_vl", 36, 16, 2, 128, 2048, 11008),
    Shape("Qwen2.5-VL-7B", "qwen2_5_vl", 28, 28, 4, 128, 3584, 18944),
    Shape("Qwen2.5-VL-32B", "qwen2_5_vl", 64, 40, 8, 128, 5120, 27648),
    Shape("Qwen2.5-VL-72B", "qwen2_5_vl", 80, 64, 8, 128, 8192, 29568),
    Shape("Qwen3-VL-2B", "qwen3_vl", 28, 16, 8, 128, 2048, 6144),
    Shape("Qwen3-VL-4B", "qwen3_vl", 36, 32, 8, 128, 2560, 9728),
    Shape("Qwen3-VL-8B", "qwen3_vl", 36, 32, 8, 128, 4096, 12288),
    Shape("Qwen3-VL-32B", "qwen3_vl", 64, 64, 8, 128, 5120, 25600),
    Shape("Qwen3-VL-30B-A3B", "qwen3_vl_moe", 48, 32, 4, 128, 2048, 6144, 128, 768),
    Shape("Qwen3-VL-235B-A22B", "qwen3_vl_moe", 94, 64, 4, 128, 4096, 12288, 128, 1536),
    Shape("LLaVA-1.5-7B", "llava", 32, 32, 32, 128, 4096, 11008),
    Shape("LLaVA-1.5-13B", "llava", 40, 40, 40, 128, 5120, 13824),
    Shape("LLaVA-NeXT-Mistral-7B", "llava_next", 32, 32, 8, 128, 4096, 14336),
    Shape("LLaVA-NeXT-34B", "llava_next", 60, 56, 8, 128, 7168, 20480),
    Shape("LLaVA-NeXT-72B", "llava_next", 80, 64, 64, 128, 8192, 24576),
    Shape("LLaVA-OneVision-0.5B", "llava_onevision", 24, 14, 2, 64, 896, 4864),
    Shape("LLaVA-OneVision-7B", "llava_onevision", 28, 28, 4, 128, 3584, 18944),
    Shape("LLaVA-OneVision-72B", "llava_onevision", 80, 64, 8, 128, 8192, 29568),
    Shape("InternVL3-1B", "internvl", 24, 14, 2, 64, 896, 4864),
    Shape("InternVL3-2B", "internvl", 28, 12, 2, 128, 1536, 8960),
    Shape("InternVL3-8B", "internvl", 28, 28, 4, 128, 3584, 18944),
    Shape("InternVL3-14B", "internvl", 48, 40, 8, 128, 5120, 13824),
    Shape("InternVL3-38B", "internvl", 64, 40, 8, 128, 5120, 27648),
    Shape("InternVL3-78B", "internvl", 80, 64, 8, 128, 8192, 29568),
    Shape("Gemma-3-4B", "gemma3", 34, 8, 4, 256, 2560, 10240),
    Shape("Gemma-3-12B", "gemma3", 48, 16, 8, 256, 3840, 15360),
    Shape("Gemma-3-27B", "gemma3", 62, 32, 16, 128, 5376, 21504),
    Shape("PaliGemma-3B", "paligemma", 18, 8, 1, 256, 2048, 16384),
    Shape("PaliGemma2-10B", "paligemma", 42, 16, 8, 256, 3584, 14336),
    Shape("PaliGemma2-28B", "paligemma", 46, 32, 16, 128, 4608, 36864),
    Shape("Idefics2-8B", "idefics2", 32, 32, 8, 128, 4096, 14336),
    Shape("Idefics3-8B", "idefics3", 32, 32, 8, 128, 4096, 14336),
    Shape("SmolVLM-2.2B", "smolvlm", 24, 32, 32, 64, 2048, 8192),
    Shape("SmolVLM-256M", "smolvlm", 30, 9, 3, 64, 576, 1536),
    Shape("Mistral-Small-3.1-24B", "mistral3", 40, 32, 8, 128, 5120, 32768),
    Shape("Pixtral-12B", "llava", 40, 32, 8, 128, 5120, 14336),
    Shape("GLM-4.1V-9B", "glm4v", 40, 32, 2, 128, 4096, 13696),
    Shape("GLM-4.5V-106B-A12B", "glm4v_moe", 46, 96, 8, 128, 4096, 10944, 128, 1408),
    Shape("Aya-Vision-8B", "aya_vision", 32, 32, 8, 128, 4096, 14336),
    Shape("Aya-Vision-32B", "aya_vision", 40, 64, 8, 128, 8192, 24576),
    Shape("Video-LLaVA-7B", "video_llava", 32, 32, 32, 128, 4096, 11008),
    Shape("ViP-LLaVA-13B", "vipllava", 40, 40, 40, 128, 5120, 13824),
    Shape("InstructBLIP-Vicuna-7B", "instructblip", 32, 32, 32, 128, 4096, 11008),
    Shape("InstructBLIP-Vicuna-13B", "instructblip", 40, 40, 40, 128, 5120, 13824),
    Shape("GOT-OCR2-580M", "got_ocr2", 24, 16, 16, 64, 1024, 2816),
    Shape("Ovis2-8B", "ovis2", 28, 28, 4, 128, 3584, 18944),
    Shape("Ovis2-34B", "ovis2", 64, 40, 8, 128, 5120, 27648),
    Shape("VideoLLaMA3-7B", "video_llama_3", 28, 28, 4, 128, 3584, 18944),
    Shape("DeepSeek-VL-7B", "deepseek_vl", 30, 32, 32, 128, 4096, 11008),
    Shape("Janus-Pro-7B", "janus", 30, 32, 32, 128, 4096, 11008),
    Shape("Aria-25B", "aria", 28, 20, 20, 128, 2560, 13312, 64, 1664),
    Shape("Llama-4-Scout", "llama4", 48, 40, 8, 128, 5120, 16384, 16, 8192),
    Shape("LFM2-VL-1.6B", "lfm2_vl", 16, 32, 8, 64, 2048, 8192),
    Shape("Qwen3.5-27B", "qwen3_5", 64, 24, 4, 256, 5120, 17408),
    Shape("Chameleon-30B", "chameleon", 48, 64, 8, 128, 8192, 22016),
]
# The language model's own type where the default of the family is another one.
TEXT = {
    "InstructBLIP-Vicuna-7B": "llama",
    "InstructBLIP-Vicuna-13B": "llama",
    "LLaVA-NeXT-Mistral-7B": "mistral",
    "LLaVA-NeXT-72B": "qwen2",
    "Pixtral-12B": "mistral",
    "PaliGemma2-10B": "gemma2",
    "PaliGemma2-28B": "gemma2",
}
PLAIN = {"chameleon"}
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "layers")


def configuration(shape: Shape) -> PreTrainedConfig:
    """The full-size configuration of a row, with a vision tower of one layer."""
    kind = getattr(hf, CONFIG_MAPPING_NAMES[shape.kind])
    default = kind().to_dict()
    sizes: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
    }
    if shape.experts:
        names = ("num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts")
        sizes |= dict.fromkeys(names, shape.experts) | {"moe_intermediate_size": shape.expert_width}
    return kind(**_changed(default, shape, sizes))


def _changed(default: dict[str, Any], shape: Shape, sizes: dict[str, Any]) -> dict[str, Any]:
    if shape.kind in PLAIN:
        return (
            {k: v for k, v in default.items() if k != "model_type"}
            | sizes
            | {"vocabulary_map": {"<image>": 4}}
        )
    content = {key: value for key, value in default.items() if key != "model_type"}
    name = next(key for key in ("text_config", "language_config", "llm_config") if key in content)
    text = dict(content[name])
    if shape.name in TEXT:
        text = getattr(hf, CONFIG_MAPPING_NAMES[TEXT[shape.name]])().to_dict()
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "per_layer_config"):
        text.pop(key, None)
    if shape.kind in ("aria", "llama4"):
        sizes = sizes | {"intermediate_size": shape.expert_width, "intermediate_size_mlp": shape.ffn}
    if shape.kind == "qwen3_5":
        sizes = sizes | {"linear_num_value_heads": 48, "linear_value_head_dim": 128}
    if shape.kind == "lfm2_vl":
        attending = (2, 5, 8, 10, 12, 14)
        types = ["full_attention" if i in attending else "conv" for i in range(shape.layers)]
        sizes = sizes | {"block_auto_adjust_ff_dim": False, "block_ff_dim": shape.ffn, "layer_types": types}
    if "head_dim" not in text and shape.width * shape.heads == shape.hidden:
        del sizes["head_dim"]  # some configurations know none
    content[name] = text | sizes
    vision = content.get("vision_config")
    if isinstance(vision, dict):
        if shape.kind == "aya_vision":
            vision["num_attention_heads"] = 16
        content["vision_config"] = vision | {key: 1 for key in DEPTHS if isinstance(vision.get(key), int)}
    return content
