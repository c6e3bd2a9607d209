"""Neurons of mixtures of experts, compared with a plain loop over tokens and experts written here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import census
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance
from hones_eval.core.attach import steer
from hones_eval.core.experts import NeuronTap
from hones_eval.core.readouts import write_gain, write_in
from hones_eval.core.sites import Head, Neuron, matched_random
from hones_eval.core.steering import Steering
from hones_eval.engine.passes import FullPasses, SiteEdit
from hones_eval.engine.replay import Replayer

NAMES = ("qwen3_vl_moe", "llama4", "glm4v_moe", "qwen3_5_moe")
IDS = torch.tensor([[7, 21, 33, 50, 64, 71, 80, 90]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
EXPERTS, WIDTH = 4, {"qwen3_vl_moe": 24, "llama4": 96, "glm4v_moe": 24, "qwen3_5_moe": 24}
Change = Callable[[int, Tensor], Tensor]
"""Changes the activations [width] of one expert at one token."""


@pytest.fixture(scope="module", params=NAMES)
def mixture(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, Anatomy]:
    model = census.build(request.param)
    return request.param, model, Anatomy.of(model)


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
    found = write_in(z, write_gain(anatomy.down_weight(layer), direction))
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
