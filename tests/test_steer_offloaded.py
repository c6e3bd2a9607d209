"""Steering models whose layers accelerate keeps on disk or in another device's memory."""

from pathlib import Path

import pytest
import torch
from families import build
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import steer
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError

PARTS = ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]
LAYERS = "model.language_model.layers"
SOME_LAYERS = {
    **dict.fromkeys(PARTS[:2], "cpu"),
    **{f"model.language_model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")},
    **{f"{LAYERS}.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)},
    "lm_head": "cpu",
}
EVERYTHING = dict.fromkeys(PARTS, "disk")


def load(checkpoint: Path, folder: Path, device_map: dict[str, str] | None) -> PreTrainedModel:
    where = {} if device_map is None else {"device_map": device_map, "offload_folder": folder}
    return AutoModelForImageTextToText.from_pretrained(checkpoint, **where).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**build("llava").inputs("what is this?", [Image.new("RGB", (30, 30), "red")])).logits


@pytest.mark.parametrize("device_map", [SOME_LAYERS, EVERYTHING], ids=["some layers", "everything"])
def test_hooks_steer_an_offloaded_model(
    llava_checkpoint: Path, tmp_path: Path, device_map: dict[str, str]
) -> None:
    whole = load(llava_checkpoint, tmp_path, None)
    steering = Steering.by_hand(whole, heads={(1, 1): 0.0, (2, 0): 2.0}, neurons={(3, 5): 9.0, (0, 7): 9.0})
    plain = logits(whole)
    with steer(whole, steering):
        expected = logits(whole)
    assert (expected - plain).abs().max() > 0.01
    offloaded = load(llava_checkpoint, tmp_path, device_map)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert Anatomy.of(offloaded).shape == Anatomy.of(whole).shape
    with steer(offloaded, steering):
        torch.testing.assert_close(logits(offloaded), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(offloaded), plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(HonesError, match=r"is offloaded from memory.*use attach=hook"):
        steer(offloaded, steering, how="fold").__enter__()
    torch.testing.assert_close(logits(offloaded), plain, atol=1e-5, rtol=1e-5)
