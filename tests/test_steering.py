"""Steerings: their scales, strength, composition and files. The files' own errors: test_ranking."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hones_eval.core import steering as steering_module
from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance, read_json, save_artifact
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError, MisfitError

SHAPE = ModelShape(layers=2, heads=3, head_width=4, hidden=8, neurons=5, vocabulary=99)
EXAMPLES = [ExampleSet("vqa", "dev", 1, 0, "f00d", [0], ["aa"])]


def make(seed: int = 0, shape: ModelShape = SHAPE, **changes: Any) -> Steering:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {
        "head_scales": torch.rand(2, 3, generator=generator),
        "neuron_scales": 2 * torch.rand(2, 5, generator=generator),
    }
    provenance = Provenance(f"org/model{seed}", None, shape, "hones", {"how": "fixed"}, EXAMPLES)
    return Steering(**tensors | {"provenance": provenance} | changes)


def test_a_steering_comes_back_as_it_was(tmp_path: Path) -> None:
    made = make()
    made.head_scales[0] = 1
    made.save(tmp_path / "s")
    loaded = Steering.load(tmp_path / "s")
    assert torch.equal(loaded.head_scales, made.head_scales)
    assert torch.equal(loaded.neuron_scales, made.neuron_scales)
    assert loaded.provenance == made.provenance
    assert loaded.digest == made.digest
    header = read_json(tmp_path / "s" / "steering.json")
    assert (header["scaled_heads"], header["scaled_neurons"]) == (3, 10)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "steering.json",
        "steering.safetensors",
    ]


def test_strength_goes_from_the_baseline_through_the_steering_and_beyond() -> None:
    made = make()
    assert make().at_strength(0).is_noop
    torch.testing.assert_close(made.at_strength(1).neuron_scales, made.neuron_scales)
    beyond = made.at_strength(2.5)
    torch.testing.assert_close(beyond.head_scales, 1 + 2.5 * (made.head_scales - 1))
    torch.testing.assert_close(beyond.neuron_scales, 1 + 2.5 * (made.neuron_scales - 1))
    assert not made.is_noop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_that_rounding_undoes_are_those_that_change_no_number(dtype: torch.dtype) -> None:
    """Every number of the type from 1 to 2, and from -2 to -1, times every scale."""
    numbers = torch.arange(1, 2, torch.finfo(dtype).eps, dtype=torch.float64)
    numbers = torch.cat([numbers, -numbers])
    reach = torch.tensor([0.1, 0.5, 0.999, 1.01, 1.5, 4.0], dtype=torch.float64)
    scales = (1 + torch.cat([reach, -reach, torch.zeros(1)]) * torch.finfo(dtype).eps / 4).float()
    products = (numbers[:, None] * scales.double()).to(dtype).double()
    unfelt = (products == numbers[:, None]).all(0) & (scales != 1)
    assert 0 < int(unfelt.sum()) < len(scales) - 1
    shape = replace(SHAPE, layers=1, neurons=len(scales))
    made = make(shape=shape, head_scales=torch.ones(1, 3), neuron_scales=scales[None])
    assert made.swallowed(dtype) == int(unfelt.sum())
    assert made.swallowed(torch.float32) == 0


def test_both_at_once_is_the_product_and_remembers_both() -> None:
    first, second = make(1), make(2)
    both = first.compose(second)
    assert torch.equal(both.head_scales, first.head_scales * second.head_scales)
    assert torch.equal(both.neuron_scales, first.neuron_scales * second.neuron_scales)
    assert both.provenance.base_model == "org/model1"
    assert both.provenance.settings["composed_with"]["base_model"] == "org/model2"
    assert both.provenance.examples == EXAMPLES * 2


@pytest.mark.parametrize("field", ["layers", "heads", "head_width", "neurons", "hidden"])
def test_a_steering_for_another_shape_names_both_sides(field: str) -> None:
    other = replace(SHAPE, **{field: 77})
    with pytest.raises(MisfitError) as caught:
        make().check_fits(other, "TheirModel")
    here = getattr(SHAPE, field)
    assert str(caught.value) == (
        f"the steering for org/model0 does not fit TheirModel ({field}: {here} here, 77 there)"
    )


def test_another_vocabulary_fits() -> None:
    make().check_fits(replace(SHAPE, vocabulary=3), "TheirModel")


@pytest.mark.parametrize(
    ("name", "shape"), [("head_scales", (3, 2)), ("neuron_scales", (2, 3)), ("head_scales", (2, 3, 1))]
)
def test_scales_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(MisfitError, match=f"{name} has the shape .* its model needs"):
        make(**{name: torch.ones(shape)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(HonesError, match="neuron_scales holds values that are not finite"):
        make(neuron_scales=torch.full((2, 5), value))


def test_a_steering_that_lost_a_tensor_is_refused(tmp_path: Path) -> None:
    save_artifact(tmp_path, "steering", make().provenance, {"head_scales": torch.ones(2, 3)}, {})
    with pytest.raises(HonesError, match=r"holds head_scales and neuron_scales, not .'head_scales'"):
        Steering.load(tmp_path)


def test_equal_scales_have_equal_digests_whoever_made_them() -> None:
    same = make(3, provenance=make(4).provenance)
    assert same.digest == make(3).digest != make(4).digest


def test_what_is_neither_folder_nor_on_the_hub_is_one_line(tmp_path: Path) -> None:
    for path in ("org/no-such-steering", str(tmp_path / "nowhere")):
        with pytest.raises(
            HonesError, match=r"no steering at .*: there is no such folder, and the hub"
        ) as caught:
            Steering.load(path)
        assert "\n" not in str(caught.value)


def test_pushing_uploads_the_two_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is handed to the hub's client is a folder that loads."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Client:
        def create_repo(self, repo_id: str, **kwargs: Any) -> None:
            calls.append((repo_id, kwargs))

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            calls.append((repo_id, {"digest": Steering.load(folder_path).digest}))

    monkeypatch.setattr(steering_module, "HfApi", Client)
    make().push("me/steering")
    assert calls == [
        ("me/steering", {"private": True, "exist_ok": True}),
        ("me/steering", {"digest": make().digest}),
    ]
