"""Models whose decoder reads images by cross-attention, compared with hooks and loops written here.

InstructBLIP on T5 and Florence-2 are encoder-decoders: every decoder layer has two attentions. Llama 3.2
Vision has some layers of cross-attention only. T5Gemma 2 merges both into one attention, IDEFICS keeps layers
of cross-attention in a list of their own, and BLIP has them in a decoder without an encoder.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import census
import families
import pytest
import torch
from family_doors import QUESTIONS, ask
from lmms_eval.models import get_model
from lmms_runs import write_steering
from own_answers import write_tasks
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.__main__ import main
from hones_eval.api.model_anatomy import report
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.attach import steer
from hones_eval.core.ranking import Ranking
from hones_eval.core.scope import Scope, ScopeTracker
from hones_eval.core.sites import Head, Neuron
from hones_eval.core.steering import Steering
from hones_eval.engine import tokens
from hones_eval.engine.activations import activations
from hones_eval.engine.decoding import Decoder
from hones_eval.engine.passes import Passes, SiteEdit
from hones_eval.engine.prefixes import shared_length
from hones_eval.engine.prompts import appended, started
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError

WIDTH, HEADS = 8, 4
IMAGE = 119


class Case(NamedTuple):
    """Names of the modules of every layer of the anatomy: what holds its heads, and its neurons or None."""

    heads: list[str]
    neurons: list[str | None]


def _t5(layer: int) -> tuple[list[str], list[str | None]]:
    block = f"language_model.decoder.block.{layer}.layer"
    heads = [f"{block}.0.SelfAttention.o", f"{block}.1.EncDecAttention.o"]
    return heads, [None, f"{block}.2.DenseReluDense.wo"]


def _bart(layer: int) -> tuple[list[str], list[str | None]]:
    block = f"model.language_model.decoder.layers.{layer}"
    return [f"{block}.self_attn.out_proj", f"{block}.encoder_attn.out_proj"], [None, f"{block}.fc2"]


def _mllama(layer: int) -> tuple[list[str], list[str | None]]:
    block = f"model.language_model.layers.{layer}"
    return [f"{block}.{'cross' if layer == 1 else 'self'}_attn.o_proj"], [f"{block}.mlp.down_proj"]


def _case(parts: Callable[[int], tuple[list[str], list[str | None]]], layers: int) -> Case:
    found = [parts(layer) for layer in range(layers)]
    return Case([h for heads, _ in found for h in heads], [n for _, neurons in found for n in neurons])


CASES = {"instructblip_t5": _case(_t5, 2), "florence2": _case(_bart, 2), "mllama": _case(_mllama, 3)}


@cache
def model_of(name: str) -> PreTrainedModel:
    return families.build_refused(name)


def inputs_of(name: str, length: int = 7, images: int = 1) -> dict[str, Tensor]:
    """A prompt of one example with noise as its images."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(3, 110, (1, length), generator=generator)
    image_tokens = {"instructblip_t5": 4, "florence2": 17, "mllama": images}[name]
    ids = torch.cat([torch.full((1, image_tokens), IMAGE), text], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    if name == "mllama":
        ones = torch.ones(1, images, dtype=torch.long)
        return given | {
            "pixel_values": torch.randn(1, images, 1, 3, 32, 32, generator=generator),
            "aspect_ratio_ids": ones,
            "aspect_ratio_mask": ones[..., None],
            "cross_attention_mask": torch.ones(1, ids.shape[1], images, 1, dtype=torch.long),
        }
    if name == "instructblip_t5":
        given |= {"qformer_input_ids": torch.randint(3, 40, (1, 5), generator=generator)}
    return given | {"pixel_values": pixels}


def with_answer(name: str, answer: Sequence[int] = (9, 40, 77), **more: int) -> dict[str, Any]:
    return appended(started(model_of(name), inputs_of(name, **more)), list(answer))


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def anatomy(name: str) -> Anatomy:
    return Anatomy.of(model_of(name))


# The reference: one hook, one head or neuron at a time, cut by hand.


def changed(x: Tensor, site: int, how: str) -> Tensor:
    x = x.clone()
    if how == "mask":
        x[..., site] = 0
        return x
    heads = [x[..., i * WIDTH : (i + 1) * WIDTH].clone() for i in range(HEADS)]
    others = torch.stack([head for i, head in enumerate(heads) if i != site]).mean(0)
    x[..., site * WIDTH : (site + 1) * WIDTH] = others if how == "mean" else 0
    return x


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, args: (change(args[0]),))
    try:
        yield
    finally:
        handle.remove()


