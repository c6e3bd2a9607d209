"""One recipe a family: its configuration, processor, tokenizer and chat template, as small as it allows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers as hf
from family_tokens import make_tokenizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


class Recipe(NamedTuple):
    """What a family is made of. ``in_prompt`` stands for one picture where there is no chat template."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    processor: ProcessorMixin
    in_prompt: str = ""
    several_images: bool = True
    pictures_by_prompt: bool = False  # whether its processor wants a list of pictures for each prompt


def chat_template(picture: str, user: str, assistant: str, after: str) -> str:
    """Give a Jinja chat template: ``user`` and ``assistant`` open a turn, ``after`` closes it."""
    return (
        "{% for message in messages %}"
        f"{{{{ '{assistant}' if message['role'] == 'assistant' else '{user}' }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{{{{ '{picture}' }}}}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        f"{{{{ '{after}' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{assistant}' }}}}{{% endif %}}"
    )


def decoder(tokenizer: PreTrainedTokenizerFast, tied: bool, **changes: Any) -> dict[str, Any]:
    """Give the settings of a small language model, in the names that most families share."""
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**common, **changes}


def llava(tied: bool) -> Recipe:
    tokenizer = make_tokenizer({"image_token": "<image>"}, bos_first=True)
    pictures = hf.CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    processor = hf.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=10,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>\\n", "USER: ", "ASSISTANT:", " "),
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=30, patch_size=10, projection_dim=32),
        text_config=hf.LlamaConfig(**decoder(tokenizer, tied, num_hidden_layers=4, num_key_value_heads=4)),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=9,
        tie_word_embeddings=tied,
    )
    return Recipe(hf.LlavaForConditionalGeneration, config, processor)


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
        chat_template=_im_template(QWEN_PICTURE),
    )
    return Recipe(hf.Qwen2_5_VLForConditionalGeneration, config, processor)


QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    named = {
        "eos_token": "<|im_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    return make_tokenizer(named, others=("<|im_start|>",))


def _im_template(picture: str) -> str:
    turn = chat_template(picture, "<|im_start|>user\\n", "<|im_start|>assistant\\n", "<|im_end|>\\n")
    return turn.replace("'<|im_start|>user\\n'", "'<|im_start|>' + message['role'] + '\\n'")


def _qwen_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def _mrope(section: list[int], **changes: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **changes}


def instructblip(tied: bool) -> Recipe:
    tokenizer = make_tokenizer({}, bos_first=True)
    questions = make_tokenizer({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    pictures = hf.BlipImageProcessor(size={"height": 32, "width": 32})
    # The processor adds the image token to the tokenizer itself.
    processor = hf.InstructBlipProcessor(pictures, tokenizer, questions, num_query_tokens=6)
    config = hf.InstructBlipConfig(
        vision_config={**VISION, "image_size": 32, "patch_size": 16},
        qformer_config={
            **VISION,
            "vocab_size": len(questions),
            "cross_attention_frequency": 1,
            "pad_token_id": questions.pad_token_id,
        },
        text_config=hf.LlamaConfig(**decoder(tokenizer, tied, num_key_value_heads=4)),
        num_query_tokens=6,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Recipe(hf.InstructBlipForConditionalGeneration, config, processor, several_images=False)


def llava_next(tied: bool) -> Recipe:
    tokenizer = make_tokenizer({"image_token": "<image>"}, bos_first=True)
    tiles = [[20, 40], [40, 20]]
    pictures = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}, image_grid_pinpoints=tiles
    )
    processor = hf.LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=10,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>\\n", "USER: ", "ASSISTANT:", " "),
    )
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=20, patch_size=10, projection_dim=32),
        text_config=hf.MistralConfig(**decoder(tokenizer, tied), sliding_window=None),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=tiles,
        tie_word_embeddings=tied,
    )
    return Recipe(hf.LlavaNextForConditionalGeneration, config, processor)


def llava_onevision(tied: bool) -> Recipe:
    named = {"eos_token": "<|im_end|>", "image_token": "<image>", "video_token": "<video>"}
    tokenizer = make_tokenizer(named, others=("<|im_start|>",))
    tiles = [[20, 20], [20, 40], [40, 20]]
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size={"height": 20, "width": 20}, image_grid_pinpoints=tiles),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size={"height": 20, "width": 20}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=_im_template("<image>\\n"),
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=20, patch_size=10, vision_use_head=False),
        text_config=hf.Qwen2Config(**decoder(tokenizer, tied)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=tiles,
        tie_word_embeddings=tied,
    )
    return Recipe(hf.LlavaOnevisionForConditionalGeneration, config, processor)


