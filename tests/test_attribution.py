"""First-order estimates equal the slope of the target's margin, taken by small steps under a hook."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import plain
import pytest
import torch
from families import Family
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.decoding import Decoder
from hones_eval.engine.replay import Replayer
from hones_eval.errors import TaskError
from hones_eval.methods.first_order import FirstOrder

RED = Image.new("RGB", (64, 48), "white")
ImageDraw.Draw(RED).ellipse([4, 4, 32, 24], fill="red")
TARGET = [11, 12, 13]
STEP = 0.002


@torch.no_grad()
def margin(model: PreTrainedModel, inputs: dict[str, Any], edit: plain.Edit, step: float) -> float:
    """Of the target over the best other token, with one head moved a step of the way to the others' mean."""
    heads = plain.head_count(model)

    def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] + step * (plain.replaced_by_mean(args[0], edit.site, heads) - args[0]),)

    handle = plain.layers(model)[edit.layer].self_attn.o_proj.register_forward_pre_hook(hook)
    try:
        logits = model(**plain.with_answer(model, inputs, TARGET[:-1])).logits[0, -len(TARGET) :]
    finally:
        handle.remove()
    rows = [row.double().tolist() for row in logits]
    return sum(row.pop(token) - max(row) for row, token in zip(rows, TARGET, strict=True))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "instructblip", "gemma3", "smolvlm"])
def test_estimates_are_slopes(name: str, build_family: Callable[[str], Family]) -> None:
    family = build_family(name)
    model = family.model
    learning = [one.requires_grad for one in model.parameters()]
    anatomy = Anatomy.of(model)
    with torch.inference_mode():  # as loops run it, inputs and all
        inputs = {k: v for k, v in family.inputs("What color is it?", [RED]).items() if k != "labels"}
        first_order = FirstOrder(anatomy, Decoder(Replayer(anatomy)).append)
        example: Any = SimpleNamespace(inputs=inputs, target_ids=TARGET, task="t", doc_id=0)
        found = FirstOrder.scores(first_order.measure(example))
    slopes = torch.zeros_like(found)
    for edit in plain.all_heads(model):
        up, down = (margin(model, inputs, edit, step) for step in (STEP, -STEP))
        slopes[edit.layer, edit.site] = abs(up - down) / (2 * STEP)
    assert slopes.abs().max() > 0
    assert (found - slopes).abs().max() <= 0.01 * slopes.abs().max()
    assert [one.requires_grad for one in model.parameters()] == learning
    assert all(one.grad is None for one in model.parameters())


def test_a_target_without_tokens_is_an_error(build_family: Callable[[str], Family]) -> None:
    anatomy = Anatomy.of(build_family("llava").model)
    first_order = FirstOrder(anatomy, Decoder(Replayer(anatomy)).append)
    example: Any = SimpleNamespace(inputs={}, target="", target_ids=[], task="t", doc_id=7)
    with pytest.raises(TaskError, match="t, doc_id 7: its target '' has no tokens"):
        first_order.measure(example)
