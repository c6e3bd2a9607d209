"""Steerings: scales, strength, composition, display and files. Errors of the files: test_ranking."""

import doctest
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family
from torch import Tensor

from hones_eval.core import steering as steering_module
from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance, read_json, save_artifact
from hones_eval.core.condition import parse_conditions
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


def test_a_saved_steering_loads_unchanged(tmp_path: Path) -> None:
    steering = make()
    steering.head_scales[0] = 1
    steering.save(tmp_path / "s")
    loaded = Steering.load(tmp_path / "s")
    assert torch.equal(loaded.head_scales, steering.head_scales)
    assert torch.equal(loaded.neuron_scales, steering.neuron_scales)
    assert loaded.provenance == steering.provenance
    assert loaded.digest == steering.digest
    header = read_json(tmp_path / "s" / "steering.json")
    assert (header["scaled_heads"], header["scaled_neurons"]) == (3, 10)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "steering.json",
        "steering.safetensors",
    ]


def test_strength_interpolates_from_the_baseline_and_extrapolates() -> None:
    steering = make()
    assert make().at_strength(0).is_noop
    torch.testing.assert_close(steering.at_strength(1).neuron_scales, steering.neuron_scales)
    beyond = steering.at_strength(2.5)
    torch.testing.assert_close(beyond.head_scales, 1 + 2.5 * (steering.head_scales - 1))
    torch.testing.assert_close(beyond.neuron_scales, 1 + 2.5 * (steering.neuron_scales - 1))
    assert not steering.is_noop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_away_counts_the_scales_that_change_no_number(dtype: torch.dtype) -> None:
    """Multiply every number of the type from 1 to 2, and from -2 to -1, by every scale."""
    numbers = torch.arange(1, 2, torch.finfo(dtype).eps, dtype=torch.float64)
    numbers = torch.cat([numbers, -numbers])
    reach = torch.tensor([0.1, 0.5, 0.999, 1.01, 1.5, 4.0], dtype=torch.float64)
    scales = (1 + torch.cat([reach, -reach, torch.zeros(1)]) * torch.finfo(dtype).eps / 4).float()
    products = (numbers[:, None] * scales.double()).to(dtype).double()
    unfelt = (products == numbers[:, None]).all(0) & (scales != 1)
    assert 0 < int(unfelt.sum()) < len(scales) - 1
    shape = replace(SHAPE, layers=1, neurons=len(scales))
    steering = make(shape=shape, head_scales=torch.ones(1, 3), neuron_scales=scales[None])
    assert steering.rounded_away(dtype) == int(unfelt.sum())
    assert steering.rounded_away(torch.float32) == 0


def test_composing_multiplies_the_scales_and_records_both_sources() -> None:
    first, second = make(1), make(2)
    both = first.compose(second)
    assert torch.equal(both.head_scales, first.head_scales * second.head_scales)
    assert torch.equal(both.neuron_scales, first.neuron_scales * second.neuron_scales)
    assert both.provenance.base_model == "org/model1"
    assert both.provenance.settings["composed_with"]["base_model"] == "org/model2"
    assert both.provenance.examples == EXAMPLES * 2


def test_several_steerings_are_multiplied_each_at_its_strength(tmp_path: Path) -> None:
    first, second = make(1), make(2)
    second = replace(second, provenance=replace(second.provenance, base_model="org/model1"))
    both = Steering.combine([(first, 0.5), (second, 2)])
    for name in ("head_scales", "neuron_scales"):
        a, b = getattr(first, name).double(), getattr(second, name).double()
        expected = (1 + 0.5 * (a - 1)) * (1 + 2 * (b - 1))
        torch.testing.assert_close(getattr(both, name).double(), expected)
    settings = both.provenance.settings
    assert settings["digests"] == [first.digest, second.digest]
    assert [part.rpartition(" ")[2] for part in settings["parts"]] == ["x0.5", "x2"]
    scaled = [(part.head_scales != 1) for part in (first, second)]
    assert settings["heads_scaled_by_several"] == int((scaled[0] & scaled[1]).sum())
    assert both.provenance.examples == EXAMPLES
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, steering in zip(folders, (first, second), strict=True):
        steering.save(folder)
    loaded = Steering.load(f"{folders[0]}:0.5+{folders[1]}:2")
    assert loaded.digest == both.digest
    assert loaded.provenance.settings["parts"] == [f"{folders[0]} x0.5", f"{folders[1]} x2"]
    loaded.save(tmp_path / "both")
    assert Steering.load(tmp_path / "both").digest == both.digest
    assert torch.equal(Steering.load(f"{folders[0]}:0").head_scales, torch.ones_like(first.head_scales))