def qwen2_vl(tied: bool) -> Recipe:
    tokenizer = _qwen_tokenizer()
    config = hf.Qwen2VLConfig(
        text_config=decoder(tokenizer, tied, rope_parameters=_mrope([2, 3, 3])),
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
        **_qwen_token_ids(tokenizer),
        tie_word_embeddings=tied,
    )
    pictures = hf.Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=9 * 28 * 28)
    template = _im_template(QWEN_PICTURE)
    processor = hf.Qwen2VLProcessor(pictures, tokenizer, hf.Qwen2VLVideoProcessor(), chat_template=template)
    return Recipe(hf.Qwen2VLForConditionalGeneration, config, processor)


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
    template = _im_template(QWEN_PICTURE)
    processor = hf.Qwen3VLProcessor(pictures, tokenizer, hf.Qwen3VLVideoProcessor(), chat_template=template)
    return Recipe(hf.Qwen3VLForConditionalGeneration, config, processor)


def internvl(tied: bool) -> Recipe:
    named = {
        "eos_token": "<|im_end|>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(named, others=("<|im_start|>",))
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=hf.Qwen2Config(**decoder(tokenizer, tied)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, min_patches=1, max_patches=3),
        tokenizer,
        hf.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=_im_template("<IMG_CONTEXT>\\n"),
    )
    return Recipe(hf.InternVLForConditionalGeneration, config, processor)


def gemma3(tied: bool) -> Recipe:
    named = {
        "bos_token": "<bos>",
        "eos_token": "<end_of_turn>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = make_tokenizer(named, others=("<start_of_turn>",), bos_first=True)
    text = decoder(tokenizer, tied, hidden_size=48, head_dim=16, query_pre_attn_scalar=16, sliding_window=8)
    text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=32, patch_size=8, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=tied,
    )
    turns = ("<start_of_turn>user\\n", "<start_of_turn>model\\n", "<end_of_turn>\\n")
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=chat_template("<start_of_image>", *turns),
        image_seq_length=4,
    )
    return Recipe(hf.Gemma3ForConditionalGeneration, config, processor, pictures_by_prompt=True)


def paligemma(tied: bool) -> Recipe:
    """PaliGemma 2: Gemma 2 below, with both soft caps and sliding layers."""
    tokenizer = make_tokenizer({"bos_token": "<bos>", "eos_token": "<eos>", "image_token": "<image>"})
    pictures = hf.SiglipImageProcessor(size={"height": 24, "width": 24}, image_seq_length=4)
    processor = hf.PaliGemmaProcessor(pictures, tokenizer)  # adds 1,152 location tokens to the tokenizer
    text = decoder(tokenizer, tied, hidden_size=48, head_dim=16, query_pre_attn_scalar=16, sliding_window=8)
    config = hf.PaliGemmaConfig(
        # Real caps are 50 and 30; these are low enough for a forgotten cap to show in the logits.
        text_config=hf.Gemma2Config(**text, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=24, patch_size=12, vision_use_head=False),
        image_token_index=tokenizer.image_token_id,
        projection_dim=48,
        hidden_size=48,
        tie_word_embeddings=tied,
    )
    return Recipe(hf.PaliGemmaForConditionalGeneration, config, processor, in_prompt="<image>")


def idefics2(tied: bool) -> Recipe:
    named = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}
    tokenizer = make_tokenizer(named, others=("<end_of_utterance>",), bos_first=True)
    config = hf.Idefics2Config(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 6,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        text_config=hf.MistralConfig(**decoder(tokenizer, tied), sliding_window=None),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=tied,
    )
    pictures = hf.Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 32})
    processor = hf.Idefics2Processor(
        pictures, tokenizer, image_seq_len=6, chat_template=_idefics_template("<image>")
    )
    return Recipe(hf.Idefics2ForConditionalGeneration, config, processor)


def idefics3(tied: bool) -> Recipe:
    tokenizer = _idefics_tokenizer()
    config = _idefics_config(hf.Idefics3Config, tokenizer, tied)
    size = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}
    pictures = hf.Idefics3ImageProcessor(**size, do_image_splitting=False)
    template = _idefics_template("<image>")
    processor = hf.Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template)
    return Recipe(hf.Idefics3ForConditionalGeneration, config, processor)


def smolvlm(tied: bool) -> Recipe:
    """SmolVLM with its pictures cut into tiles."""
    tokenizer = _idefics_tokenizer()
    config = _idefics_config(hf.SmolVLMConfig, tokenizer, tied)
    size = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**size),
        tokenizer,
        hf.SmolVLMVideoProcessor(**size),
        image_seq_len=4,
        chat_template=_idefics_template("<image>"),
    )
    return Recipe(hf.SmolVLMForConditionalGeneration, config, processor, pictures_by_prompt=True)


def _idefics_tokenizer() -> PreTrainedTokenizerFast:
    tiles = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    return make_tokenizer(named, others=tiles, bos_first=True)


def _idefics_config(
    kind: type[PreTrainedConfig], tokenizer: PreTrainedTokenizerFast, tied: bool
) -> PreTrainedConfig:
    return kind(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config=hf.LlamaConfig(**decoder(tokenizer, tied)),
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )


def _idefics_template(picture: str) -> str:
    return chat_template(picture, "User:", "Assistant:", "<end_of_utterance>\\n")


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


RECIPES: dict[str, Callable[[bool], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        gemma3,
        paligemma,
        idefics2,
        idefics3,
        smolvlm,
        glm4v,
        instructblip,
    )
}
