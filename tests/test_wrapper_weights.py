"""`--dtype`: weights are loaded in the type that is asked for, and not rounded to the wrapper's first."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from hones_eval.api import load
from hones_eval.lmms.examples import inner_model, load_lmm

ON_CPU = "device=cpu,device_map=cpu"


def weights(model: torch.nn.Module) -> torch.Tensor:
    return model.get_parameter("model.language_model.layers.1.mlp.down_proj.weight")


def test_a_wrapper_that_always_loads_bfloat16_loads_the_type_that_is_asked_for(qwen_checkpoint: Path) -> None:
    arguments = f"pretrained={qwen_checkpoint},{ON_CPU}"
    expected = weights(AutoModelForImageTextToText.from_pretrained(qwen_checkpoint, dtype=torch.float32))
    rounded = weights(inner_model(load_lmm("qwen2_5_vl", arguments)))
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(rounded.float(), expected)
    for loaded in (
        inner_model(load_lmm("hones_qwen2_5_vl", arguments, dtype=torch.float32)),
        load("qwen2_5_vl", arguments, dtype="float32").anatomy.model,
    ):
        assert torch.equal(weights(loaded), expected)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_other_models_are_loaded_as_before(qwen_checkpoint: Path) -> None:
    load_lmm("qwen2_5_vl", f"pretrained={qwen_checkpoint},{ON_CPU}", dtype=torch.float32)
    assert weights(AutoModelForImageTextToText.from_pretrained(qwen_checkpoint)).dtype == torch.float32
    again = AutoModelForImageTextToText.from_pretrained(qwen_checkpoint, dtype=torch.bfloat16)
    assert weights(again).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_smaller_types_are_loaded_too(qwen_checkpoint: Path, name: str) -> None:
    dtype = getattr(torch, name)
    loaded = inner_model(load_lmm("qwen2_5_vl", f"pretrained={qwen_checkpoint},{ON_CPU}", dtype=dtype))
    assert weights(loaded).dtype == dtype