def module_of(name: str, edit: SiteEdit) -> nn.Module:
    case = CASES[name]
    path = (case.heads if edit.is_head else case.neurons)[edit.site.layer]
    assert path is not None
    return model_of(name).get_submodule(path)


@torch.no_grad()
def plainly(name: str, inputs: dict[str, Any], edit: SiteEdit | None, read: int) -> Tensor:
    model = model_of(name)
    if edit is None:
        return model(**inputs).logits[0, -read:]
    with hooked(module_of(name, edit), lambda x: changed(x, edit.site[1], edit.how)):
        return model(**inputs).logits[0, -read:]


def every_edit(name: str) -> list[SiteEdit]:
    case = CASES[name]
    heads = [
        SiteEdit(Head(layer, head), how)
        for layer in range(len(case.heads))
        for head in range(HEADS)
        for how in ("mean", "zero")
    ]
    layers = [layer for layer, path in enumerate(case.neurons) if path is not None]
    return [*heads, *(SiteEdit(Neuron(layer, neuron), "mask") for layer in layers for neuron in (0, 17))]


def agree(name: str, inputs: dict[str, Any], read: int = 3) -> Passes:
    replayer = Replayer(Anatomy.of(model_of(name)))
    passes = replayer.record(inputs, read)
    assert replayer.inexact is None
    edits, largest = every_edit(name), passes.base_logits.abs().max()
    assert float((passes.base_logits - plainly(name, inputs, None, read)).abs().max()) <= 1e-5 * largest
    found = [pair for rows in passes.edited(edits) for pair in zip(rows.edits, rows.logits, strict=True)]
    assert len(found) == len(edits)
    for edit, logits in found:
        expected = plainly(name, inputs, edit, read)
        assert float((logits - expected).abs().max()) <= 1e-5 * largest, edit
        assert not torch.equal(expected, passes.base_logits), edit
    return passes


def test_sites_are_those_of_both_attentions_and_of_the_ffn(name: str, anatomy: Anatomy) -> None:
    model, case = model_of(name), CASES[name]
    assert [site.module for site in anatomy.heads_in] == [model.get_submodule(path) for path in case.heads]
    found = [site.module if site.width else None for site in anatomy.neurons_in]
    assert found == [None if path is None else model.get_submodule(path) for path in case.neurons]
    assert anatomy.reads_states
    shape = anatomy.shape
    assert [shape.heads_of(i) for i in range(shape.layers)] == [HEADS] * len(case.heads)
    assert [shape.head_width_of(i) for i in range(shape.layers)] == [WIDTH] * len(case.heads)
    both = name != "mllama"
    assert [len(stage) for stage in anatomy.stages] == ([2] * 2 if both else [1] * 3)


def test_the_configuration_alone_gives_the_same_layers(name: str, anatomy: Anatomy) -> None:
    found, layers = report(model_of(name).config, name), range(anatomy.shape.layers)
    assert found.unsupported is None
    assert found.heads == [anatomy.shape.heads_of(i) for i in layers]
    assert found.neurons == [anatomy.shape.neurons_of(i) for i in layers]


def test_replay_equals_plain_hooks_for_every_head_and_some_neurons(name: str) -> None:
    agree(name, with_answer(name))