def test_steerings_that_cannot_be_combined_are_refused(tmp_path: Path) -> None:
    make(1).save(tmp_path / "one")
    with pytest.raises(HonesError, match="there is nothing to combine"):
        Steering.combine([])
    with pytest.raises(HonesError, match="a part has no folder"):
        Steering.load(f"{tmp_path / 'one'}+")
    with pytest.raises(HonesError, match="no steering at"):
        Steering.load(f"{tmp_path / 'one'}+{tmp_path / 'two'}")
    other = make(shape=replace(SHAPE, hidden=77))
    with pytest.raises(MisfitError, match=r"\(hidden: 77 here, \d+ there\)"):
        Steering.combine([(make(1), 1), (other, 1)])
    high = replace(make(1), head_scales=torch.full_like(make(1).head_scales, 5e3))
    with pytest.raises(HonesError, match="together these steerings make a scale of"):
        Steering.combine([(high, 1), (high, 1)])
    with pytest.warns(UserWarning, match="was made for org/model1, but .* for org/model2"):
        Steering.combine([(make(1), 1), (make(2), 1)])


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


def test_a_file_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    save_artifact(tmp_path, "steering", make().provenance, {"head_scales": torch.ones(2, 3)}, {})
    with pytest.raises(HonesError, match=r"holds head_scales and neuron_scales, not .'head_scales'"):
        Steering.load(tmp_path)


def test_equal_scales_have_equal_digests_whatever_their_provenance() -> None:
    same = make(3, provenance=make(4).provenance)
    assert same.digest == make(3).digest != make(4).digest


def test_a_path_that_is_neither_folder_nor_hub_id_is_one_line(tmp_path: Path) -> None:
    for path in ("org/no-such-steering", str(tmp_path / "nowhere")):
        with pytest.raises(
            HonesError, match=r"no steering at .*: there is no such folder, and the hub"
        ) as caught:
            Steering.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strength", [1e38, -1e38, 3e4])
def test_a_strength_that_would_overflow_the_activations_is_refused(strength: float) -> None:
    with pytest.raises(HonesError, match=r"strength=.* makes a scale of .*use a smaller strength"):
        make().at_strength(strength)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_not_finite_is_refused(strength: float) -> None:
    with pytest.raises(HonesError, match="is not a finite number"):
        make().at_strength(strength)


def test_a_steering_by_hand_scales_the_named_sites_only(build_family: Callable[[str], Family]) -> None:
    model = build_family("llava").model
    steering = Steering.by_hand(model, heads={(3, 1): 0.0}, neurons={(2, 12): 2.0, (0, 5): 1.5})
    shape = steering.provenance.shape
    heads, neurons = torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.neurons)
    heads[3, 1], neurons[2, 12], neurons[0, 5] = 0, 2, 1.5
    assert torch.equal(steering.head_scales, heads)
    assert torch.equal(steering.neuron_scales, neurons)
    assert steering.provenance.method == "by hand"
    assert not Steering.by_hand(model, neurons={(2, 12): 2.0}).is_noop


@pytest.mark.parametrize("load", [Steering.load, parse_conditions])
def test_a_name_that_no_folder_can_have_is_an_error_of_one_line(load: Callable[[str], object]) -> None:
    for name in ("x" * 300, f"{'x' * 300}+runs/b"):
        with pytest.raises(HonesError):
            load(name)


@pytest.mark.parametrize("site", [(4, 0), (0, 4), (-1, 0), (0, -1)])
def test_a_head_that_the_model_does_not_have_is_named(
    build_family: Callable[[str], Family], site: tuple[int, int]
) -> None:
    message = f"there is no head {site[0]}.{site[1]}: this model has layers 0 to 3 with heads 0 to 3"
    with pytest.raises(HonesError, match=message):
        Steering.by_hand(build_family("llava").model, heads={site: 0.0})


def test_the_short_forms_say_what_is_scaled() -> None:
    head_scales, neuron_scales = torch.ones(2, 3), torch.ones(2, 5)
    head_scales[1, 2], neuron_scales[0, 1], neuron_scales[1, 4] = 0, 0.5, 2
    provenance = Provenance("org/<model>", None, SHAPE, "hones", {}, EXAMPLES)
    steering = Steering(head_scales, neuron_scales, provenance)
    assert repr(steering) == "Steering(org/<model>: 1 of 6 heads x0, 2 of 10 neurons x0.5 to x2)"
    page = steering._repr_html_()
    assert "org/&lt;model&gt;" in page
    assert "2 of 10 neurons x0.5 to x2" in page
    turned = replace(steering, provenance=replace(provenance, base_model="org/\u202emodel"))
    assert "org/⟨U+202E⟩model" in turned._repr_html_()
    assert "vqa (1)" in page
    assert steering.to_pandas().to_dict("records") == [
        {"kind": "head", "layer": 1, "site": 2, "scale": 0.0},
        {"kind": "neuron", "layer": 0, "site": 1, "scale": 0.5},
        {"kind": "neuron", "layer": 1, "site": 4, "scale": 2.0},
    ]


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(steering_module).failed == 0
