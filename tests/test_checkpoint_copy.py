"""Steered checkpoints are copies: every byte as it was, except the columns that scales change."""

import json
from pathlib import Path

import families
import pytest
import torch
from families import Family
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.attach import steer
from hones_eval.core.steering import Steering


def steering_of(model: torch.nn.Module, base: Path) -> Steering:
    """Scales at every fifth site, drawn from a seed."""
    shape = Anatomy.of(model).shape
    generator = torch.Generator().manual_seed(1)
    heads, neurons = torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.neurons)
    for scales, there in ((heads, shape.head_mask()), (neurons, shape.neuron_mask())):
        chosen = (torch.rand(scales.shape, generator=generator) < 0.2) & there
        scales[chosen] = torch.rand(int(chosen.sum()), generator=generator) * 2
    return Steering(heads, neurons, Provenance(str(base), None, shape, "hones", {"how": "by hand"}, []))


def exported(
    steering: Steering, folder: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, str]:
    """The exported checkpoint, and what the command noted."""
    steering.save(folder / "steering")
    flags = ["--steering", str(folder / "steering"), "--pretrained", str(base), "--to", "checkpoint"]
    capsys.readouterr()
    assert main(["export", *flags, "--out", str(folder / "exported")]) == 0
    return folder / "exported", capsys.readouterr().err


def test_every_family_reloads_with_the_hooked_logits(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = families.save_checkpoint(family.name, tmp_path / family.name)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    steering = steering_of(model, base)
    inputs = family.inputs("What color is the circle?", [Image.new("RGB", (64, 48), "red")])
    with torch.no_grad():
        plain = model(**inputs).logits
        with steer(model, steering):
            expected = model(**inputs).logits
    out, _ = exported(steering, tmp_path, base, capsys)
    reloaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        found = reloaded(**inputs).logits
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert float((plain - expected).abs().max()) > 1e-3 * scale


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A bfloat16 checkpoint in several files, with files that transformers knows nothing of."""
    model = families.build("llava").model
    base = tmp_path / "base"
    model.to(torch.bfloat16).save_pretrained(base, max_shard_size="200KB")
    families.build("llava").processor.save_pretrained(base)
    save_file({"steps": torch.zeros(3, dtype=torch.int64)}, base / "extra.safetensors")  # no weights
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["steps"] = "extra.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "NOTES.txt").write_text("kept")
    (base / "pytorch_model.bin").write_bytes(b"unsteered weights in another format")
    assert len(list(base.glob("*.safetensors"))) > 2
    return base


def test_only_the_scaled_columns_of_a_sharded_checkpoint_differ(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steering = steering_of(AutoModelForImageTextToText.from_pretrained(sharded), sharded)
    out, noted = exported(steering, tmp_path, sharded, capsys)
    assert "loading" not in noted
    assert {path.name for path in out.iterdir()} == {path.name for path in sharded.iterdir()} - {
        "pytorch_model.bin"
    }
    changed = set()
    for path in out.iterdir():
        before = (sharded / path.name).read_bytes()
        if path.suffix != ".safetensors":
            assert path.read_bytes() == before
            continue
        length = int.from_bytes(before[:8], "little")
        assert path.read_bytes()[: 8 + length] == before[: 8 + length], "names, types and order stay"
        old, new = load_file(sharded / path.name), load_file(path)
        changed |= {name for name in old if not torch.equal(old[name], new[name])}
    layers = range(steering.head_scales.shape[0])
    for layer in layers:
        (name,) = [name for name in changed if f"language_model.model.layers.{layer}.mlp." in name] or [""]
        is_scaled = bool((steering.neuron_scales[layer] != 1).any())
        assert name.endswith("down_proj.weight") == is_scaled
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)


def test_weights_that_cannot_be_copied_are_loaded_and_saved(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(sharded)
    steering = steering_of(model, sharded)
    for path in sharded.glob("model*"):
        path.unlink()
    torch.save(model.state_dict(), sharded / "pytorch_model.bin")
    out, noted = exported(steering, tmp_path, sharded, capsys)
    assert "loading the whole model, since its files cannot be copied" in noted
    assert "there are no safetensors weights" in noted
    assert (out / "model.safetensors").is_file()


def test_quantized_and_damaged_checkpoints_are_refused(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steering = steering_of(AutoModelForImageTextToText.from_pretrained(sharded), sharded)
    steering.save(tmp_path / "steering")
    flags = ["export", "--steering", str(tmp_path / "steering"), "--to", "checkpoint"]
    flags += ["--pretrained", str(sharded), "--out", str(tmp_path / "out")]
    config = json.loads((sharded / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "fp8"}}
    (sharded / "config.json").write_text(json.dumps(quantized))
    assert main(flags) == 1
    assert "the weights are quantized (fp8)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (sharded / "config.json").write_text(json.dumps(config))
    some = next(iter(sharded.glob("*.safetensors")))
    some.write_bytes(some.read_bytes()[:100])
    assert main(flags) == 1
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hones-eval:")]
    assert len(line) == 1
    assert some.name in line[0]
    assert not (tmp_path / "out").exists()


def test_a_tied_or_moved_tensor_is_found_by_the_name_that_transformers_gives_it(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint whose tensors have the names of an older transformers."""
    steering = steering_of(AutoModelForImageTextToText.from_pretrained(sharded), sharded)
    for path in sharded.glob("*.safetensors"):
        renamed = {
            name.replace("language_model.model.", "model.language_model."): tensor
            for name, tensor in load_file(path).items()
        }
        save_file(renamed, path, metadata={"format": "pt"})
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("language_model.model.", "model.language_model."))
    before = AutoModelForImageTextToText.from_pretrained(sharded).state_dict()
    out, noted = exported(steering, tmp_path, sharded, capsys)
    assert "loading" not in noted
    after = AutoModelForImageTextToText.from_pretrained(out).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
