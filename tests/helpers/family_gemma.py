"""Recipes on a SigLIP tower with Gemma below: Gemma 3 and PaliGemma 2."""

import transformers as hf
from family_parts import VISION, Recipe, chat_template, decoder
from family_tokens import make_tokenizer


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
