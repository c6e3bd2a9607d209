"""The lens equals hooks in a plain forward, whatever the family; the last block says what the model says."""

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from drawn_data import write_folder
from families import Family
from PIL import Image
from torch import Tensor, nn

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.attach import steer
from hones_eval.core.steering import Steering
from hones_eval.engine.activations import VIEWS
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.examples import Example
from hones_eval.methods.lens import LogitLens, Other, Seen

QUESTION = "Is the cat black?"


def example(family: Family, ids: tuple[int, ...] = (30, 31, 30), size: tuple[int, int] = (64, 48)) -> Example:
    inputs = dict(family.inputs(QUESTION, [Image.new("RGB", size, "red")]))
    return Example(0, "drawn", "test", 0, inputs, {}, "x", ["x"], list(ids), [], "")


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def slow(family: Family, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Log-probabilities [tokens, vocabulary] by view and layer, with hooks on the parts of each layer."""
    kept: dict[str, list[Tensor]] = {view: [] for view in VIEWS}
    handles = []

    def keep(view: str) -> Callable[..., None]:
        return lambda module, args, output: kept[view].append(first(output)[0].clone())

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["after_attention"].append(args[0][0].clone())

    for layer in plain.layers(family.model):
        handles.append(layer.self_attn.register_forward_hook(keep("attention")))
        handles.append(layer.mlp.register_forward_hook(keep("ffn")))
        handles.append(layer.register_forward_hook(keep("block")))
        # What the norm in front of the FFN reads is the residual stream after attention.
        before_ffn = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        handles.append(before_ffn.register_forward_pre_hook(keep_input))
    family.model(**inputs)
    for handle in handles:
        handle.remove()
    norm, unembed = plain.language_model(family.model).norm, family.model.get_output_embeddings()
    return {view: [unembed(norm(x)).float().log_softmax(-1) for x in some] for view, some in kept.items()}


def look(family: Family, one: Example, **options: Any) -> Seen:
    seen = LogitLens(Anatomy.of(family.model), family.tokenizer, **options).measure(one).record
    assert isinstance(seen, Seen)
    return seen


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "instructblip", "gemma3", "qwen3_vl", "glm4v"])
def test_every_view_equals_hooks_in_a_plain_forward(build_family: Callable[[str], Family], name: str) -> None:
    family = build_family(name)
    one = example(family)
    seen = look(family, one, chosen="all", top=5)
    expected = slow(family, one.inputs)
    assert seen.positions == list(range(one.inputs["input_ids"].shape[1]))
    for place, view in enumerate(VIEWS):
        for layer, logs in enumerate(expected[view]):
            p = logs.exp()
            readout = [part[place, layer] for part in seen.readout]
            close(readout[1], p.topk(5).values)
            close(p.gather(1, readout[0]), readout[1])
            close(readout[2], torch.distributions.Categorical(logits=logs).entropy())
            close(readout[3], p[:, 30] + p[:, 31])
    model = family.model(**one.inputs).logits[0].float().softmax(-1)
    close(seen.readout.top_probabilities[-1, -1], model.topk(5).values)
    assert seen.tokens.count("<image>") == int((one.inputs["input_ids"] == image_token(family)).sum())


def image_token(family: Family) -> int:
    return int(family.model.config.image_token_id)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_chosen_positions_skip_padding(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    one = example(family)
    ids = one.inputs["input_ids"]
    inputs = dict(one.inputs)
    inputs["input_ids"] = torch.cat([torch.full((1, 3), family.tokenizer.pad_token_id), ids], 1)
    inputs["attention_mask"] = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    padded = Example(0, "drawn", "test", 0, inputs, {}, "x", ["x"], [30], [], "")
    every = look(family, padded, chosen="all")
    assert every.positions == list(range(3, 3 + ids.shape[1]))
    assert look(family, padded, chosen="0,-1").positions == [3, 2 + ids.shape[1]]
    assert look(family, padded).positions == [2 + ids.shape[1]]
    image, text = (look(family, padded, chosen=which) for which in ("image", "text"))
    assert sorted(image.positions + text.positions) == every.positions
    assert set(image.tokens) == {"<image>"}
    assert QUESTION in "".join(text.tokens)
    alone = look(family, one)
    torch.testing.assert_close(
        look(family, padded).readout.entropy, alone.readout.entropy, rtol=1e-4, atol=1e-4
    )


def steering(family: Family, layer: int) -> Steering:
    shape = Anatomy.of(family.model).shape
    heads, neurons = torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.neurons)
    heads[layer] = 0.25
    neurons[layer, ::2] = 2.0
    return Steering(heads, neurons, Provenance("drawn", None, shape, "test", {}, []))


def test_against_a_steering(build_family: Callable[[str], Family]) -> None:
    family = build_family("qwen2_5_vl")
    anatomy, one, scales = Anatomy.of(family.model), example(family), steering(family, 1)
    alone = look(family, one)
    seen = look(family, one, other=Other(anatomy, lambda: steer(family.model, scales)))
    with steer(family.model, scales):
        inside = look(family, one)
        expected = slow(family, one.inputs)
    for mine, theirs in ((seen.readout, alone.readout), (seen.other, inside.readout)):
        for part, same in zip(mine, theirs, strict=True):
            torch.testing.assert_close(part, same)
    plain_logs = slow(family, one.inputs)
    for place, view in enumerate(VIEWS):
        for layer in range(anatomy.shape.layers):
            a, b = plain_logs[view][layer][-1], expected[view][layer][-1]
            close(seen.divergence[place, layer, 0], (a.exp() * (a - b)).sum())
    # Layer 0 comes before the steered layer.
    assert seen.divergence[:, 0].abs().max() < 1e-6
    assert seen.divergence[3, -1, 0] > 1e-3


def test_bad_input_is_named(build_family: Callable[[str], Family]) -> None:
    family, other = build_family("llava"), build_family("gemma3")
    with pytest.raises(HonesError, match="positions 'first' are neither last"):
        look(family, example(family), chosen="first")
    with pytest.raises(HonesError, match="tokens, so not all of the positions 400"):
        look(family, example(family), chosen="400")
    with pytest.raises(HonesError, match="at least one token, not 0"):
        look(family, example(family), top=0)
    with pytest.raises(TaskError, match="drawn, doc_id 0: its answer 'x' has no tokens"):
        look(family, example(family, ()))
    deeper = Anatomy.of(other.model)
    if deeper.shape.layers != Anatomy.of(family.model).shape.layers:
        with pytest.raises(HonesError, match="cannot be compared layer by layer"):
            look(family, example(family), other=Other(deeper))


def test_the_command_writes_tables_and_figures(
    llava_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build_family: Callable[[str], Family],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(write_folder(tmp_path / "drawn", 4)))
    steering(build_family("llava"), 0).save(tmp_path / "steering")
    arguments = ["lens", "--model", "llava_hf", "--model_args", f"pretrained={llava_checkpoint}"]
    arguments += ["--tasks", "hones_vqa", "--limit", "2", "--top", "3", "--positions=-2,-1"]
    arguments += ["--against", f"steering={tmp_path / 'steering'}", "--figures_of", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "index.html",
        "lens.json",
        "lens.csv",
        "means.png",
        "example0.png",
        "example0_difference.png",
    }
    report = json.loads((tmp_path / "out/lens.json").read_text())
    with (tmp_path / "out/lens.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = Anatomy.of(build_family("llava").model).shape.layers
    assert len(rows) == 2 * 2 * len(VIEWS) * layers * 2  # examples, models, views, layers, positions
    last = [
        float(row["answer_probability"])
        for row in rows
        if (row["model"], row["view"], row["layer"]) == ("other", "block", str(layers - 1))
    ][1::2]
    assert report["means"]["other_answer"]["block"][-1] == pytest.approx(sum(last) / 2, rel=1e-4)
    assert report["means"]["divergence"]["block"][-1] > 0
    for flags, says in (
        (["--strength", "2"], "--strength 2 only applies to a steering: give --against"),
        (["--figures_of=-1"], "--figures_of -1: give how many examples"),
    ):
        assert main([*arguments[:-4], *flags, "--out", str(tmp_path / "no")]) == 1
        assert says in capsys.readouterr().err
    for against in ("steering=/nowhere", "steering=/nowhere,strength=2", "steering="):
        assert main([*arguments[:-4], "--against", against, "--out", str(tmp_path / "no")]) == 1
        printed = capsys.readouterr().err
        assert (
            "no steering at '/nowhere'" if against == "steering=/nowhere" else "by --strength; or"
        ) in printed
