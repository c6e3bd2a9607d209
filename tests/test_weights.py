"""The identity of a model by its weights."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from hones_eval.core import weights
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.attach import steer
from hones_eval.core.digests import weights_differ
from hones_eval.core.steering import Steering
from hones_eval.core.weights import weights_digest


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(300, 500), nn.BatchNorm1d(500), nn.Linear(500, 3))
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return made.to(dtype)


@pytest.fixture(params=["sha256", "sampled"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sampled":
        monkeypatch.setattr(weights, "FULL_BYTES", 0)
        monkeypatch.setattr(weights, "BLOCK", 64)
    return str(request.param)


def test_every_changed_element_changes_the_digest(form: str) -> None:
    made = model()
    before = weights_digest(made)
    assert before.startswith(f"{form}-float32-")
    assert weights_digest(model()) == before
    for name, tensor in made.state_dict().items():
        flat = tensor.view(-1)
        for place in {0, len(flat) // 2, len(flat) // 3, len(flat) - 1}:
            old = flat[place].clone()
            flat[place] += 1
            assert weights_digest(made) != before, (name, place)
            flat[place] = old
    assert weights_digest(made) == before


def test_the_digest_is_of_the_tensors_alone(form: str) -> None:
    made = model()
    compiled = torch.compile(made)
    assert weights_digest(compiled) == weights_digest(made)
    assert weights_digest(made.eval()) == weights_digest(made.train())


def test_another_type_is_another_form_that_cannot_be_compared(form: str) -> None:
    single, half = weights_digest(model()), weights_digest(model(torch.bfloat16))
    assert half.startswith(f"{form}-bfloat16-")
    assert single != half
    assert not weights_differ(single, half)
    assert not weights_differ(single, None)
    assert weights_differ(single, single[:-1] + "x")
    assert not weights_differ(single, single)


def test_tensors_that_are_not_loaded_are_said_to_be_missing() -> None:
    made = model()
    made[2].to("meta")
    assert weights_digest(made).startswith("partial-float32-")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Sizes of the models whose content was read; every digest is kept, in a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "KEPT_BYTES", 0)
    monkeypatch.setattr(weights, "BLOCK", 64)
    sizes: list[int] = []
    compute = weights._digest

    def counting(named: list[tuple[str, torch.Tensor]], size: int) -> str:
        sizes.append(size)
        return compute(named, size)

    monkeypatch.setattr(weights, "_digest", counting)
    return sizes


def saved(folder: Path, values: nn.Module) -> nn.Module:
    """A model as if loaded from a folder, with the weights of another one."""
    folder.mkdir(exist_ok=True)
    save_file({name: value.clone() for name, value in values.state_dict().items()}, folder / "a.safetensors")
    made = model()
    made.load_state_dict(values.state_dict())
    made.name_or_path = str(folder)
    return made


def test_a_digest_is_computed_once_per_checkpoint(read: list[int], tmp_path: Path) -> None:
    first = saved(tmp_path / "model", model())
    digest = weights_digest(first)
    assert weights_digest(first) == digest
    assert len(read) == 1, "kept in memory"
    again = model()
    again.name_or_path = str(tmp_path / "model")
    assert weights_digest(again) == digest
    assert len(read) == 1, "kept in the cache folder, for other processes"
    content = weights.cache_file().read_text()
    weights.cache_file().write_text(content[:-5])
    again = model()
    again.name_or_path = str(tmp_path / "model")
    assert weights_digest(again) == digest
    assert len(read) == 2, "a damaged cache is as good as none"


def test_a_checkpoint_that_was_replaced_is_read_again(read: list[int], tmp_path: Path) -> None:
    first = saved(tmp_path / "model", model())
    digest = weights_digest(first)
    changed = model()
    with torch.no_grad():
        changed[0].weight[250, 150] += 1  # between the blocks that are sampled
    assert weights_digest(saved(tmp_path / "model", changed)) != digest, "another time or size"
    assert len(read) == 2
    path = tmp_path / "model" / "a.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert weights_digest(saved(tmp_path / "model", changed)) != digest
    assert len(read) == 3


def test_a_model_that_was_changed_in_memory_is_read_again(read: list[int], tmp_path: Path) -> None:
    made = saved(tmp_path / "model", model())
    digest = weights_digest(made)
    with torch.no_grad():
        made[0].weight[250, 150] += 1
    # The files are the same, and so may be the sample.
    assert weights_digest(made) != digest


def test_a_folded_steering_changes_the_digest_and_detaching_restores_it(llava_checkpoint: Path) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(llava_checkpoint)
    before = weights_digest(loaded)
    shape = Anatomy.of(loaded).shape
    scales = torch.ones(shape.layers, shape.neurons)
    scales[1, 3] = 0.5
    source = Provenance(str(llava_checkpoint), None, shape, "by hand", {}, [])
    steering = Steering(torch.ones(shape.layers, shape.heads), scales, source)
    with steer(loaded, steering, "fold"):
        assert weights_digest(loaded) != before
    assert weights_digest(loaded) == before
