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


class Crossed(NamedTuple):
    """A published model whose decoder has cross-attention.

    `layers` are those of the anatomy: `attentions` per decoder layer, one of them with the FFN.
    """

    name: str
    config: PreTrainedConfig
    layers: int
    attentions: int
    heads: int
    width: int
    hidden: int
    ffn: int


def _mllama(layers: int, heads: int, ffn: int) -> PreTrainedConfig:
    crossed = list(range(3, layers, 5))
    text = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
    text |= {"hidden_size": heads * 128, "intermediate_size": ffn, "cross_attention_layers": crossed}
    vision = {"num_hidden_layers": 1, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    return hf.MllamaConfig(text_config=text, vision_config=vision | {"vision_output_dim": 2560})


def _flan_t5(heads: int, width: int, hidden: int, ffn: int) -> PreTrainedConfig:
    text = hf.T5Config(
        d_model=hidden,
        d_kv=width,
        d_ff=ffn,
        num_heads=heads,
        num_layers=24,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return hf.InstructBlipConfig(
        text_config=text, vision_config={"num_hidden_layers": 1}, qformer_config={"num_hidden_layers": 1}
    )


def _florence(layers: int, heads: int, hidden: int) -> PreTrainedConfig:
    sides = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * hidden))
    }
    text = hf.BartConfig(d_model=hidden, **sides)
    return hf.Florence2Config(text_config=text, vision_config={"projection_dim": hidden})


def _idefics(layers: int, heads: int, ffn: int) -> PreTrainedConfig:
    return hf.IdeficsConfig(
        hidden_size=heads * 128,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        cross_layer_interval=4,
        vision_config={"num_hidden_layers": 1},
    )


def _pix2struct(layers: int, heads: int, hidden: int, ffn: int) -> PreTrainedConfig:
    text = {"num_layers": layers, "num_heads": heads, "hidden_size": hidden, "d_ff": ffn, "d_kv": 64}
    vision = {"num_hidden_layers": 1, "hidden_size": hidden, "num_attention_heads": heads}
    return hf.Pix2StructConfig(text_config=text, vision_config=vision)


CROSSED = [
    Crossed("Llama-3.2-11B-Vision", _mllama(40, 32, 14336), 40, 1, 32, 128, 4096, 14336),
    Crossed("Llama-3.2-90B-Vision", _mllama(100, 64, 28672), 100, 1, 64, 128, 8192, 28672),
    Crossed("InstructBLIP-FlanT5-XL", _flan_t5(32, 64, 2048, 5120), 48, 2, 32, 64, 2048, 5120),
    Crossed("InstructBLIP-FlanT5-XXL", _flan_t5(64, 64, 4096, 10240), 48, 2, 64, 64, 4096, 10240),
    Crossed("Florence-2-base", _florence(6, 12, 768), 12, 2, 12, 64, 768, 3072),
    Crossed("Florence-2-large", _florence(12, 16, 1024), 24, 2, 16, 64, 1024, 4096),
    Crossed("IDEFICS-9B", _idefics(32, 32, 11008), 40, 1, 32, 128, 4096, 11008),
    Crossed("IDEFICS-80B", _idefics(80, 64, 22016), 100, 1, 64, 128, 8192, 22016),
    Crossed("Pix2Struct-large", _pix2struct(18, 24, 1536, 3968), 36, 2, 24, 64, 1536, 3968),
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
