"""Neurons of mixtures of experts, compared with a plain loop over tokens and experts written here."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import census
import family_doors
import family_moe
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Lfm2VlForConditionalGeneration, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance
from hones_eval.core.attach import attach_steering, steer
from hones_eval.core.edits import Scaling
from hones_eval.core.experts import NeuronTap
from hones_eval.core.export import export_checkpoint, export_ia3
from hones_eval.core.hooks import editing, recording
from hones_eval.core.readouts import write_gain, write_in
from hones_eval.core.sites import Head, Neuron, matched_random
from hones_eval.core.steering import Steering
from hones_eval.engine.passes import FullPasses, SiteEdit
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError, MisfitError, UnsupportedModelError
from hones_eval.jobs.spike_in import shuffled
from hones_eval.lmms.example import Example
from hones_eval.lmms.models import inner_model, load_lmm
from hones_eval.methods import projection
from hones_eval.methods.attribution import Attribution, AttributionSettings

NAMES = ("qwen3_vl_moe", "llama4", "glm4v_moe", "qwen3_5_moe")
IDS = torch.tensor([[7, 21, 33, 50, 64, 71, 80, 90]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
EXPERTS, WIDTH = 4, {"qwen3_vl_moe": 24, "llama4": 96, "glm4v_moe": 24, "qwen3_5_moe": 24}
Change = Callable[[int, Tensor], Tensor]
"""Changes the activations [width] of one expert at one token."""


@pytest.fixture(scope="module", params=NAMES)
def mixture(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, Anatomy]:
    model = built(request.param)
    return request.param, model, Anatomy.of(model)


@torch.no_grad()
def built(name: str) -> PreTrainedModel:
    """A tiny model whose experts write as much into the residual stream as other layers do."""
    model = census.build(name)
    for label, parameter in model.named_parameters():
        if parameter.ndim == 3 and "experts" in label:
            parameter.mul_(parameter.shape[1] ** 0.5)
    return model


def experts_of(model: PreTrainedModel, layer: int) -> nn.Module:
    text = getattr(model, "model", model).language_model
    block = getattr(text, "model", text).layers[layer]
    return (block.feed_forward if hasattr(block, "feed_forward") else block.mlp).experts


@contextmanager
def plain_experts(module: Any, change: Change, written: list[Tensor] | None = None) -> Iterator[None]:
    """Replace experts by a loop over tokens and experts.

    `written` gets the last token's activations, multiplied by the routing weights, of every call.
    """

    def one(x: Tensor, expert: int, weight: Tensor) -> Tensor:
        up_weight, down = module.gate_up_proj[expert], module.down_proj[expert]
        read = x @ up_weight if up_weight.shape[0] == len(x) and down.shape[1] == len(x) else up_weight @ x
        gate, up = read.chunk(2)
        z = change(expert, module.act_fn(gate) * up)
        seen[expert] = seen.get(expert, 0) + weight * z
        return weight * (z @ down if down.shape[0] == len(z) else down @ z)

    seen: dict[int, Any] = {}

    def stacked(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            seen.clear()
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                out[token] += one(hidden[token], expert, weight)
        return out

    def scaled_input(hidden: Tensor) -> Tensor:
        read = hidden.reshape(EXPERTS, -1, hidden.shape[-1])
        out = torch.zeros_like(read)
        for token in range(read.shape[1]):
            seen.clear()
            for expert in range(EXPERTS):
                out[expert, token] = one(read[expert, token], expert, torch.ones(()))
        return out.reshape(hidden.shape)

    def forward(hidden: Tensor, *routing: Tensor) -> Tensor:
        out = stacked(hidden, *routing) if routing else scaled_input(hidden)
        if written is not None:
            width = module.gate_up_proj.shape[1 if routing and module.gate_up_proj.shape[2] == 64 else 2] // 2
            row = [seen.get(expert, torch.zeros(width)) for expert in range(EXPERTS)]
            written.append(torch.cat([x.flatten() for x in row]))
        return out

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(**INPUTS).logits[0]


def test_the_shape_has_experts(mixture: tuple[str, PreTrainedModel, Anatomy]) -> None:
    name, _, anatomy = mixture
    shape = anatomy.shape
    layer = shape.layers - 1
    assert shape.layer_experts is not None
    assert shape.layer_expert_widths is not None
    assert (shape.layer_experts[layer], shape.layer_expert_widths[layer]) == (EXPERTS, WIDTH[name])
    assert shape.expert_of(layer, 2 * WIDTH[name] + 3) == (2, 3)
    shared = shape.neurons_of(layer) - EXPERTS * WIDTH[name]
    assert shared == {"qwen3_vl_moe": 0, "llama4": 96, "glm4v_moe": 24, "qwen3_5_moe": 24}[name]
    assert (shape.expert_of(layer, shape.neurons_of(layer) - 1) is None) == (shared > 0)
    if name == "glm4v_moe":  # its first layer is dense
        assert (shape.layer_experts[0], shape.neurons_of(0)) == (0, 96)


def test_masking_an_experts_neuron(mixture: tuple[str, PreTrainedModel, Anatomy]) -> None:
    name, model, anatomy = mixture
    layer, width = anatomy.shape.layers - 2, WIDTH[name]
    largest = Replayer(anatomy).record(INPUTS, 8).base_neurons()[layer][:, : EXPERTS * width].abs().amax(0)
    changed, worst = 0.0, 0.0
    for number in largest.topk(3).indices.tolist():
        expert, i = divmod(number, width)

        def mask(number: int, z: Tensor, expert: int = expert, i: int = i) -> Tensor:
            keep = torch.ones_like(z)
            keep[i] = float(number != expert)
            return z * keep

        with plain_experts(experts_of(model, layer), mask):
            expected = logits(model)
        edit = SiteEdit(Neuron(layer, expert * width + i), "mask")
        for passes in (FullPasses(anatomy, INPUTS, 8), Replayer(anatomy).record(INPUTS, 8)):
            found = next(iter(passes.edited([edit]))).logits[0]
            assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
            worst = max(worst, float((found - expected).abs().max()))
        changed = max(changed, float((expected - logits(model)).abs().max()))
    assert changed > 20 * worst


def test_scaling_experts_by_a_steering(mixture: tuple[str, PreTrainedModel, Anatomy]) -> None:
    name, model, anatomy = mixture
    layer, width, shape = anatomy.shape.layers - 1, WIDTH[name], anatomy.shape
    scales = torch.ones(shape.layers, shape.neurons)
    scales[layer, : EXPERTS * width] = (
        torch.rand(EXPERTS * width, generator=torch.Generator().manual_seed(1)) * 2
    )
    provenance = Provenance("tiny", None, shape, "by_hand", {}, [ExampleSet("t", "s", 1, 0, "0")])
    steering = Steering(torch.ones(shape.layers, shape.heads), scales, provenance)
    with plain_experts(experts_of(model, layer), lambda e, z: z * scales[layer, e * width : (e + 1) * width]):
        expected = logits(model)
    base = logits(model)
    with steer(model, steering):
        found = logits(model)
    with steer(model, steering, "fold"):
        torch.testing.assert_close(logits(model), found, atol=1e-4 * float(found.abs().max()), rtol=0)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert float((found - base).abs().max()) > 20 * float((found - expected).abs().max())
    assert torch.equal(logits(model), base)


def test_write_in_contributions_have_the_routing_weight(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    name, model, anatomy = mixture
    layer, width = anatomy.shape.layers - 1, WIDTH[name]
    direction = torch.nn.functional.normalize(torch.arange(64.0) - 30, dim=0)
    module = experts_of(model, layer)
    written: list[Tensor] = []
    with plain_experts(module, lambda expert, z: z, written):
        logits(model)
    down = torch.cat(
        [w if w.shape[0] == 64 and w.shape[1] == width else w.T for w in module.down_proj.detach()], dim=1
    )
    expected = written[-1].detach() * (direction @ down)
    z = Replayer(anatomy).record(INPUTS, 1).base_neurons()[layer][0]
    gain = write_gain(anatomy.down_weight(layer), direction)
    torch.testing.assert_close(projection.write_gain(anatomy, layer, direction), gain)
    found = write_in(z, gain)
    torch.testing.assert_close(found[: EXPERTS * width], expected, atol=1e-5, rtol=1e-4)
    routed = found[: EXPERTS * width].reshape(EXPERTS, width).abs().sum(1) > 0
    assert int(routed.sum()) == 2  # top-k


def test_replay_is_exact_for_every_head_and_some_neurons_of_every_expert(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    _, _, anatomy = mixture
    edits = [
        SiteEdit(Head(layer, head)) for layer in range(4) for head in range(anatomy.shape.heads_of(layer))
    ]
    edits += [SiteEdit(Neuron(3, i), "mask") for i in range(0, anatomy.shape.neurons_of(3), 7)]
    replayer = Replayer(anatomy, rows=16)
    replayed = {e: x for rows in replayer.record(INPUTS, 2).edited(edits) for e, x in zip(*rows, strict=True)}
    assert replayer.inexact is None
    plain = {rows.edits[0]: rows.logits[0] for rows in FullPasses(anatomy, INPUTS, 2).edited(edits)}
    worst = max(float((replayed[edit] - plain[edit]).abs().max()) for edit in edits)
    assert worst <= 1e-4 * max(float(x.abs().max()) for x in plain.values())


def test_folding_follows_a_model_that_was_converted(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    """The linear layers that stand for experts must not keep the memory of the old weights."""
    _, single, _ = mixture
    model = copy.deepcopy(single)
    shape = Anatomy.of(model).shape
    scales = torch.rand(shape.layers, shape.neurons, generator=torch.Generator().manual_seed(7)) * 2
    provenance = Provenance("tiny", None, shape, "by_hand", {}, [ExampleSet("t", "s", 1, 0, "0")])
    steering = Steering(torch.ones(shape.layers, shape.heads), scales, provenance)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        base = logits(model)
        with steer(model, steering):
            expected = logits(model)
        with steer(model, steering, "fold"):
            found = logits(model)
        tolerance = 1e-4 if dtype == torch.float32 else 0.08
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
        assert float((found - base).abs().max()) > 0.1 * float(expected.abs().max())


def test_the_model_is_given_back(mixture: tuple[str, PreTrainedModel, Anatomy]) -> None:
    _, model, anatomy = mixture
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    taps = [site.module for site in anatomy.neurons_in if isinstance(site.module, NeuronTap)]
    assert taps
    assert not any(tap._forward_pre_hooks for tap in taps)


def test_padding_on_the_left_changes_no_activation(mixture: tuple[str, PreTrainedModel, Anatomy]) -> None:
    _, _, anatomy = mixture
    edit = [SiteEdit(Neuron(3, 30), "mask"), SiteEdit(Head(1, 2))]
    padded = {
        "input_ids": torch.cat([torch.full((1, 3), 2), IDS], dim=1),
        "attention_mask": torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(IDS)], dim=1),
    }
    alone, behind = (Replayer(anatomy).record(inputs, 1) for inputs in (INPUTS, padded))
    for one, other in zip(alone.base_neurons(), behind.base_neurons(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    for one, other in zip(alone.edited(edit), behind.edited(edit), strict=True):
        torch.testing.assert_close(one.logits, other.logits, atol=1e-3, rtol=1e-3)


def test_random_banks_are_matched_within_experts() -> None:
    shape = ModelShape.of_layers(
        heads=[4, 4],
        head_widths=[16, 16],
        neurons=[96, 4 * 24 + 24],
        experts=[0, 4],
        expert_widths=[0, 24],
        hidden=64,
        vocabulary=128,
    )
    bank = [Neuron(0, 5), Neuron(1, 2 * 24), Neuron(1, 2 * 24 + 1), Neuron(1, 100)]
    for seed in range(20):
        drawn = matched_random(bank, shape, seed)
        assert [neuron.layer for neuron in drawn] == [0, 1, 1, 1]
        assert [shape.expert_of(*neuron) and shape.expert_of(*neuron)[0] for neuron in drawn] == [
            None,
            2,
            2,
            None,
        ]
        assert drawn[0].neuron < 96
        assert 96 <= drawn[3].neuron < 120
        assert not set(drawn) & set(bank)


IMAGE_LIKE = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 0]])
"""Kinds of the tokens of `IDS`, for experts that read images alone."""


@pytest.fixture(scope="module")
def ernie() -> tuple[PreTrainedModel, Anatomy]:
    model = built("ernie4_5_vl_moe")
    return model, Anatomy.of(model)


def test_groups_of_experts_for_text_and_for_images(ernie: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = ernie
    shape = anatomy.shape
    layer = shape.layers - 1
    assert shape.expert_groups(layer) == [(EXPERTS, 24), (EXPERTS, 24)]
    assert shape.expert_of(layer, 24 * EXPERTS + 24 + 5) == (EXPERTS + 1, 5)
    assert shape.alike(layer, 24 * EXPERTS + 24 + 5) == range(24 * (EXPERTS + 1), 24 * (EXPERTS + 2))
    given = INPUTS | {"moe_mm_token_type_ids": IMAGE_LIKE.int(), "mm_token_type_ids": IMAGE_LIKE.int()}
    seen: dict[str, Tensor] = {}
    block = model.model.language_model.layers[layer].mlp
    handles = [
        getattr(block, name).experts.register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, args[1])
        )
        for name in ("text_moe", "vision_moe")
    ]
    base = model(**given, use_cache=False).logits
    for handle in handles:
        handle.remove()
    with recording([anatomy.neurons_in[layer]]) as kept:
        torch.testing.assert_close(model(**given, use_cache=False).logits, base, atol=1e-4, rtol=1e-4)
    z = kept[anatomy.neurons_in[layer].name][0]
    active = z[:, : 24 * 2 * EXPERTS].unflatten(-1, (2 * EXPERTS, 24)).abs().sum(-1) > 0
    expected = torch.zeros(IDS.shape[1], 2 * EXPERTS, dtype=torch.bool)
    for name, kind, first in (("text_moe", 0, 0), ("vision_moe", 1, EXPERTS)):
        places = torch.nonzero(IMAGE_LIKE[0] == kind).flatten()
        for place, experts in zip(places.tolist(), seen[name].tolist(), strict=True):
            expected[place, [first + expert for expert in experts]] = True
    assert torch.equal(active, expected)
    assert int(shape.routed(layer, z)[-1].sum()) == shape.neurons_of(layer) - (2 * EXPERTS - 2) * 24


def test_replay_of_groups_of_experts_is_exact(ernie: tuple[PreTrainedModel, Anatomy]) -> None:
    _, anatomy = ernie
    given = INPUTS | {"moe_mm_token_type_ids": IMAGE_LIKE, "mm_token_type_ids": IMAGE_LIKE}
    edits = [SiteEdit(Head(layer, 1)) for layer in range(4)]
    edits += [SiteEdit(Neuron(3, i), "mask") for i in range(0, anatomy.shape.neurons_of(3), 11)]
    replayer = Replayer(anatomy, rows=8)
    replayed = {e: x for rows in replayer.record(given, 1).edited(edits) for e, x in zip(*rows, strict=True)}
    assert replayer.inexact is None
    plain = {rows.edits[0]: rows.logits[0] for rows in FullPasses(anatomy, given, 1).edited(edits)}
    worst = max(float((replayed[edit] - plain[edit]).abs().max()) for edit in edits)
    assert worst <= 1e-4 * max(float(x.abs().max()) for x in plain.values())


def test_hooks_on_routed_tokens_and_on_all_neurons_agree(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    """A plain hook gets the tensor that a linear layer would read; what is recorded is the same."""
    _, model, anatomy = mixture
    site = anatomy.neurons_in[-1]
    scales = torch.rand(site.width, generator=torch.Generator().manual_seed(2)) * 2
    seen: list[Tensor] = []
    handle = site.module.register_forward_pre_hook(lambda module, args: args[0] * scales)
    after = site.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain = logits(model)
    handle.remove()
    after.remove()
    with (
        editing([(site, Scaling(scales))]),
        recording([site]) as kept,
        recording([site], slice(-2, None)) as few,
    ):
        routed = logits(model)
    torch.testing.assert_close(routed, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept[site.name], seen[-1], atol=1e-6, rtol=1e-6)
    assert torch.equal(few[site.name], kept[site.name][:, -2:])
    assert "forward" not in vars(experts_of(model, anatomy.shape.layers - 1))


def test_shifts_act_on_the_neurons_of_routed_tokens(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    _, model, anatomy = mixture
    site, last = anatomy.neurons_in[-1], anatomy.shape.layers - 1
    added = torch.rand(site.width, generator=torch.Generator().manual_seed(2)) - 0.5
    base = logits(model)
    handle = site.module.register_forward_pre_hook(lambda module, args: args[0] + added)
    plain = logits(model)
    handle.remove()
    shifts = {(last, neuron): shift for neuron, shift in enumerate(added.tolist())}
    steering = Steering.by_hand(anatomy, neuron_shifts=shifts)
    with steer(model, steering):
        torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, base, atol=1e-4)
    with pytest.raises(HonesError, match=r"stacked experts.*no place for the bias.*attach=hook"):
        attach_steering(model, steering, "fold")
    assert torch.equal(logits(model), base)


class _Largest(TorchDispatchMode):
    """Notes the most elements of a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and not output._is_view():
            self.elements = max(self.elements, output.numel())
        return output


