"""The small VLM: prompts reach it the same by every road, packing is exact, training reproduces."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hones_eval.toy import CheckpointError, checkpoint_path, drawing, packing, prompts, train
from hones_eval.toy import model as small
from hones_eval.toy.scenes import WORDS, scene

TOPICS = ["describe", "inventory", "caption", "color", "ocr", "retrieval", "is_side", "grounding"]


@pytest.fixture(scope="module")
def processor() -> Any:
    return small.build_processor()


def inputs_of(processor: Any, index: int, prompt: str, answer: str = "") -> Any:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    picture = drawing.to_image(drawing.draw(scene("test", index)))
    return processor(images=[picture], text=f"{text} {answer}", return_tensors="pt")


def test_chat_and_simple_prompts_are_the_same_tokens(processor: Any) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": prompts.OCR}]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    chat = processor.apply_chat_template([{"role": "user", "content": parts}], **options)
    simple = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{prompts.OCR}"}], **options
    )
    assert chat == simple
    assert chat.count("<image>") == 1
    assert chat.endswith("ASSISTANT:")


def test_every_text_of_the_tasks_is_spelled_without_unknowns_and_decodes_to_itself(processor: Any) -> None:
    tokenizer, rng = processor.tokenizer, random.Random(0)
    for index in range(60):
        for topic in train.TOPICS:
            made = prompts.exchange(scene("test", index), topic, rng)  # type: ignore[arg-type]
            if made is None:
                continue
            prompt, answer = (tokenizer(text)["input_ids"] for text in made)
            assert tokenizer.unk_token_id not in prompt + answer
            assert tokenizer.decode(answer) == made.answer
    assert all(tokenizer.decode(tokenizer(word)["input_ids"]) == word for word in WORDS["train"][::7])


def test_answers_are_single_tokens_and_yes_differs_from_no(processor: Any) -> None:
    ids = {word: processor.tokenizer(word)["input_ids"] for word in ("Yes", "No", "red", "circle", "striped")}
    assert all(len(found) == 1 for found in ids.values())
    assert len({found[0] for found in ids.values()}) == len(ids)


def test_a_packed_row_gives_the_logits_of_separate_conversations(processor: Any) -> None:
    model = small.build_model(0).eval()
    batch = packing.Packer(processor).pack([scene("test", 3)], [TOPICS], random.Random(1), width=320)
    assert batch.topics == [TOPICS]
    with torch.no_grad():
        packed, places = packing.answer_logits(model, batch)
    rng, at = random.Random(1), 0
    for topic in TOPICS:
        made = prompts.exchange(scene("test", 3), topic, rng)  # type: ignore[arg-type]
        assert made is not None
        inputs = inputs_of(processor, 3, made.prompt, made.answer + " </s>")
        length = len(processor.tokenizer(made.answer)["input_ids"]) + 1
        with torch.no_grad():
            alone = model(**inputs).logits[0, -length - 1 : -1]
        torch.testing.assert_close(packed[at : at + length], alone, atol=1e-5, rtol=0)
        assert batch.labels[places][at : at + length].tolist() == inputs.input_ids[0, -length:].tolist()
        at += length
    assert at == len(packed)


def test_a_short_training_reproduces_and_logs(tmp_path: Path) -> None:
    settings = {
        "sight_steps": 2,
        "cells_steps": 1,
        "shapes_steps": 1,
        "mixed_steps": 1,
        "judging_steps": 1,
        "tokens": 768,
        "warmup": 1,
        "log_every": 2,
        "measured_images": 32,
    }
    folders = [train.train(train.Settings(out=tmp_path / name, **settings)) for name in ("a", "b")]  # type: ignore[arg-type]
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    untrained = small.build_model(0).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["language_model.lm_head.weight"], untrained["lm_head.weight"])
    rows = (tmp_path / "a" / "training_log.csv").read_text().splitlines()
    assert rows[0].startswith("step,seconds,loss,describe,inventory,caption")
    assert [row.split(",")[0] for row in rows[1:]] == ["2", "4"]


def test_the_shipped_checkpoint_is_a_small_standard_llava() -> None:
    folder = checkpoint_path()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    text = model.config.text_config
    assert (text.model_type, model.config.vision_config.model_type) == ("llama", "clip_vision_model")
    assert (text.num_hidden_layers, text.num_attention_heads, text.intermediate_size) == (6, 8, 344)
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_the_shipped_checkpoint_sees() -> None:
    """With plain transformers: most colours are named, most words are read."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype="auto").eval()
    processor, rng = AutoProcessor.from_pretrained(checkpoint_path()), random.Random(0)
    right = {"color": 0, "ocr": 0}
    for index in range(24):
        for topic in right:
            made = prompts.exchange(scene("test", index), topic, rng)  # type: ignore[arg-type]
            assert made is not None
            inputs = inputs_of(processor, index, made.prompt)
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            said = processor.tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            right[topic] += said == made.answer
    assert right["color"] >= 21
    assert right["ocr"] >= 15


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_path(), folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"has SHA-256 .*, not .*: it was modified or is incomplete"):
        checkpoint_path(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="the bundled toy model has no"):
        checkpoint_path(folder)
