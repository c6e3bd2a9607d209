"""The anatomy of full-size models from their configurations, on the meta device."""

import json
import resource
from pathlib import Path

import families
import full_size
import pytest
from full_size import Crossed, Shape
from transformers import LlamaConfig, ViTConfig

import hones_eval as he
from hones_eval.__main__ import main
from hones_eval.api.model_anatomy import report
from hones_eval.core.anatomy import Anatomy
from hones_eval.errors import HonesError


@pytest.mark.parametrize("shape", full_size.SHAPES, ids=lambda shape: shape.name)
def test_published_shapes(shape: Shape) -> None:
    found = report(full_size.configuration(shape), shape.name)
    assert found.unsupported is None
    assert found.layers == shape.layers
    assert found.hidden == shape.hidden
    assert (max(found.experts), max(found.expert_widths)) == (shape.experts, shape.expert_width)
    if shape.kind == "qwen3_5":  # linear and full attention: 48 x 128 and 24 x 256, both 6,144 wide
        assert set(zip(found.heads, found.head_widths, strict=True)) == {(48, 128), (24, 256)}
        assert found.heads[:4] == [48, 48, 48, 24]
    elif shape.kind == "lfm2_vl":  # short convolutions have no heads
        assert set(zip(found.heads, found.head_widths, strict=True)) == {(0, 0), (shape.heads, shape.width)}
    else:
        assert set(zip(found.heads, found.head_widths, strict=True)) == {(shape.heads, shape.width)}
    dense = [n for n, experts in zip(found.neurons, found.experts, strict=True) if not experts]
    assert set(dense) <= {shape.ffn}
    assert bool(dense) == (not shape.experts or shape.kind == "glm4v_moe")


@pytest.mark.parametrize("shape", full_size.CROSSED, ids=lambda shape: shape.name)
def test_published_shapes_with_cross_attention(shape: Crossed) -> None:
    found = report(shape.config, shape.name)
    assert found.unsupported is None
    assert (found.layers, found.hidden) == (shape.layers, shape.hidden)
    assert set(zip(found.heads, found.head_widths, strict=True)) == {(shape.heads, shape.width)}
    pattern = [0] * (shape.attentions - 1) + [shape.ffn]
    assert found.neurons == pattern * (shape.layers // shape.attentions)


def test_large_models_take_no_memory() -> None:
    largest = next(shape for shape in full_size.SHAPES if shape.name == "Qwen3-VL-235B-A22B")
    found = report(full_size.configuration(largest), largest.name)
    assert found.parameters > 230e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # in KiB: 4 GiB
    assert found.recorded_bytes == 94 * (3 * 4096 + 64 * 128) * 2


def test_the_command_shows_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = families.save_checkpoint("qwen2_5_vl", tmp_path / "model")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert main(["anatomy", "--pretrained", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shape = Anatomy.of(families.build("qwen2_5_vl").model).shape
    assert found["heads"] == [shape.heads] * shape.layers
    assert found["neurons"] == [shape.neurons] * shape.layers
    assert (found["hidden"], found["vocabulary"]) == (shape.hidden, shape.vocabulary)
    assert main(["anatomy", "--pretrained", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "heads: 4 per layer, of width 16 per layer" in text
    assert f"{found['parameters'] / 1e6:.1f} million parameters, " in text
    assert f"{found['weight_bytes'] / 2**20:.1f} MiB" in text
    assert repr(he.anatomy(str(folder))) in text


def test_layers_that_differ_are_listed() -> None:
    shape = next(shape for shape in full_size.SHAPES if shape.name == "Qwen3.5-27B")
    lines = report(full_size.configuration(shape), shape.name).lines()
    assert any(line.startswith("heads: 48 (layers 0-2, 4-6, ") for line in lines)


def test_what_is_not_supported_is_said() -> None:
    found = report(families.build_refused("diffusion_gemma").config, "diffusion_gemma")
    assert "not one decoder stack that answers token by token" in str(found.unsupported)
    assert found.lines()[1].startswith("not supported: ")


@pytest.mark.parametrize(
    ("pretrained", "message"), [("nowhere/at all", "no configuration at 'nowhere/at all'")]
)
def test_a_missing_configuration_is_one_line(
    pretrained: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["anatomy", "--pretrained", pretrained]) == 1
    assert message in capsys.readouterr().err


def test_a_configuration_without_a_language_model_is_refused() -> None:
    with pytest.raises(HonesError, match="no model can be made from the configuration of vit"):
        report(ViTConfig(), "vit")


def test_a_language_model_alone_is_reported() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    found = report(config, "llama", "float32")
    assert (found.heads, found.neurons, found.image_token) == ([4, 4], [48, 48], None)
    assert "image token: none" in repr(found)
    with pytest.raises(HonesError, match="'float33' is not a type of weights"):
        report(config, "llama", "float33")
