"""Layouts in which a layer hands on more than one residual stream, or mixes tokens after its attention.

GLM-5 and Gemma 3n have several streams, Qwen4 several side by side, and both GLM-5 and Qwen4 choose tokens by
sparse attention. Inkling has a convolution after each attention, and experts that serve every token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import census
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head, Neuron
from hones_eval.engine.activations import LayerViews, activations
from hones_eval.engine.passes import FullPasses, SiteEdit
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError

# Type: the streams that layers hand on, as [dimensions] of nine tokens, and whether there is one.
STREAMS = {
    "glm5_next": ([1, 9, 4, 64], False),
    "qwen4_exp": ([1, 9, 256], True),
    "inkling_mm_model": ([1, 9, 64], True),
    "nemotron_h_omni": ([1, 9, 64], True),
}
# GLM-5 with layers that take over the tokens which the layer below has chosen.
TAKEN_OVER = "glm5_next, chosen tokens taken over"
STREAMS[TAKEN_OVER] = STREAMS["glm5_next"]
SHARED = 96  # the number of the first neuron of Inkling's shared experts: after 4 routed ones of 24


@cache
def built(name: str) -> tuple[PreTrainedModel, Anatomy]:
    kind = name.partition(",")[0]
    config = census.tiny_config(kind)
    if name == TAKEN_OVER:
        text = config.text_config
        text.layer_types, text.indexer_types = ["indexed_attention"] * 4, ["full", "shared"] * 2
    model = census.build(kind, config=config)
    return model, Anatomy.of(model)


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, args: (change(args[0]),))
    try:
        yield
    finally:
        handle.remove()


def without_head(x: Tensor, head: int, width: int) -> Tensor:
    """One head replaced by the mean of the others, by a loop."""
    heads = list(x.split(width, -1))
    others = [part for i, part in enumerate(heads) if i != head]
    heads[head] = sum(others[1:], others[0]) / len(others)
    return torch.cat(heads, -1)


@pytest.mark.parametrize("name", STREAMS)
def test_replay_equals_plain_hooks_on_every_head(name: str) -> None:
    model, anatomy = built(name)
    inputs, shape = census.inputs(name.partition(",")[0], model), anatomy.shape
    replayer = Replayer(anatomy)
    passes = replayer.record(inputs, 2)
    assert replayer.inexact is None
    edits = [SiteEdit(Head(i, head)) for i in range(shape.layers) for head in range(shape.heads_of(i))]
    assert len(edits) >= 8
    largest = float(passes.base_logits.abs().max())
    for rows in passes.edited(edits):
        for edit, logits in zip(rows.edits, rows.logits, strict=True):
            layer, head = edit.site
            width = shape.head_width_of(layer)
            change = lambda x, head=head, width=width: without_head(x, head, width)  # noqa: E731
            with torch.no_grad(), hooked(anatomy.heads_in[layer].module, change):
                expected = model(**inputs).logits[0, -2:]
            assert float((logits - expected).abs().max()) <= 1e-4 * largest, edit
            assert not torch.equal(expected, passes.base_logits), edit


@pytest.mark.parametrize("name", STREAMS)
def test_replay_equals_hooked_passes_on_neurons(name: str) -> None:
    model, anatomy = built(name)
    inputs, shape = census.inputs(name.partition(",")[0], model), anatomy.shape
    passes, full = Replayer(anatomy).record(inputs, 1), FullPasses(anatomy, inputs, 1)
    layers = [layer for layer in range(shape.layers) if shape.neurons_of(layer)]
    edits = [SiteEdit(Neuron(i, n), "mask") for i in layers for n in (3, shape.neurons_of(i) - 1)]
    expected = {rows.edits[0]: rows.logits[0] for rows in full.edited(edits)}
    largest, changed = float(passes.base_logits.abs().max()), 0
    for rows in passes.edited(edits):
        for edit, logits in zip(rows.edits, rows.logits, strict=True):
            assert float((logits - expected[edit]).abs().max()) <= 1e-4 * largest, edit
            changed += not torch.equal(expected[edit], passes.base_logits)
    assert changed >= len(layers)


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_as_the_model_hands_them_on(name: str) -> None:
    model, anatomy = built(name)
    sizes, one = STREAMS[name]
    seen: list[Tensor] = []
    handle = anatomy.layers[-1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**census.inputs(name.partition(",")[0], model))
    handle.remove()
    assert list(seen[0].shape) == sizes
    assert anatomy.one_stream == one
    assert anatomy.shape.hidden == 64


def test_tracing_and_lens_are_refused_for_several_streams() -> None:
    model, anatomy = built("glm5_next")
    inputs = census.inputs("glm5_next", model)
    for refused in (activations, LayerViews):
        with pytest.raises(HonesError, match=r"several residual streams.*tracing and lens"):
            refused(anatomy, inputs)


@torch.no_grad()
def test_experts_that_serve_every_token_are_those_of_a_plain_loop() -> None:
    """Masking a neuron of Inkling's shared experts, and what it writes, against a loop over experts."""
    model, anatomy = built("inkling_mm_model")
    inputs, layer, expert, unit = census.inputs("inkling_mm_model", model), 1, 1, 5
    shared: Any = anatomy.layers[layer].get_submodule("mlp.shared_experts")
    count, width = shared.down_proj.shape[0], shared.down_proj.shape[2]
    assert anatomy.shape.neurons_of(layer) == SHARED + count * width
    number = SHARED + expert * width + unit
    passes = Replayer(anatomy).record(inputs, 1)
    (rows,) = passes.edited([SiteEdit(Neuron(layer, number), "mask")])
    before = shared.forward

    def plainly(hidden: Tensor, gammas: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for token in range(hidden.shape[1]):
            for i in range(count):
                x = hidden[0, token]
                z = shared.act_fn(shared.gate_proj[i] @ x) * (shared.up_proj[i] @ x)
                if i == expert:
                    z[unit] = 0
                out[0, token] += gammas.reshape(-1, count)[token, i] * (shared.down_proj[i] @ z)
        return out

    shared.forward = plainly
    try:
        expected = model(**inputs).logits[0, -1:]
    finally:
        shared.forward = before
    largest = float(expected.abs().max())
    assert float((rows.logits[0] - expected).abs().max()) <= 1e-4 * largest
    assert not torch.equal(expected, passes.base_logits)
    torch.testing.assert_close(anatomy.down_weight(layer)[:, number], shared.down_proj[expert, :, unit])
