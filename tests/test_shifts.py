"""Shifts beside scales, `z -> s * z + b`, compared with plain hooks that change one head at a time."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import plain
import pytest
import torch
from families import Family
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ModelShape, Provenance, digest
from hones_eval.core.attach import attach_steering, steer
from hones_eval.core.changes import row_edits
from hones_eval.core.hooks import editing
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError, MisfitError
from hones_eval.leaderboard.identity import SteeringRef
from hones_eval.leaderboard.pages import _shifts
from hones_eval.leaderboard.scales import Scales, read_scales

RED = Image.new("RGB", (64, 48), "red")


def make(shape: ModelShape, seed: int = 0, base: str = "tiny") -> Steering:
    """Scales and shifts at about half of all heads and neurons."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.rand(shape.layers, *size, generator=generator)

    heads = torch.where(drawn(shape.heads) < 0.5, 2 * drawn(shape.heads), 1.0) * shape.head_mask()
    heads = torch.where(shape.head_mask(), heads, 1.0)
    neurons = torch.where(drawn(shape.neurons) < 0.5, 2 * drawn(shape.neurons), 1.0)
    neurons = torch.where(shape.neuron_mask(), neurons, 1.0)
    added = (drawn(shape.heads, shape.head_width) - 0.5) * (drawn(shape.heads, 1) < 0.5)
    neurons_added = (drawn(shape.neurons) - 0.5) * (drawn(shape.neurons) < 0.5) * shape.neuron_mask()
    return Steering(heads, neurons, Provenance(base, None, shape, "drawn", {}, []), added, neurons_added)


@contextmanager
def plainly(model: PreTrainedModel, *steerings: Steering, only: slice = slice(None)) -> Iterator[None]:
    """Change heads one by one and neurons, at some positions, by hooks of this test's own."""
    handles = []
    for steering in steerings:
        assert steering.head_shifts is not None
        assert steering.neuron_shifts is not None
        for i, layer in enumerate(plain.layers(model)):
            scales, shifts = steering.head_scales[i], steering.head_shifts[i]

            def change_heads(
                _: nn.Module, args: tuple[Tensor], scales: Tensor = scales, shifts: Tensor = shifts
            ) -> tuple[Tensor]:
                x, width = args[0].clone(), args[0].shape[-1] // len(scales)
                for h, (scale, shift) in enumerate(zip(scales, shifts, strict=True)):
                    own = slice(h * width, (h + 1) * width)
                    x[:, only, own] = x[:, only, own] * float(scale) + shift
                return (x,)

            pair = (steering.neuron_scales[i], steering.neuron_shifts[i])

            def change_neurons(
                _: nn.Module, args: tuple[Tensor], pair: tuple[Tensor, Tensor] = pair
            ) -> tuple[Tensor]:
                x = args[0].clone()
                x[:, only] = x[:, only] * pair[0] + pair[1]
                return (x,)

            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(change_heads))
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(change_neurons))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(family: Family) -> Tensor:
    return family.model(**family.inputs("What color is it?", [RED])).logits


def same(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "instructblip"])
def shifted(request: pytest.FixtureRequest, build_family: Callable[[str], Family]) -> Family:
    return build_family(request.param)


def test_hooks_and_folds_add_the_shifts_and_are_removed_bit_for_bit(shifted: Family) -> None:
    steering, base = make(Anatomy.of(shifted.model).shape), logits(shifted)
    names = [name for name, _ in shifted.model.named_parameters()]
    with plainly(shifted.model, steering):
        expected = logits(shifted)
    assert not same(base, expected)
    for how in ("hook", "fold"):
        with steer(shifted.model, steering, how):
            assert same(logits(shifted), expected), how
        assert torch.equal(logits(shifted), base)
        assert [name for name, _ in shifted.model.named_parameters()] == names


