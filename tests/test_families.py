"""The tiny models behave as the real families do: pictures count, padding does not, checkpoints load."""

from pathlib import Path

import families
import pytest
import torch
from families import Family
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

SHORT, LONG = "What color is the circle?", "Is it a dog or a cat? Answer with a short phrase."
FEW = "How many?"


def draw(color: str, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse([4, 4, size[0] // 2, size[1] // 2], fill=color)
    return picture


RED, BLUE = draw("red", (64, 48)), draw("blue", (40, 90))


@torch.no_grad()
def logits(family: Family, inputs: dict[str, Tensor]) -> Tensor:
    return family.model(**inputs).logits


def padding_side(family: Family) -> str:
    # InstructBLIP's Q-Former has learned positions, which padding on the left moves.
    return "right" if family.name == "instructblip" else "left"


def test_the_answer_depends_on_the_picture_and_on_the_question(family: Family) -> None:
    by_red, by_blue = (logits(family, family.inputs(SHORT, [picture]))[0, -1] for picture in (RED, BLUE))
    by_question = logits(family, family.inputs(LONG, [RED]))[0, -1]
    assert by_red.isfinite().all()
    assert (by_red - by_blue).abs().max() > 0.05
    assert (by_red - by_question).abs().max() > 0.05


def test_a_padded_row_equals_the_row_alone(family: Family) -> None:
    rows = [(FEW, RED), (LONG, BLUE), (SHORT, RED)]
    texts, pictures = [text for text, _ in rows], [[picture] for _, picture in rows]
    batch = family.inputs(texts, pictures, padding_side=padding_side(family))
    together = logits(family, batch)
    assert (batch["attention_mask"][0] == 0).any()
    for row, (text, picture) in enumerate(rows):
        real = batch["attention_mask"][row].bool()
        alone = logits(family, family.inputs(text, [picture]))[0]
        torch.testing.assert_close(together[row][real], alone, atol=1e-4, rtol=0)


def test_two_pictures_in_one_prompt(family: Family) -> None:
    if not family.several_images:
        with pytest.raises(ValueError, match="one picture a prompt"):
            family.inputs(SHORT, [RED, BLUE])
        return
    one, two, swapped = (family.inputs(SHORT, shown) for shown in ([RED], [RED, BLUE], [BLUE, RED]))
    image_token = family.model.config.image_token_id
    assert (two["input_ids"] == image_token).sum() > (one["input_ids"] == image_token).sum()
    assert (logits(family, two)[0, -1] - logits(family, swapped)[0, -1]).abs().max() > 0.05


def test_greedy_answers_and_the_logits_of_an_appended_answer(family: Family) -> None:
    inputs = family.inputs([SHORT, LONG], [[RED], [BLUE]], padding_side=padding_side(family))
    if padding_side(family) == "right":
        inputs = family.inputs(SHORT, [RED])
    width = inputs["input_ids"].shape[1]
    told = family.model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    answer = told.sequences[:, width:]
    assert answer.shape == (len(inputs["input_ids"]), 4)
    assert not set(answer.flatten().tolist()) & set(family.tokenizer.all_special_ids)
    at_once = logits(family, with_answer(family, inputs, answer))[:, width - 1 : -1]
    torch.testing.assert_close(at_once, torch.stack(told.logits, dim=1), atol=1e-4, rtol=0)


def with_answer(family: Family, inputs: dict[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """Append answer tokens: text of type 0, but PaliGemma's answer is of type 1, its causal suffix."""
    kind = torch.full_like(answer, int(family.name == "paligemma"))
    behind = {
        "input_ids": answer,
        "attention_mask": torch.ones_like(answer),
        "mm_token_type_ids": kind,
        "token_type_ids": kind,
    }
    longer = {name: torch.cat([inputs[name], new], 1) for name, new in behind.items() if name in inputs}
    return {name: value for name, value in {**inputs, **longer}.items() if name != "labels"}


def test_different_prompts_get_different_answers(family: Family) -> None:
    answers = set()
    for text in (SHORT, LONG, FEW):
        for picture in (RED, BLUE):
            inputs = family.inputs(text, [picture])
            width = inputs["input_ids"].shape[1]
            answers.add(tuple(family.model.generate(**inputs, max_new_tokens=3)[0, width:].tolist()))
    assert len(answers) >= 4


def test_a_checkpoint_gives_back_model_and_processor(family: Family, tmp_path: Path) -> None:
    folder = families.save_checkpoint(family.name, tmp_path / family.name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    loaded = Family(family.name, model, processor, family.recipe)
    inputs, again = family.inputs(LONG, [BLUE]), loaded.inputs(LONG, [BLUE])
    assert {key: value.tolist() for key, value in inputs.items()} == {
        key: value.tolist() for key, value in again.items()
    }
    torch.testing.assert_close(logits(loaded, again), logits(family, inputs))


@pytest.mark.parametrize("tied", [True, False])
def test_tied(tied: bool) -> None:
    model = families.build("qwen2_5_vl", tied=tied).model
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_the_seed_decides_the_weights() -> None:
    first, same, other = (families.build("llava", seed=seed) for seed in (3, 3, 4))
    inputs = first.inputs(SHORT, [RED])
    assert torch.equal(logits(first, inputs), logits(same, inputs))
    assert not torch.allclose(logits(first, inputs), logits(other, inputs), atol=0.1)


def test_dtype_and_attention_implementation() -> None:
    fused, plain = (families.build("gemma3", attn_implementation=kind) for kind in ("sdpa", "eager"))
    inputs = fused.inputs(SHORT, [RED])
    torch.testing.assert_close(logits(fused, inputs), logits(plain, inputs), atol=1e-4, rtol=0)
    half = families.build("gemma3", dtype=torch.bfloat16)
    assert half.inputs(SHORT, [RED])["pixel_values"].dtype == half.model.dtype == torch.bfloat16
    assert logits(half, half.inputs(SHORT, [RED])).isfinite().all()


@pytest.mark.parametrize("name", families.REFUSED_NAMES)
def test_refused_families_build(name: str) -> None:
    model = families.build_refused(name)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.config.model_type == name


@pytest.mark.parametrize("name", families.WRAPPERS)
def test_stock_lmms_eval_wrappers_generate(name: str, tmp_path: Path) -> None:
    wrapper, arguments = families.WRAPPERS[name]
    folder = families.save_checkpoint(name, tmp_path / name)
    model = get_model(wrapper).create_from_arg_string(
        f"pretrained={folder},{arguments}", {"batch_size": 1, "device": None}
    )
    documents = [{"text": SHORT, "picture": RED}, {"text": LONG, "picture": BLUE}]
    model.task_dict["circles"] = {"test": documents}
    answers = model.generate_until([request(model, document, i) for i, document in enumerate(documents)])
    texts = [getattr(answer, "text", answer) for answer in answers]
    # Wrappers that catch an exception of generate answer with an empty text.
    assert all(texts)
    assert texts[0] != texts[1]


def request(model: lmms, document: dict[str, object], index: int) -> Instance:
    settings = {"max_new_tokens": 5, "min_new_tokens": 2}
    if model.is_simple:
        arguments = (document["text"], settings, lambda one: [one["picture"]], index, "circles", "test")
    else:
        arguments = (document["text"], as_messages, settings, index, "circles", "test")
    metadata = {"task": "circles", "doc_id": index, "repeats": 1}
    return Instance("generate_until", arguments, index, metadata)


def as_messages(document: dict[str, object]) -> list[dict[str, object]]:
    shown = {"type": "image", "url": document["picture"]}
    return [{"role": "user", "content": [shown, {"type": "text", "text": document["text"]}]}]