def test_replay_equals_plain_hooks_with_padding_on_the_left(name: str) -> None:
    inputs = started(model_of(name), inputs_of(name))
    pads = {"input_ids": 1, "attention_mask": 0, "cross_attention_mask": 0}
    padded = {
        key: torch.cat([torch.full_like(value[:, :2], pads[key]), value], 1) if key in pads else value
        for key, value in inputs.items()
    }
    agree(name, appended(padded, [9, 40, 77]))


def test_replay_equals_plain_hooks_with_two_images() -> None:
    agree("mllama", with_answer("mllama", images=2))


def test_neurons_under_edits_are_those_of_hooked_passes(name: str, anatomy: Anatomy) -> None:
    inputs, edits = with_answer(name), every_edit(name)
    kept: dict[tuple[int, int], Tensor] = {}

    def keep(layer: int, rows: Tensor, z: Tensor) -> None:
        kept.update({(int(row), layer): z[i] for i, row in enumerate(rows)})

    list(Replayer(anatomy).record(inputs, 2).edited(edits, keep))
    layers = range(anatomy.shape.layers)
    assert kept.keys() == {(i, at) for i, edit in enumerate(edits) for at in layers if at >= edit.site.layer}
    for number, edit in enumerate(edits):
        last = CASES[name].neurons[-1]
        assert last is not None
        seen: list[Tensor] = []
        module = model_of(name).get_submodule(last)
        with hooked(module_of(name, edit), lambda x, edit=edit: changed(x, edit.site[1], edit.how)):
            handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
            model_of(name)(**inputs)
            handle.remove()
        torch.testing.assert_close(kept[number, layers[-1]], seen[0][0, -2:], atol=1e-4, rtol=0)


def drawn(anatomy: Anatomy) -> Steering:
    shape, generator = anatomy.shape, torch.Generator().manual_seed(5)
    heads = 1 + torch.rand(shape.layers, shape.heads, generator=generator)
    neurons = 1 + torch.rand(shape.layers, shape.neurons, generator=generator)
    none = torch.tensor([shape.neurons_of(layer) == 0 for layer in range(shape.layers)])
    neurons[none] = 1
    return Steering(heads, neurons, Provenance("drawn", None, shape, "drawn", {}, []))


@pytest.mark.filterwarnings("ignore:this steering was made for")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooked_and_folded_scales_are_those_of_plain_hooks(name: str, dtype: torch.dtype) -> None:
    model = families.build_refused(name).to(dtype)
    anatomy, case = Anatomy.of(model), CASES[name]
    steering, inputs = drawn(anatomy), with_answer(name)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    with torch.no_grad():
        base = model(**inputs).logits.float()
        with steer(model, steering):
            by_hooks = model(**inputs).logits.float()
        with steer(model, steering, how="fold"):
            folded = model(**inputs).logits.float()
        handles = []
        for layer, (heads, neurons) in enumerate(zip(case.heads, case.neurons, strict=True)):
            scales = steering.head_scales[layer].repeat_interleave(WIDTH)
            handles.append(
                model.get_submodule(heads).register_forward_pre_hook(
                    lambda m, args, s=scales: ((args[0].float() * s).to(dtype),)
                )
            )
            if neurons is not None:
                handles.append(
                    model.get_submodule(neurons).register_forward_pre_hook(
                        lambda m, args, s=steering.neuron_scales[layer]: ((args[0].float() * s).to(dtype),)
                    )
                )
        expected = model(**inputs).logits.float()
        for handle in handles:
            handle.remove()
        assert torch.equal(model(**inputs).logits.float(), base)
    tolerance = (1e-5 if dtype == torch.float32 else 8e-2) * expected.abs().max()
    assert float((by_hooks - expected).abs().max()) <= tolerance
    assert float((folded - expected).abs().max()) <= tolerance
    assert float((expected - base).abs().max()) > 0.05 * base.abs().max()


