"""Recipes of the Idefics line: Idefics2, Idefics3, SmolVLM."""

import transformers as hf
from family_parts import VISION, Recipe, chat_template, decoder
from family_tokens import make_tokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerFast


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