def test_memory_grows_with_routed_tokens_and_not_with_experts() -> None:
    tokens, top, width, found = 64, 2, 24, {}
    for experts in (8, 64):
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
        routing = {"num_experts": experts, "num_experts_per_tok": top, "moe_intermediate_size": width}
        config = Qwen3MoeConfig(**sizes, num_key_value_heads=2, head_dim=16, intermediate_size=64, **routing)
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config).eval()
        anatomy = Anatomy.of(model)
        shape = anatomy.shape
        scales = torch.full((shape.layers, shape.neurons), 1.5)
        source = Provenance("tiny", None, shape, "by_hand", {}, [ExampleSet("t", "s", 1, 0, "0")])
        ids = torch.arange(tokens)[None] % 32
        steering = Steering(torch.ones(shape.layers, shape.heads), scales, source)
        kept = recording(anatomy.neurons_in, slice(-1, None))
        with steer(model, steering), kept, torch.no_grad(), _Largest() as largest:
            model(ids, use_cache=False)
        found[experts] = largest.elements
    assert found[64] == found[8]
    assert found[64] < tokens * 64 * width  # the activations of all experts


def test_attribution_of_experts_is_the_gradient_times_the_activation(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    """Compared with the slope of the target's log-probability when one neuron is scaled.

    The step is wide because norms round to float32; one neuron of many is a small change nevertheless.
    """
    name, model, anatomy = mixture
    target, step = [11, 12], 0.5

    def append(inputs: Any, settings: Any, ids: list[int]) -> dict[str, Tensor]:
        longer = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
        return {"input_ids": longer, "attention_mask": torch.ones_like(longer)}

    example = Example(0, "t", "s", 0, INPUTS, {}, "a", ["a"], target, [], "x")
    settings = AttributionSettings("first_order", "log_probability", "example")
    attribution = Attribution(anatomy, append, None, settings, ("heads", "neurons"))
    sums = attribution.measure(example).sums
    layer, width = anatomy.shape.layers - 1, WIDTH[name]
    inputs = append(INPUTS, {}, target[:-1])

    def value(number: int, factor: float) -> float:
        scaled = torch.ones(EXPERTS * width)
        scaled[number] = factor
        change = plain_experts(experts_of(model, layer), lambda e, z: z * scaled[e * width : (e + 1) * width])
        with change, torch.no_grad():
            rows = model(**inputs, use_cache=False).logits[0, -len(target) :].double().log_softmax(-1)
        return sum(float(row[token]) for row, token in zip(rows, target, strict=True))

    for number in sums["neurons"][layer, : EXPERTS * width].topk(3).indices.tolist():
        slope = (value(number, 1 + step) - value(number, 1 - step)) / (2 * step)
        assert float(sums["neurons_signed"][layer, number]) == pytest.approx(slope, rel=0.03, abs=2e-6)
    routed = sums["routed"][layer, : EXPERTS * width].reshape(EXPERTS, width)
    assert bool(((routed == 0) | (routed == 1)).all())
    assert not bool(sums["neurons"][layer, : EXPERTS * width].reshape(EXPERTS, width)[routed == 0].any())
    integrated = AttributionSettings("ig", "log_probability", "example", steps=2)
    estimated = Attribution(anatomy, append, None, integrated, ("neurons",)).measure(example).sums
    assert torch.equal(estimated["routed"], sums["routed"])
    assert bool(torch.isfinite(estimated["neurons"]).all())


def test_attribution_skips_layers_without_heads() -> None:
    """LFM2-VL has short convolutions, whose output projection holds no heads."""
    config = census.tiny_config("lfm2_vl")
    config.text_config.layer_types = ["conv", "full_attention"] * 2
    torch.manual_seed(0)
    anatomy = Anatomy.of(Lfm2VlForConditionalGeneration(config).eval())
    shape = anatomy.shape
    assert shape.layer_heads == [0, 4, 0, 4]
    example = Example(0, "t", "s", 0, INPUTS, {}, "a", ["a"], [11], [], "x")
    attribution = Attribution(anatomy, lambda inputs, settings, ids: dict(inputs), kinds=("heads", "neurons"))
    sums = attribution.measure(example).sums
    assert torch.equal(sums["heads"] > 0, shape.head_mask())
    assert bool(sums["neurons"][shape.neuron_mask()].any())


def test_rows_of_several_lengths_are_steered_as_each_alone(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    """Two prompts in one batch, the shorter one padded on the left; bfloat16 agrees within its rounding."""
    _, model, anatomy = mixture
    shape = anatomy.shape
    generator = torch.Generator().manual_seed(4)
    scales = torch.rand(shape.layers, shape.neurons, generator=generator) + 0.5
    heads = torch.rand(shape.layers, shape.heads, generator=generator) + 0.5
    source = Provenance("tiny", None, shape, "by_hand", {}, [ExampleSet("t", "s", 1, 0, "0")])
    steering = Steering(heads, scales, source)
    short = {"input_ids": IDS[:, 3:], "attention_mask": torch.ones_like(IDS[:, 3:])}
    both = {
        "input_ids": torch.cat([IDS, torch.nn.functional.pad(IDS[:, 3:], (3, 0), value=2)]),
        "attention_mask": torch.tensor([[1] * 8, [0] * 3 + [1] * 5]),
    }
    with torch.no_grad(), steer(model, steering):
        alone = [model(**inputs).logits[0, -1] for inputs in (INPUTS, short)]
        together = model(**both).logits[:, -1]
    for row, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(row, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_scales_of_experts_export_into_the_checkpoint(
    mixture: tuple[str, PreTrainedModel, Anatomy], tmp_path: Path
) -> None:
    name, model, anatomy = mixture
    shape, generator = anatomy.shape, torch.Generator().manual_seed(5)
    source = Provenance("tiny", None, shape, "by_hand", {}, [ExampleSet("t", "s", 1, 0, "0")])
    scales = torch.rand(shape.layers, shape.neurons, generator=generator) + 0.5
    steering = Steering(torch.ones(shape.layers, shape.heads), scales, source)
    with steer(model, steering):
        expected = logits(model)
    base = logits(model)
    export_checkpoint(model, steering, tmp_path / name)
    assert torch.equal(logits(model), base)
    found = logits(type(model).from_pretrained(tmp_path / name).eval())
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    with pytest.raises(HonesError, match="do not fit into an IA3 adapter; use --to checkpoint"):
        export_ia3(model, steering, tmp_path / "ia3")


def test_a_steering_for_other_experts_is_refused_by_name(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    _, model, anatomy = mixture
    shape = anatomy.shape
    assert shape.layer_experts is not None
    assert shape.layer_expert_widths is not None
    halves = [2 * count for count in shape.layer_experts], [width // 2 for width in shape.layer_expert_widths]
    other = dataclasses.replace(shape, layer_experts=halves[0], layer_expert_widths=halves[1])
    source = Provenance("other", None, other, "by_hand", {}, [ExampleSet("t", "s", 1, 0, "0")])
    ones = torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.neurons)
    with pytest.raises(MisfitError, match="experts per layer differ"), steer(model, Steering(*ones, source)):
        pass


def test_experts_that_a_fused_kernel_computes_are_refused_with_the_setting_that_can() -> None:
    model = census.build("qwen3_vl_moe")
    block: Any = model.model.language_model.layers[1].mlp

    def fused(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, index = block.gate(flat)
        return type(block.experts).forward(block.experts, flat, index, weights).reshape(hidden.shape)

    block.forward = fused
    with pytest.raises(
        UnsupportedModelError, match="load it with use_kernels=False and experts_implem"
    ) as it:
        Anatomy.of(model)
    assert "\n" not in str(it.value)


def test_experts_of_quantized_weights_are_refused_with_the_setting_that_can() -> None:
    model = census.build("qwen3_vl_moe")
    for layer in range(4):
        experts: Any = experts_of(model, layer)
        experts.forward = copy.deepcopy(experts).forward  # kernels of their own read the quantized weights
        for name in ("gate_up_proj", "down_proj"):
            quantized = getattr(experts, name).data.to(torch.float8_e4m3fn)
            setattr(experts, name, nn.Parameter(quantized, requires_grad=False))
    with pytest.raises(UnsupportedModelError, match=r"cannot be computed one by one .*: load it unquantized"):
        Anatomy.of(model)


def test_hooks_of_two_anatomies_of_one_model_act_together(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    _, model, anatomy = mixture
    other = Anatomy.of(model)
    layer = anatomy.shape.layers - 1
    first, second = anatomy.neurons_in[layer], other.neurons_in[layer]
    assert first.module is not second.module
    with editing([(first, Scaling(torch.full((first.width,), 3.0)))]):
        expected = logits(model)
    half, sixfold = torch.full((first.width,), 0.5), torch.full((first.width,), 6.0)
    with (
        editing([(first, Scaling(half))]),
        editing([(second, Scaling(sixfold))]),
        recording([second]) as kept,
    ):
        found = logits(model)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert bool(kept[second.name].any())


def test_random_controls_of_a_spike_in_stay_within_their_expert(
    mixture: tuple[str, PreTrainedModel, Anatomy],
) -> None:
    name, _, anatomy = mixture
    shape, width, layer = anatomy.shape, WIDTH[name], anatomy.shape.layers - 1
    scales = torch.ones(shape.layers, shape.neurons)
    scales[layer, width : width + 3] = torch.tensor([2.0, 3.0, 4.0])  # of expert 1
    planted = [Neuron(layer, width), Neuron(layer, width + 5)]
    source = Provenance("tiny", None, shape, "by_hand", {}, [ExampleSet("t", "s", 1, 0, "0")])
    steering = Steering(torch.ones(shape.layers, shape.heads), scales, source)
    for seed in range(5):
        found = shuffled(steering, seed, planted).neuron_scales
        own = found[layer, width : 2 * width]
        assert sorted(own[own != 1].tolist()) == [2.0, 3.0, 4.0]
        assert int((found != 1).sum()) == 3
        assert all(found[neuron] == 1 for neuron in planted)


@pytest.mark.slow
def test_two_images_in_a_batch_padded_on_the_left_through_the_wrapper(tmp_path: Path) -> None:
    """Qwen3-VL-MoE with real prompts: replay, steering and batches agree with single hooked passes."""
    checkpoint = family_moe.save_checkpoint(tmp_path / "qwen3_vl_moe")
    lmm = load_lmm("hones_hf", f"pretrained={checkpoint},dtype=float32")
    questions = [family_doors.BOTH, family_doors.QUESTIONS[1]]
    chats = [family_moe.chat(question) for question in questions]
    model = inner_model(lmm)
    anatomy = Anatomy.of(model)
    shape = anatomy.shape
    assert shape.layer_experts is not None
    steering = family_moe.steering(anatomy)
    alone = [lmm.inputs_of([chat]) for chat in chats]
    together = lmm.inputs_of(chats)
    assert bool((together["attention_mask"] == 0).any())
    edits = [SiteEdit(Head(1, 2)), SiteEdit(Neuron(3, 30), "mask"), SiteEdit(Neuron(2, 90), "mask")]
    for inputs in alone:
        replayer = Replayer(anatomy)
        replayed = torch.cat([rows.logits for rows in replayer.record(inputs, 1).edited(edits)])
        assert replayer.inexact is None
        plain = {rows.edits[0]: rows.logits for rows in FullPasses(anatomy, inputs, 1).edited(edits)}
        order = [edit for rows in replayer.record(inputs, 1).edited(edits) for edit in rows.edits]
        expected = torch.cat([plain[edit] for edit in order])
        assert float((replayed - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    with torch.no_grad():
        with steer(model, steering):
            single = [model(**inputs, use_cache=False).logits[0, -1] for inputs in alone]
            batch = model(**together, use_cache=False).logits[:, -1]
        unsteered = model(**alone[0], use_cache=False).logits[0, -1]
        rounded = copy.deepcopy(model).bfloat16()
        with steer(rounded, steering):
            coarse = rounded(**lmm_cast(alone[0]), use_cache=False).logits[0, -1].float()
    largest = float(single[0].abs().max())
    for row, expected in zip(batch, single, strict=True):
        assert float((row - expected).abs().max()) <= 1e-4 * largest
    assert float((single[0] - unsteered).abs().max()) > 1e-2 * largest
    assert float((coarse - single[0]).abs().max()) <= 0.08 * largest


def lmm_cast(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with images in bfloat16."""
    return {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