@torch.no_grad()
def test_answers_under_edits_are_those_that_generate_gives(name: str) -> None:
    model, settings = model_of(name), {"max_new_tokens": 4, "do_sample": False}
    inputs = inputs_of(name)
    example = Decoder(Replayer(Anatomy.of(model))).greedy(inputs, settings)
    assert example.passes is not None  # the pass that checks answers explains what `generate` gave
    edits = every_edit(name)
    found = dict(example.answers(edits))
    assert len(found) == len(edits)
    assert any(answer != example.tokens for answer in found.values())
    prompt = 1 if name != "mllama" else inputs["input_ids"].shape[1]
    for edit, answer in found.items():
        with hooked(module_of(name, edit), lambda x, edit=edit: changed(x, edit.site[1], edit.how)):
            output = model.generate(**started(model, inputs), **settings)
        assert output[0, prompt:].tolist() == answer, edit


def test_methods_that_need_image_positions_are_refused(name: str, anatomy: Anatomy) -> None:
    inputs = with_answer(name)
    for refused in (anatomy.image_positions, lambda given: tokens.positions(anatomy, given)):
        with pytest.raises(HonesError, match=r"ForConditionalGeneration reads images by cross-attention"):
            refused(inputs)
    with pytest.raises(HonesError, match="reads images by cross-attention"):
        activations(anatomy, inputs)


def test_scopes_of_encoder_decoders_are_refused(name: str, anatomy: Anatomy) -> None:
    if name == "mllama":
        ScopeTracker(anatomy, Scope(("last",)))
        return
    with pytest.raises(HonesError, match=r"scope=last: .* which its encoder reads: use scope=all"):
        ScopeTracker(anatomy, Scope(("last",)))


def test_prompts_do_not_share_a_prefix(name: str, anatomy: Anatomy) -> None:
    assert shared_length([with_answer(name), with_answer(name, answer=(9, 41))], anatomy) == 0


@pytest.mark.parametrize(
    ("kind", "layers", "stages"), [("t5gemma2", 4, 4), ("udop", 8, 4), ("idefics", 8, 8), ("blip", 8, 4)]
)
def test_other_layouts_are_replayed_exactly(kind: str, layers: int, stages: int) -> None:
    """Merged attention, scaled logits, layers in a second list, logits behind another transform."""
    model = census.build(kind)
    anatomy = Anatomy.of(model)
    assert (anatomy.shape.layers, len(anatomy.stages)) == (layers, stages)
    assert anatomy.reads_states
    replayer = Replayer(anatomy)
    passes = replayer.record(census.inputs(kind, model), 1)
    assert replayer.inexact is None
    heads = [SiteEdit(Head(layer, 1)) for layer in range(layers)]
    inputs, largest = census.inputs(kind, model), float(passes.base_logits.abs().max())
    for rows in passes.edited(heads):
        for edit, logits in zip(rows.edits, rows.logits, strict=True):
            width = anatomy.shape.head_width_of(edit.site.layer)
            module = anatomy.heads_in[edit.site.layer].module

            def mean(x: Tensor, width: int = width) -> Tensor:
                x, cut = x.clone(), x.unflatten(-1, (-1, width))
                x[..., width : 2 * width] = cut[..., [0, *range(2, cut.shape[-2])], :].mean(-2)
                return x

            with torch.no_grad(), hooked(module, mean):
                expected = model(**inputs).logits[0, -1:]
            assert float((logits - expected).abs().max()) <= 1e-4 * largest


