"""One recipe a family: its configuration, image processor, tokenizer and chat template, all as small as it allows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers as hf
from family_tokens import make_tokenizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


class Recipe(NamedTuple):
    """What a family is made of. ``in_prompt`` is the text that stands for one picture in a prompt."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    processor: ProcessorMixin
    in_prompt: str
    several_images: bool = True


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
    return Recipe(hf.LlavaForConditionalGeneration, config, processor, "<image>\n")


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
        chat_template=_qwen_template(),
    )
    return Recipe(hf.Qwen2_5_VLForConditionalGeneration, config, processor, QWEN_PICTURE)


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


def _qwen_template() -> str:
    return chat_template(
        QWEN_PICTURE, "<|im_start|>user\\n", "<|im_start|>assistant\\n", "<|im_end|>\\n"
    ).replace("'<|im_start|>user\\n'", "'<|im_start|>' + message['role'] + '\\n'")


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
    return Recipe(
        hf.InstructBlipForConditionalGeneration, config, processor, in_prompt="", several_images=False
    )


RECIPES: dict[str, Callable[[bool], Recipe]] = {
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
    "instructblip": instructblip,
}
