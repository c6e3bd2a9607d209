"""Steering by hooks and by folding: the same logits, and the model is restored exactly."""

import hashlib
import itertools
import warnings
from collections.abc import Callable
from typing import Literal

import families
import plain
import pytest
import torch
from families import Family
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ModelShape, Provenance
from hones_eval.core.attach import Part, attach_parts, attach_steering, attach_to_anatomy, steer
from hones_eval.core.steering import Steering
from hones_eval.errors import EditError, HonesError, MisfitError

RED = Image.new("RGB", (64, 48), "red")
How = Literal["hook", "fold"]


def make(shape: ModelShape, seed: int = 0) -> Steering:
    """About half of all heads and neurons scaled, by 0 to 2."""
    generator = torch.Generator().manual_seed(seed)

    def scales(sites: int) -> Tensor:
        drawn = 2 * torch.rand(shape.layers, sites, generator=generator)
        return torch.where(torch.rand(drawn.shape, generator=generator) < 0.5, drawn, 1.0)

    provenance = Provenance("org/base", None, shape, "drawn", {}, [])
    return Steering(scales(shape.heads), scales(shape.neurons), provenance)


def fingerprint(model: PreTrainedModel) -> str:
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def logits(family: Family) -> Tensor:
    return family.model(**family.inputs("What color is it?", [RED])).logits.float()


def plainly_steered(family: Family, steering: Steering) -> Tensor:
    """Reference: apply the scales by separate hooks, head by head."""
    handles = []
    for i, layer in enumerate(plain.layers(family.model)):
        heads, neurons = steering.head_scales[i], steering.neuron_scales[i]

        def scale_heads(module: nn.Module, args: tuple[Tensor], heads: Tensor = heads) -> tuple[Tensor]:
            width = args[0].shape[-1] // len(heads)
            parts = [args[0][..., h * width : (h + 1) * width] * float(s) for h, s in enumerate(heads)]
            return (torch.cat(parts, -1),)

        def scale_neurons(module: nn.Module, args: tuple[Tensor], neurons: Tensor = neurons) -> tuple[Tensor]:
            return (args[0] * neurons.to(args[0].dtype),)

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(scale_heads))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(scale_neurons))
    steered = logits(family)
    for handle in handles:
        handle.remove()
    return steered


def test_hook_and_fold_apply_the_scales_and_are_removed_bit_for_bit(family: Family) -> None:
    steering = make(Anatomy.of(family.model).shape)
    before, weights = logits(family), fingerprint(family.model)
    expected = plainly_steered(family, steering)
    assert (expected - before).abs().max() > 0.1
    for how in ("hook", "fold"):
        with steer(family.model, steering, how=how) as attached:
            torch.testing.assert_close(logits(family), expected, atol=1e-4, rtol=1e-4)
            attached.check_ran()
            assert (fingerprint(family.model) == weights) == (how == "hook")
        assert fingerprint(family.model) == weights
        assert torch.equal(logits(family), before)
        assert not any(m._forward_pre_hooks for m in family.model.modules())


@pytest.mark.parametrize("how", ["hook", "fold"])
def test_steering_in_half_precision(how: How) -> None:
    family = families.build("qwen2_5_vl", dtype=torch.bfloat16)
    steering = make(Anatomy.of(family.model).shape)
    before, weights = logits(family), fingerprint(family.model)
    expected = plainly_steered(family, steering)
    with steer(family.model, steering, how=how):
        steered = logits(family)
    assert (steered - expected).abs().max() < 0.08 * expected.abs().max()
    assert (steered - before).abs().max() > 0.2 * expected.abs().max()
    assert fingerprint(family.model) == weights


