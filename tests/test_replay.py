"""Replayed passes equal plain hooked forwards, in every family; where they cannot, full forwards are used."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import families
import plain
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import Family
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.core import proofs as proofs_module
from hones_eval.core import weights
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.proofs import Proofs, cache_file
from hones_eval.core.sites import Head, Neuron
from hones_eval.engine import replay as replay_module
from hones_eval.engine.ahead import AheadPasses
from hones_eval.engine.encoders import encoded_once
from hones_eval.engine.passes import FullPasses, Passes, RowLimit, SiteEdit, edit_rows, replaced_by_mean
from hones_eval.engine.replay import Replay, Replayer
from hones_eval.errors import HonesError


def draw(colour: str, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse([4, 4, size[0] // 2, size[1] // 2], fill=colour)
    return picture


RED, BLUE = draw("red", (64, 48)), draw("blue", (40, 90))
READ = 3
SHORT, LONG = "What color is it?", "Is it a dog or a cat? Answer with a short phrase, please."


def example(family: Family, pictures: int = 1, text: str = SHORT) -> dict[str, Tensor]:
    made = family.inputs(text, [RED, BLUE][:pictures])
    return {name: value for name, value in made.items() if name != "labels"}


def padded(family: Family) -> dict[str, Tensor]:
    """One example with padding in front, as its processor pads it beside a longer one."""
    side = "right" if family.name == "instructblip" else "left"
    alone = example(family)
    if side == "right":  # in this family padding stands behind the picture tokens, in front of the text
        return _padded_instructblip(family, alone)
    both = family.inputs([LONG, SHORT], [[RED], [RED]], padding_side=side)
    width = alone["input_ids"].shape[1]
    row = {name: value[1:] for name, value in both.items() if name in ("input_ids", "attention_mask")}
    row |= {name: value[1:] for name, value in both.items() if name.endswith("token_type_ids")}
    assert row["input_ids"].shape[1] > width
    return alone | row


def _padded_instructblip(family: Family, alone: dict[str, Tensor]) -> dict[str, Tensor]:
    text = (alone["input_ids"][0] != family.model.config.image_token_id).nonzero()[0].item()
    pads = torch.full((1, 4), family.tokenizer.pad_token_id)
    ids = torch.cat([alone["input_ids"][:, :text], pads, alone["input_ids"][:, text:]], 1)
    mask = torch.ones_like(ids)
    mask[:, text : text + 4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return alone | {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def means_of(model: PreTrainedModel) -> list[SiteEdit]:
    return replaced_by_mean([Head(edit.layer, edit.site) for edit in plain.all_heads(model)])


def zeros_of(model: PreTrainedModel) -> list[SiteEdit]:
    """Every other head and a few neurons, in every layer."""
    depth, heads = len(plain.layers(model)), plain.head_count(model)
    sites = [Head(layer, head) for layer in range(depth) for head in range(layer % 2, heads, 2)]
    neurons = [Neuron(layer, neuron) for layer in range(depth) for neuron in (0, 41)]
    return [*(SiteEdit(one, "zero") for one in sites), *(SiteEdit(one, "mask") for one in neurons)]


def plainly(edit: SiteEdit) -> plain.Edit:
    kinds = {"mean": "mean", "zero": "zero head", "mask": "zero neuron"}
    return plain.Edit(*edit.site, kinds[edit.how])


class Everything:
    """All that passes give: logits by edit, and FFN activations by edit and layer."""

    def __init__(self, passes: Passes, edits: list[SiteEdit]) -> None:
        self.edits = edits
        self.base_logits, self.base_neurons = passes.base_logits, passes.base_neurons()
        self.logits: dict[SiteEdit, Tensor] = {}
        self.neurons: dict[tuple[SiteEdit, int], Tensor] = {}
        self.cuts: list[int] = []

        def keep(layer: int, rows: Tensor, activations: Tensor) -> None:
            for row, activation in zip(rows.tolist(), activations, strict=True):
                self.neurons[edits[row], layer] = activation

        for rows in passes.edited(edits, keep):
            self.cuts.append(len(rows.edits))
            self.logits |= dict(zip(rows.edits, rows.logits, strict=True))


def agree(model: PreTrainedModel, inputs: Mapping[str, Any], found: Everything, tolerance: float) -> None:
    """Everything equals plain passes, relative to the largest of its kind."""
    base = plain.forward(model, inputs)
    close(found.base_logits, base.logits[-READ:], tolerance)
    for mine, theirs in zip(found.base_neurons, base.neurons, strict=True):
        close(mine, theirs[-READ:], tolerance)
    assert found.logits.keys() == set(found.edits)
    depth = len(base.neurons)
    assert found.neurons.keys() == {
        (edit, layer) for edit in found.edits for layer in range(edit.site.layer, depth)
    }
    changed = 0
    for edit in found.edits:
        edited = plain.forward(model, inputs, plainly(edit))
        close(found.logits[edit], edited.logits[-READ:], tolerance)
        changed += bool(
            (edited.logits[-1] - base.logits[-1]).abs().max() > 0.01 * base.logits[-1].abs().max()
        )
        for layer in range(depth):
            mine = found.neurons.get((edit, layer), found.base_neurons[layer])
            close(mine, edited.neurons[layer][-READ:], tolerance)
    assert changed > len(found.edits) / 2


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    worst = (found - expected).abs().max() / expected.abs().max()
    assert worst <= tolerance, f"{worst:.1e}"


def replayed(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    rows: int | None = None,
    edits: list[SiteEdit] | None = None,
) -> Everything:
    replayer = Replayer(Anatomy.of(model), rows)
    passes = replayer.record(inputs, READ)
    assert replayer.inexact is None
    assert isinstance(passes, Replay)
    return Everything(passes, means_of(model) if edits is None else edits)


@pytest.mark.parametrize("kind", ["plain", "padded", "two pictures"])
def test_replay_equals_plain_forwards_in_float32(family: Family, kind: str) -> None:
    if kind == "two pictures" and not family.several_images:
        with pytest.raises(ValueError, match="one picture a prompt"):
            example(family, 2)
        return
    inputs = padded(family) if kind == "padded" else example(family, 2 if kind == "two pictures" else 1)
    assert bool((inputs["attention_mask"] == 0).any()) == (kind == "padded")
    agree(family.model, inputs, replayed(family.model, inputs), 3e-6)


def test_replay_in_bfloat16_is_within_its_rounding(family: Family) -> None:
    """It differs from plain forwards by no more than those differ from float32 with the same weights."""
    half, full = families.build(family.name, dtype=torch.bfloat16), families.build(family.name)
    for rounded, weight in zip(half.model.parameters(), full.model.parameters(), strict=True):
        weight.data = rounded.data.float()
    found = replayed(half.model, padded(half))
    worst = worst_rounding = 0.0
    for edit in found.edits:
        plainly_half = plain.forward(half.model, padded(half), plainly(edit)).logits[-READ:].float()
        plainly_full = plain.forward(full.model, padded(full), plainly(edit)).logits[-READ:]
        worst = max(worst, float((found.logits[edit].float() - plainly_half).abs().max()))
        worst_rounding = max(worst_rounding, float((plainly_full - plainly_half).abs().max()))
    assert worst <= worst_rounding
    assert worst_rounding < 0.2 * plainly_full.abs().max()


def test_heads_and_neurons_set_to_zero(family: Family) -> None:
    inputs = padded(family)
    agree(family.model, inputs, replayed(family.model, inputs, edits=zeros_of(family.model)), 3e-6)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "instructblip"])
def test_however_the_rows_are_cut(build_family: Callable[[str], Family], name: str, rows: int) -> None:
    family = build_family(name)
    inputs = padded(family)
    edits = means_of(family.model) + zeros_of(family.model)
    whole = replayed(family.model, inputs, 100, edits)
    cut = replayed(family.model, inputs, rows, edits)
    count = len(edits)
    assert whole.cuts == [count]
    assert cut.cuts == [rows] * (count // rows) + [count % rows] * (count % rows > 0)
    for key, logits in whole.logits.items():
        close(cut.logits[key], logits, 2e-6)
    for place, activations in whole.neurons.items():
        close(cut.neurons[place], activations, 2e-6)


def test_edits_in_any_order_and_some_of_them(build_family: Callable[[str], Family]) -> None:
    family = build_family("qwen2_5_vl")
    inputs = example(family)
    some = [*replaced_by_mean([Head(3, 1), Head(0, 2)]), SiteEdit(Neuron(3, 1), "mask")]
    some += [SiteEdit(Head(3, 0), "zero"), *replaced_by_mean([Head(3, 0), Head(1, 1)])]
    agree(family.model, inputs, replayed(family.model, inputs, edits=some), 3e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_whatever_computes_the_attention(implementation: str) -> None:
    family = families.build("llava_next", attn_implementation=implementation)
    inputs = padded(family)
    agree(family.model, inputs, replayed(family.model, inputs), 3e-6)


def run_ahead(model: PreTrainedModel, inputs: Mapping[str, Any], edits: list[SiteEdit]) -> AheadPasses:
    passes = Replayer(Anatomy.of(model)).record(inputs, READ, ahead=edits, neurons=True)
    assert isinstance(passes, AheadPasses)
    return passes


def test_edits_in_the_recording_pass_equal_plain_forwards(family: Family) -> None:
    """Heads in an order of their own, so that some rows start above others."""
    inputs, edits = padded(family), means_of(family.model)[::-3]
    agree(family.model, inputs, Everything(run_ahead(family.model, inputs, edits), edits), 3e-6)


def test_other_edits_than_those_of_the_recording_pass_are_replayed(
    build_family: Callable[[str], Family],
) -> None:
    family = build_family("qwen3_vl")
    inputs, edits = example(family), zeros_of(family.model)
    passes = run_ahead(family.model, inputs, means_of(family.model)[:2])
    agree(family.model, inputs, Everything(passes, edits), 3e-6)


def test_every_layer_is_called_once_for_all_edits(build_family: Callable[[str], Family]) -> None:
    """By the recording pass for edits that are known beforehand, and by a walk for others."""
    family = build_family("qwen3_vl")
    inputs, edits = example(family), means_of(family.model)
    replayer = Replayer(Anatomy.of(family.model), 100)
    replay = replayer.record(inputs, READ)
    calls: list[int] = []
    stack = plain.layers(family.model)
    handles = [
        layer.register_forward_hook(lambda module, args, output, i=i: calls.append(i))
        for i, layer in enumerate(stack)
    ]
    try:
        list(replay.edited(edits))
        walked, calls[:] = list(calls), []
        list(replayer.record(inputs, READ, ahead=edits).edited(edits))
    finally:
        for handle in handles:
            handle.remove()
    assert walked == calls == list(range(len(stack)))


def test_the_model_is_given_back(build_family: Callable[[str], Family]) -> None:
    family = build_family("qwen3_vl")
    before = [(m, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in family.model.modules()]
    replayed(family.model, example(family))
    run_ahead(family.model, example(family), means_of(family.model))
    assert [(m, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in family.model.modules()] == before
    assert not any("forward" in vars(m) for m in family.model.modules())


def test_forwards_that_accelerate_has_wrapped() -> None:
    """A device map leaves a wrapped forward on every module; it has to be there afterwards too."""
    family = families.build("llava")
    inputs = example(family)
    expected = replayed(family.model, inputs)
    for module in family.model.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    for layer in plain.layers(family.model):
        for module in (layer, layer.self_attn, layer.mlp):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    wrapped = {m: m.forward for m in family.model.modules() if "forward" in vars(m)}
    assert len(wrapped) > 20
    found = replayed(family.model, inputs)
    for head, logits in expected.logits.items():
        close(found.logits[head], logits, 2e-6)
    assert {m: m.forward for m in family.model.modules() if "forward" in vars(m)} == wrapped


# Where replay is not exact


def depends_on_the_batch(layer: torch.nn.Module) -> type[torch.nn.Module]:
    kind = type(layer)

    class Layer(kind):
        """Adds a little of what the other rows hold."""

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = super().forward(hidden_states, *args, **kwargs)
            return out + 0.1 * (len(out) - 1) * out.roll(1, 0)

    return Layer


def remembers_the_pass(layer: torch.nn.Module) -> type[torch.nn.Module]:
    kind = type(layer)

    class Layer(kind):
        """Cannot be called with more rows than the embedding saw."""

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(hidden_states.view(1, -1, hidden_states.shape[-1]), *args, **kwargs)

    return Layer


@pytest.mark.parametrize(
    ("variation", "says"),
    [
        (depends_on_the_batch, r"replayed logits differ from those of full forwards by \d"),
        (remembers_the_pass, "its decoder layers cannot be re-run with a different batch size"),
    ],
)
def test_what_cannot_be_replayed_is_run_in_full_and_said(variation: Any, says: str) -> None:
    family = families.build("llava")
    for layer in plain.layers(family.model)[1:]:
        layer.__class__ = variation(layer)
    replayer = Replayer(Anatomy.of(family.model))
    inputs = example(family)
    passes = replayer.record(inputs, READ)
    assert isinstance(passes, FullPasses)
    assert replayer.inexact is not None
    assert re.match(says, replayer.inexact)
    agree(family.model, inputs, Everything(passes, means_of(family.model) + zeros_of(family.model)), 3e-6)
    assert isinstance(replayer.record(example(family, text=LONG), READ), FullPasses)


def counts_the_rows_of_its_attention(layer: torch.nn.Module) -> None:
    """Doubles the output where the attention was called with another number of rows than the layer."""
    kind, attention_kind = type(layer), type(layer.self_attn)
    seen: list[int] = []

    class Attention(attention_kind):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(len(hidden_states))
            return super().forward(hidden_states, *args, **kwargs)

    class Layer(kind):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.clear()
            out = super().forward(hidden_states, *args, **kwargs)
            return out if set(seen) <= {len(out)} else 2 * out

    layer.self_attn.__class__, layer.__class__ = Attention, Layer


def test_rows_do_not_share_a_call_where_that_is_not_exact() -> None:
    family = families.build("llava")
    for layer in plain.layers(family.model):
        counts_the_rows_of_its_attention(layer)
    replayer = Replayer(Anatomy.of(family.model))
    inputs, edits = example(family), means_of(family.model)
    passes = replayer.record(inputs, READ, ahead=edits)
    assert isinstance(passes, Replay)
    assert replayer.inexact is None
    assert not passes.ways.ahead
    assert not passes.ways.shared
    agree(family.model, inputs, Everything(passes, edits), 3e-6)


def test_the_proof_is_made_on_the_first_example_alone(
    build_family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = build_family("llava")
    replayer = Replayer(Anatomy.of(family.model))
    made: list[FullPasses] = []
    monkeypatch.setattr(replay_module, "FullPasses", lambda *a: made.append(FullPasses(*a)) or made[-1])
    replayer.record(example(family), READ)
    replayer.record(example(family, text=LONG), READ)
    assert len(made) == 1


def test_a_proof_is_kept_for_the_content_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A changed model, hooks and inputs of another form need a proof of their own; small models do always."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[FullPasses] = []
    monkeypatch.setattr(replay_module, "FullPasses", lambda *a: made.append(FullPasses(*a)) or made[-1])
    family = families.build("llava")
    inputs = example(family)

    def proofs_made(changed: dict[str, Tensor] = inputs, **model: object) -> int:
        made.clear()
        anatomy = Anatomy.of(family.model)
        with encoded_once(anatomy):  # as where an answer is decoded first
            passes = Replayer(anatomy, proofs=Proofs(anatomy.model)).record(changed, READ)
        assert isinstance(passes, replay_module.Replay)
        return len(made)

    assert [proofs_made(), proofs_made()] == [1, 1]
    monkeypatch.setattr(weights, "KEPT_BYTES", 0)
    assert [proofs_made(), proofs_made()] == [1, 0]
    cache_file().write_text(cache_file().read_text()[:-3])
    assert [proofs_made(), proofs_made()] == [1, 0]
    hook = family.model.lm_head.register_forward_hook(lambda *_: None)
    assert [proofs_made(), proofs_made()] == [1, 1]
    hook.remove()
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert [proofs_made(without), proofs_made(without)] == [1, 0]
    with torch.no_grad():
        plain.layers(family.model)[0].mlp.down_proj.weight[0, 0] += 1
    assert [proofs_made(), proofs_made()] == [1, 0]
    with monkeypatch.context() as other_library:
        other_library.setattr(proofs_module, "version", lambda library: f"another {library}")
        assert proofs_made() == 1
    monkeypatch.setattr(proofs_module, "own_code_digest", lambda: "of other code")
    assert proofs_made() == 1


def test_a_batch_of_several_examples_is_refused(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    both = family.inputs([LONG, SHORT], [[RED], [BLUE]])
    with pytest.raises(HonesError, match="one example at a time"):
        Replayer(Anatomy.of(family.model)).record(both, 1)


@pytest.mark.parametrize("rows", [0, -2])
def test_no_rows_at_all_are_refused(build_family: Callable[[str], Family], rows: int) -> None:
    with pytest.raises(
        HonesError, match=f"the number of rows to replay at once must be at least 1, not {rows}"
    ):
        Replayer(Anatomy.of(build_family("llava").model), rows)


def test_a_walk_takes_rows_of_any_kind(build_family: Callable[[str], Family]) -> None:
    """Rows that enter a layer with the input of the pass times two, as hooks on that layer would make it."""
    family = build_family("qwen3_vl")
    anatomy, inputs = Anatomy.of(family.model), example(family)
    replay = Replay(anatomy, inputs, READ, RowLimit(8, 0))
    recorded: list[Tensor] = []
    stack = plain.layers(family.model)
    handles = [
        layer.register_forward_pre_hook(lambda module, args: recorded.append(args[0])) for layer in stack
    ]
    plain.forward(family.model, inputs)
    for handle in handles:
        handle.remove()

    def enter(layer: int, members: list[int]) -> Tensor:
        return replay.call(layer, torch.cat([2 * recorded[layer] for _ in members]))

    seen: dict[tuple[int, int], Tensor] = {}

    def keep(layer: int, rows: Tensor, activations: Tensor) -> None:
        seen.update({(row, layer): one for row, one in zip(rows.tolist(), activations, strict=True)})

    with torch.no_grad():
        logits = replay.walk([0, 2, 2], enter, [10, 20, 30], keep)
    assert seen.keys() == {(10, layer) for layer in range(4)} | {
        (n, layer) for n in (20, 30) for layer in (2, 3)
    }
    for row, number, layer in zip(logits, (10, 20, 30), (0, 2, 2), strict=True):
        handle = stack[layer].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        expected = plain.forward(family.model, inputs)
        handle.remove()
        close(row, expected.logits[-READ:], 3e-6)
        close(seen[number, 3], expected.neurons[3][-READ:], 3e-6)


def test_edits_by_row_leave_the_other_rows(build_family: Callable[[str], Family]) -> None:
    anatomy = Anatomy.of(build_family("llava").model)
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    chosen = [(3, SiteEdit(Head(0, 1))), (0, SiteEdit(Head(0, 2), "zero"))]
    edited = edit_rows(x, chosen, anatomy)
    torch.testing.assert_close(edited[3], plain.replaced_by_mean(x[3], 1, 4))
    assert torch.equal(edited[0, :, 32:48], torch.zeros(3, 16))
    assert torch.equal(edited[0, :, :32], x[0, :, :32])
    assert torch.equal(edited[1:3], x[1:3])


def test_a_cut_that_memory_cannot_hold_is_halved_and_no_item_is_lost() -> None:
    """Memory is out for more than two rows; every item is still run once, in order."""
    tried: list[int] = []

    def run(cut: Sequence[int]) -> list[int]:
        tried.append(len(cut))
        if len(cut) > 2:
            raise torch.OutOfMemoryError
        return list(cut)

    for limit in (RowLimit(8, 0), RowLimit(None, 80)):
        tried.clear()
        done = [item for chunk in limit.chunks(range(11), 10, run) for item in chunk]
        assert done == list(range(11))
        assert tried[:3] == [8, 4, 2]
        assert max(tried[2:]) == 2  # the smaller size is kept
    with pytest.raises(HonesError, match="one edited pass of 10 tokens does not fit"):
        list(RowLimit(1, 0).chunks([0], 10, lambda chunk: run([0, 1, 2])))