@pytest.fixture(scope="module")
def t5_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InstructBLIP on T5 as it is published: with the processor of the family."""
    folder = families.save_checkpoint("instructblip", tmp_path_factory.mktemp("t5") / "model")
    recipe = families.RECIPES["instructblip"](False)
    config = model_of("instructblip_t5").config
    config = type(config).from_dict(config.to_dict())
    config.text_config.vocab_size = len(recipe.processor.tokenizer)
    config.text_config.eos_token_id = recipe.processor.tokenizer.eos_token_id
    config.text_config.pad_token_id = recipe.processor.tokenizer.pad_token_id
    config.qformer_config.vocab_size = recipe.config.qformer_config.vocab_size
    config.num_query_tokens = recipe.config.num_query_tokens
    config.image_token_index = recipe.config.image_token_index
    families.make_model(type(model_of("instructblip_t5")), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5_flags(t5_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The model and a task of three questions whose gold answers it gives itself."""
    args = f"pretrained={t5_checkpoint},device=cpu"
    tasks = write_tasks(tmp_path_factory.mktemp("t5_tasks") / "own", "instructblip", args, 3)
    return [
        *("--model", "instructblip", "--model_args", args),
        *("--tasks", "own_a", "--include_path", str(tasks)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hones", "vseam", "atp", "dvp"])
def test_t5_is_ranked_through_lmms_evals_own_wrapper(
    t5_flags: list[str], method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ranking"
    kinds = [] if method == "dvp" else ["--heads", "4"]
    kinds += [] if method == "vseam" else ["--neurons", "0.1"]
    assert main(["rank", "--method", method, *t5_flags, *kinds, "--out", str(out)]) == 0
    ranking = Ranking.load(out)
    if method != "dvp":
        assert ranking.head_scores.shape == (4, HEADS)
    if method == "hones":
        assert "replay exact" in capfd.readouterr().out
        assert ranking.head_log_probability is not None
        assert bool((ranking.head_log_probability != 0).any(1).all())
    if method != "vseam":
        assert ranking.neuron_scores is not None
        assert (ranking.neuron_scores != 0).any(1).tolist() == [False, True, False, True]


@pytest.mark.slow
def test_t5_is_verified_scaled_and_exported(
    t5_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The exported checkpoint answers as the steered model does."""
    ranking, steering = str(tmp_path / "ranking"), str(tmp_path / "steering")
    hones = ["rank", "--method", "hones", *t5_flags, "--heads", "4", "--neurons", "0.1", "--limit", "2"]
    assert main([*hones, "--out", ranking]) == 0
    held_out = ["--offset", "2", "--trials", "2", "--out", str(tmp_path / "verified")]
    assert main(["verify", "--ranking", ranking, *t5_flags, *held_out]) == 0, capfd.readouterr().err
    factor = ["--how", "fixed", "--factor", "3", "--out", steering]
    assert main(["scale", "--ranking", ranking, *factor]) == 0, capfd.readouterr().err
    exported = str(tmp_path / "exported")
    assert main(["export", "--steering", steering, "--to", "checkpoint", "--out", exported]) == 0
    answers = [
        ask(get_model(name).create_from_arg_string(args, {"batch_size": 1}), QUESTIONS)
        for name, args in (
            ("instructblip", f"pretrained={exported},device=cpu"),
            ("hones_instructblip", f"{t5_flags[3]},steering={steering}"),
        )
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_t5_is_steered_through_lmms_evals_own_wrapper(t5_checkpoint: Path, tmp_path: Path) -> None:
    """Without a steering it answers as the stock wrapper; with one otherwise, folded or not."""
    args, steering = f"pretrained={t5_checkpoint},device=cpu", tmp_path / "steering"
    write_steering(t5_checkpoint, steering, seed=1)
    answers = [
        ask(get_model(wrapper).create_from_arg_string(f"{args}{more}", {"batch_size": 1}), QUESTIONS)
        for wrapper, more in (
            ("instructblip", ""),
            ("hones_instructblip", ""),
            ("hones_instructblip", f",steering={steering}"),
            ("hones_instructblip", f",steering={steering},attach=fold"),
        )
    ]
    assert answers[0] == answers[1]
    assert answers[2] != answers[1]
    assert answers[2] == answers[3]


@pytest.mark.slow
def test_tracing_an_encoder_decoder_is_one_line(
    t5_flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*t5_flags[:4], "--clean", "own_a", "--edited", "own_b", *t5_flags[6:]]
    assert main(["trace", *flags, "--out", str(tmp_path / "trace")]) != 0
    line = capfd.readouterr().err.splitlines()[-1]
    assert "InstructBlipForConditionalGeneration reads images by cross-attention" in line, line