@pytest.mark.parametrize("how", ["hook", "fold"])
def test_scales_that_rounding_undoes_are_counted_in_a_warning(how: How) -> None:
    family = families.build("llava", dtype=torch.bfloat16)
    shape = Anatomy.of(family.model).shape
    steering = make(shape)
    steering.head_scales.fill_(1)
    steering.neuron_scales.fill_(1)
    steering.neuron_scales[0, :3] = 1.001
    steering.neuron_scales[1, 0] = 1.01
    message = "3 of 4 scales are within 0.002 of 1, where rounding to bfloat16 undoes them"
    with pytest.warns(UserWarning, match=message), steer(family.model, steering, how=how):
        logits(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(family.model, steering, how=how, strength=10):
            logits(family)


@pytest.mark.parametrize("how", ["hook", "fold"])
def test_small_scales_act_in_half_precision(how: How) -> None:
    """A scale of 1.003 rounds to 1 in bfloat16, but the products still change."""
    family = families.build("llava", dtype=torch.bfloat16)
    steering = make(Anatomy.of(family.model).shape)
    steering.head_scales.fill_(1)
    steering.neuron_scales.fill_(1.003)
    before = logits(family)
    with steer(family.model, steering, how=how):
        assert not torch.equal(logits(family), before)


@pytest.mark.parametrize("how", ["hook", "fold"])
def test_strength_scales_the_steering(build_family: Callable[[str], Family], how: How) -> None:
    family = build_family("llava")
    steering = make(Anatomy.of(family.model).shape)
    with steer(family.model, steering, how=how, strength=0.0):
        assert torch.equal(logits(family), plain.forward(family.model, inputs(family)).logits[None])
    half = Steering(
        1 + 0.5 * (steering.head_scales - 1), 1 + 0.5 * (steering.neuron_scales - 1), steering.provenance
    )
    with steer(family.model, steering, how=how, strength=0.5):
        torch.testing.assert_close(logits(family), plainly_without(family, half), atol=1e-4, rtol=1e-4)


def inputs(family: Family) -> dict[str, Tensor]:
    return family.inputs("What color is it?", [RED])


def plainly_without(family: Family, steering: Steering) -> Tensor:
    """`plainly_steered` on a model with the same weights and nothing attached."""
    return plainly_steered(families.build(family.name), steering)


def test_steered_answers_are_the_same_by_hook_and_fold(build_family: Callable[[str], Family]) -> None:
    family = build_family("qwen3_vl")
    item = plain.Item(inputs(family), {"max_new_tokens": 8}, [])
    steering = make(Anatomy.of(family.model).shape)
    answers = []
    for how in ("hook", "fold"):
        with steer(family.model, steering, how=how):
            answers.append(plain.answer(family.model, item))
    assert answers[0] == answers[1] != plain.answer(family.model, item)


def test_two_steerings_at_once_are_their_product(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    shape = Anatomy.of(family.model).shape
    first, second = make(shape, 1), make(shape, 2)
    expected = plainly_steered(family, first.compose(second))
    for hows in (("hook", "hook"), ("fold", "hook"), ("fold", "fold")):
        weights = fingerprint(family.model)
        attached_first = attach_steering(family.model, first, hows[0])
        attached_second = attach_steering(family.model, second, hows[1])
        torch.testing.assert_close(logits(family), expected, atol=1e-4, rtol=1e-4)
        attached_second.detach()
        attached_first.detach()
        assert fingerprint(family.model) == weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folds_are_removed_exactly_in_any_order(dtype: torch.dtype) -> None:
    model = families.build("llava", dtype=dtype).model
    shape, plain_weights = Anatomy.of(model).shape, fingerprint(model)
    steerings = [make(shape, seed) for seed in (1, 2, 3)]
    with steer(model, steerings[1], how="fold"):
        only_second = fingerprint(model)
    for order in itertools.permutations(range(3)):
        attached = [attach_steering(model, steering, "fold") for steering in steerings]
        for i in order:
            attached[i].detach()
            if i == order[1] and order[2] == 1:
                assert fingerprint(model) == only_second
        assert fingerprint(model) == plain_weights


@pytest.mark.parametrize("how", ["hook", "fold"])
def test_the_model_is_restored_after_an_exception(build_family: Callable[[str], Family], how: How) -> None:
    family = build_family("gemma3")
    before, weights = logits(family), fingerprint(family.model)
    with pytest.raises(ZeroDivisionError), steer(family.model, make(Anatomy.of(family.model).shape), how=how):
        raise ZeroDivisionError
    assert fingerprint(family.model) == weights
    assert torch.equal(logits(family), before)


def test_detaching_twice_is_safe(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    weights = fingerprint(family.model)
    for how in ("hook", "fold"):
        attached = attach_steering(family.model, make(Anatomy.of(family.model).shape), how)
        attached.detach()
        attached.detach()
    assert fingerprint(family.model) == weights


def test_a_steering_for_another_model_names_both_sides(build_family: Callable[[str], Family]) -> None:
    llava, gemma = (build_family(name).model for name in ("llava", "gemma3"))
    with pytest.raises(MisfitError) as caught:
        attach_steering(gemma, make(Anatomy.of(llava).shape))
    assert str(caught.value) == (
        "the steering for org/base does not fit Gemma3ForConditionalGeneration "
        "(layers: 4 here, 3 there; hidden: 64 here, 48 there)"
    )


def test_hooks_that_no_forward_pass_reached_are_an_error(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    with steer(family.model, make(Anatomy.of(family.model).shape)) as attached:
        logits(family)
        attached.check_ran()
        with pytest.raises(EditError, match=r"the first at layers\.0\.self_attn\.o_proj"):
            attached.check_ran()


def test_where_one_of_several_steerings_cannot_be_folded_none_is() -> None:
    family = families.build("llava")
    anatomy, before = Anatomy.of(family.model), fingerprint(family.model)
    first, second = (Steering.by_hand(anatomy, neurons={(layer, 5): 0.5}) for layer in (0, 1))
    weight = anatomy.neurons_in[1].module.weight
    anatomy.neurons_in[1].module.weight = nn.Parameter(weight.data.to(torch.float8_e4m3fn), False)
    with pytest.raises(HonesError, match="has quantized weights"):
        attach_parts(anatomy, [Part(first), Part(second)], "fold")
    anatomy.neurons_in[1].module.weight = weight
    assert fingerprint(family.model) == before


def test_fold_refuses_a_weight_that_another_layer_shares() -> None:
    model = families.build("llava").model
    first, second = plain.layers(model)[:2]
    second.mlp.down_proj.weight = first.mlp.down_proj.weight
    weights, steering = fingerprint(model), make(Anatomy.of(model).shape)
    with pytest.raises(
        HonesError, match=r"layers\.0\.mlp\.down_proj.* and .*layers\.1.* are one tensor.*hook"
    ):
        attach_steering(model, steering, "fold")
    assert fingerprint(model) == weights
    attach_steering(model, steering, "hook").detach()


class Packed(nn.Module):
    """A linear layer that stores its weight as integers, as quantizers do."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.step = float(linear.weight.detach().abs().max()) / 127
        packed = (linear.weight / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step)


class PackedLinear(Packed, nn.Linear):
    """The same as a subclass of Linear, as in bitsandbytes."""


@pytest.mark.parametrize("kind", [Packed, PackedLinear])
def test_fold_refuses_quantized_weights_and_hooks_support_them(kind: type[Packed]) -> None:
    family = families.build("llava")
    layer = plain.layers(family.model)[2]
    layer.mlp.down_proj = kind(layer.mlp.down_proj)
    weights, steering = fingerprint(family.model), make(Anatomy.of(family.model).shape)
    with pytest.raises(HonesError, match=r"layers\.2\.mlp\.down_proj has quantized weights.*use attach=hook"):
        attach_steering(family.model, steering, "fold")
    assert fingerprint(family.model) == weights
    expected = plainly_steered(family, steering)
    with steer(family.model, steering, how="hook"):
        torch.testing.assert_close(logits(family), expected, atol=1e-4, rtol=1e-4)


def test_an_unknown_attach_mode_is_refused(build_family: Callable[[str], Family]) -> None:
    anatomy = Anatomy.of(build_family("llava").model)
    with pytest.raises(HonesError, match="attach='glue' is not known: use hook or fold"):
        attach_to_anatomy(anatomy, make(anatomy.shape), "glue")
