"""Recipes with three-dimensional positions: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM4V."""

from typing import Any

import transformers as hf
from family_parts import Recipe, chat_template, decoder, im_template
from family_tokens import make_tokenizer
from transformers import PreTrainedTokenizerFast

QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen2_vl(tied: bool) -> Recipe:
    tokenizer = _qwen_tokenizer()
    config = hf.Qwen2VLConfig(
        text_config=decoder(tokenizer, tied, rope_parameters=_mrope([2, 3, 3])),
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=tied,
    )
    pictures = hf.Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=9 * 28 * 28)
    template = im_template(QWEN_PICTURE)
    processor = hf.Qwen2VLProcessor(pictures, tokenizer, hf.Qwen2VLVideoProcessor(), chat_template=template)
    return Recipe(hf.Qwen2VLForConditionalGeneration, config, processor)


def qwen2_5_vl(tied: bool) -> Recipe:
    tokenizer = _qwen_tokenizer()
    text = decoder(tokenizer, tied, num_hidden_layers=4, rope_parameters=_mrope([2, 3, 3]))
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=tied,
    )
    processor = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=9 * 28 * 28),
        tokenizer,
        hf.Qwen2VLVideoProcessor(),
        chat_template=im_template(QWEN_PICTURE),
    )
    return Recipe(hf.Qwen2_5_VLForConditionalGeneration, config, processor)


def qwen3_vl(tied: bool) -> Recipe:
    tokenizer = _qwen_tokenizer()
    rope = _mrope([4, 2, 2], mrope_interleaved=True)
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = hf.Qwen3VLConfig(
        text_config=decoder(tokenizer, tied, num_hidden_layers=4, head_dim=16, rope_parameters=rope),
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=tied,
    )
    pictures = hf.Qwen2VLImageProcessor(patch_size=16, min_pixels=4 * 32 * 32, max_pixels=9 * 32 * 32)
    template = im_template(QWEN_PICTURE)
    processor = hf.Qwen3VLProcessor(pictures, tokenizer, hf.Qwen3VLVideoProcessor(), chat_template=template)
    return Recipe(hf.Qwen3VLForConditionalGeneration, config, processor)


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    named = {
        "eos_token": "<|im_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    return make_tokenizer(named, others=("<|im_start|>",))


def _qwen_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def glm4v(tied: bool) -> Recipe:
    named = {"eos_token": "<|endoftext|>", "image_token": "<|image|>", "video_token": "<|video|>"}
    markers = ("image_start", "image_end", "video_start", "video_end")
    marks = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    tokenizer = make_tokenizer(named, others=(*marks, "<|user|>", "<|assistant|>"))
    rope = _mrope([2, 1, 1], partial_rotary_factor=0.5)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = hf.Glm4vConfig(
        text_config=decoder(tokenizer, tied, rope_parameters=rope),
        vision_config={**vision, "image_size": 56},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark)
            for name, mark in zip(markers, marks, strict=True)
        },
        tie_word_embeddings=tied,
    )
    # Pixels are counted over two copies of a still picture.
    size = {"shortest_edge": 2 * 4 * 28 * 28, "longest_edge": 2 * 9 * 28 * 28}
    template = chat_template(
        "<|begin_of_image|><|image|><|end_of_image|>", "<|user|>\\n", "<|assistant|>\\n", ""
    )
    processor = hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(size=size), tokenizer, hf.Glm4vVideoProcessor(), chat_template=template
    )
    return Recipe(hf.Glm4vForConditionalGeneration, config, processor)


def _mrope(section: list[int], **changes: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **changes}