def test_shifts_act_on_the_tokens_of_a_scope_alone(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    steering = make(Anatomy.of(family.model).shape)
    with plainly(family.model, steering, only=slice(-1, None)):
        expected = logits(family)
    with steer(family.model, steering, scope="last"):
        assert same(logits(family), expected)


def test_several_act_one_after_the_other(build_family: Callable[[str], Family], tmp_path: Path) -> None:
    """Nested, combined by Python and by name, composed, hooked and folded: always the same."""
    family = build_family("llava")
    shape = Anatomy.of(family.model).shape
    first, second = make(shape, 1), make(shape, 2)
    with plainly(family.model, first.at_strength(0.5), second):
        expected = logits(family)
    base = logits(family)
    first.save(tmp_path / "a")
    second.save(tmp_path / "b")
    together = (
        Steering.combine([(first, 0.5), (second, 1)]),
        Steering.load(f"{tmp_path}/a:0.5+{tmp_path}/b"),
        first.at_strength(0.5).compose(second),
    )
    for steering in together:
        with steer(family.model, steering):
            assert same(logits(family), expected)
    changed = (first.head_scales != 1) | (first.head_shifts != 0).any(-1)  # type: ignore[union-attr]
    both = changed & ((second.head_scales != 1) | (second.head_shifts != 0).any(-1))  # type: ignore[union-attr]
    assert together[0].provenance.settings["heads_scaled_by_several"] == int(both.sum()) > 0
    for how in ("hook", "fold"):
        inner = attach_steering(family.model, first, how, 0.5)
        outer = attach_steering(family.model, second, how)
        assert same(logits(family), expected), how
        inner.detach()
        with plainly(family.model, second):
            alone = logits(family)
        outer.detach()
        assert torch.equal(logits(family), base), how
        assert not same(alone, expected)


def test_rows_of_a_batch_are_shifted_each_by_its_own_steering(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    anatomy = Anatomy.of(family.model)
    first, second = make(anatomy.shape, 1), make(anatomy.shape, 2)
    plain_scales = replace(make(anatomy.shape, 3), head_shifts=None, neuron_shifts=None)
    steerings = [first, plain_scales, second]
    inputs = family.inputs("What color is it?", [RED])
    rows = {name: torch.cat([tensor] * 3) for name, tensor in inputs.items()}
    with torch.no_grad(), editing(row_edits(anatomy, steerings)):
        found = family.model(**rows).logits
    for row, steering in enumerate(steerings):
        with steer(family.model, steering):
            assert same(found[row], logits(family)[0])


def test_files_strengths_and_short_forms(tmp_path: Path) -> None:
    shape = ModelShape(layers=2, heads=3, head_width=4, hidden=8, neurons=5, vocabulary=99)
    steering = make(shape)
    assert steering.head_shifts is not None
    assert steering.neuron_shifts is not None
    steering.save(tmp_path / "s")
    loaded = Steering.load(tmp_path / "s")
    assert torch.equal(loaded.head_shifts, steering.head_shifts)  # type: ignore[arg-type]
    assert torch.equal(loaded.neuron_shifts, steering.neuron_shifts)  # type: ignore[arg-type]
    assert loaded.digest == steering.digest
    half = steering.at_strength(0.5)
    assert torch.equal(half.head_shifts, 0.5 * steering.head_shifts)  # type: ignore[arg-type]
    assert steering.at_strength(0).is_noop
    assert not replace(steering, head_scales=torch.ones(2, 3), neuron_scales=torch.ones(2, 5)).is_noop
    assert "neurons shifted" in repr(steering)
    assert list(steering.to_pandas().columns)[-1] == "shift"
    scaled = replace(steering, head_shifts=torch.zeros(2, 3, 4), neuron_shifts=None)
    assert not scaled.has_shifts
    # Steerings without shifts have the files and digests that they always had.
    assert scaled.digest == digest({"head_scales": scaled.head_scales, "neuron_scales": scaled.neuron_scales})
    scaled.save(tmp_path / "scaled")
    assert not Steering.load(tmp_path / "scaled").has_shifts
    with pytest.raises(MisfitError, match=r"head_shifts has the shape \(2, 3, 5\)"):
        replace(steering, head_shifts=torch.zeros(2, 3, 5))
    with pytest.raises(HonesError, match="neuron_shifts holds values that are not finite"):
        replace(steering, neuron_shifts=torch.full((2, 5), torch.inf))


@pytest.fixture(scope="module")
def with_biases(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA whose `o_proj` and `down_proj` have biases."""
    folder = tmp_path_factory.mktemp("biased") / "llava"
    shutil.copytree(llava_checkpoint, folder)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.attention_bias = config.text_config.mlp_bias = True
    model = AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "language_model" in name and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return folder


def test_an_exported_checkpoint_has_the_shifts_in_its_biases(
    with_biases: Path, tmp_path: Path, build_family: Callable[[str], Family]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(with_biases, dtype=torch.float32).eval()
    steering = make(Anatomy.of(model).shape, base=str(with_biases))
    steering.save(tmp_path / "steering")
    flags = ["--steering", str(tmp_path / "steering"), "--to", "checkpoint", "--out", str(tmp_path / "out")]
    assert main(["export", *flags]) == 0
    inputs = build_family("llava").inputs("What color is it?", [RED])
    with torch.no_grad(), plainly(model, steering):
        expected = model(**inputs).logits
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert same(exported(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("to", "says"), [("checkpoint", "o_proj has no bias in this model's checkpoint"), ("ia3", "cannot hold")]
)
def test_an_export_that_cannot_hold_shifts_is_refused(
    llava_checkpoint: Path, tmp_path: Path, to: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava_checkpoint)
    make(Anatomy.of(model).shape, base=str(llava_checkpoint)).save(tmp_path / "steering")
    flags = ["--steering", str(tmp_path / "steering"), "--to", to, "--out", str(tmp_path / "out")]
    assert main(["export", *flags]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hones-eval:")]
    assert says in line
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_page_of_a_comparison_counts_shifts(tmp_path: Path) -> None:
    """A steering that only shifts scales no head and no neuron, but it is not one that changes nothing."""
    shape = ModelShape(layers=2, heads=4, head_width=2, hidden=8, neurons=6, vocabulary=9)
    made = make(shape)
    steering = replace(made, head_scales=torch.ones(2, 4), neuron_scales=torch.ones(2, 6))
    steering.save(tmp_path / "steering")
    named = SteeringRef(str(tmp_path / "steering"), steering.digest, 1.0, "hook")
    found = read_scales(named, tmp_path / "logs" / "results.json")
    assert isinstance(found, Scales)
    counts = steering.counts
    assert found.shifted == (counts["shifted_heads"], counts["shifted_neurons"])
    (shown,) = _shifts(found)
    assert f"{found.shifted[0]} heads and {found.shifted[1]} neurons get something added" in shown["text"]
    assert _shifts(Scales(found.heads, found.scaled_neurons)) == []
