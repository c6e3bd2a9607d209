"""Recipes with a LLaVA-like connector: LLaVA, LLaVA-NeXT, LLaVA-OneVision, InternVL; and InstructBLIP."""

import transformers as hf
from family_parts import VISION, Recipe, chat_template, decoder, im_template
from family_tokens import make_tokenizer


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
        chat_template=im_template("<image>\\n"),
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
        chat_template=im_template("<IMG_CONTEXT>\\n"),
    )
    return Recipe(hf.InternVLForConditionalGeneration, config, processor)


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
