"""Attribution patching: estimates compared with slopes by small steps, and rankings by the command."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import own_answers
import plain
import pytest
import torch
from families import NAMES, Family
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.engine.decoding import Decoder
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.answers.margin import Margin
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods import scaling
from hones_eval.methods.attribution import Attribution, AttributionSettings
from hones_eval.methods.head_replacement import HeadReplacement
from hones_eval.toy import checkpoint_path

RED = Image.new("RGB", (64, 48), "white")
ImageDraw.Draw(RED).ellipse([4, 4, 32, 24], fill="red")
TARGET = [11, 12, 13]
STEP = 0.002
Objective = Literal["log_probability", "margin"]


def read_target(model: PreTrainedModel, inputs: dict[str, Any], target: list[int]) -> list[list[float]]:
    """Logits at the positions that predict the target's tokens."""
    logits = model(**plain.with_answer(model, inputs, target[:-1])).logits[0, -len(target) :]
    return [row.double().tolist() for row in logits]


def value_of(objective: Objective, rows: list[list[float]], target: list[int]) -> float:
    if objective == "margin":
        return sum(row[token] - max(row[:token] + row[token + 1 :]) for row, token in zip(rows, target))  # noqa: B905
    return sum(float(torch.tensor(row).log_softmax(0)[token]) for row, token in zip(rows, target))  # noqa: B905


@contextmanager
def moved(module: torch.nn.Module, towards: Callable[[Tensor], Tensor], step: float) -> Iterator[None]:
    """Move the input of a linear layer a step of the way to something else."""

    def hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] + step * (towards(args[0]) - args[0]),)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def drop(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    objective: Objective,
    module: torch.nn.Module,
    towards: Callable[[Tensor], Tensor],
) -> float:
    """The slope of the objective's drop along the line from a site's activations to its replacement."""
    values = []
    for step in (STEP, -STEP):
        with moved(module, towards, step):
            values.append(value_of(objective, read_target(model, inputs, TARGET), TARGET))
    return (values[1] - values[0]) / (2 * STEP)


def example_of(inputs: dict[str, Any], target: list[int], details: Any = None) -> Any:
    return SimpleNamespace(
        inputs=inputs,
        settings={},
        target="t",
        target_ids=target,
        where="t, doc_id 0",
        details=details,
        image_hashes=["a"],
    )


def inputs_of(family: Family) -> dict[str, Any]:
    return {k: v for k, v in family.inputs("What color is it?", [RED]).items() if k != "labels"}


def zero_neuron(neuron: int) -> Callable[[Tensor], Tensor]:
    def towards(x: Tensor) -> Tensor:
        edited = x.clone()
        edited[..., neuron] = 0
        return edited

    return towards


ESTIMATED = ["llava", "qwen2_5_vl", "instructblip", "gemma3", "paligemma", "smolvlm"]


def test_every_family_whose_inputs_have_token_types_is_estimated(
    build_family: Callable[[str], Family],
) -> None:
    """A wrong type of the appended answer gives scores that look plausible."""
    typed = [name for name in NAMES if "token_type_ids" in inputs_of(build_family(name))]
    assert typed
    assert set(typed) <= set(ESTIMATED)


@pytest.mark.parametrize("objective", ["log_probability", "margin"])
@pytest.mark.parametrize("name", ESTIMATED)
def test_estimates_are_slopes(name: str, objective: Objective, build_family: Callable[[str], Family]) -> None:
    """Of every head, and of some neurons of every layer; weights neither get gradients nor change."""
    family = build_family(name)
    model = family.model
    trainable = [weight.requires_grad for weight in model.parameters()]
    anatomy = Anatomy.of(model)
    with torch.inference_mode():  # as loops run it, inputs included
        inputs = inputs_of(family)
        attribution = Attribution(
            anatomy,
            Decoder(Replayer(anatomy)).append_answer,
            settings=AttributionSettings(objective=objective, absolute="example"),
            kinds=("heads", "neurons"),
        )
        totals: Any = attribution.measure(example_of(inputs, TARGET))
    found = {kind: Attribution.scores(totals, kind, signed=True) for kind in ("heads", "neurons")}
    heads = plain.head_count(model)
    slopes = torch.zeros_like(found["heads"])
    for edit in plain.all_heads(model):
        module = plain.layers(model)[edit.layer].self_attn.o_proj
        towards = lambda x, head=edit.site: plain.replaced_by_mean(x, head, heads)  # noqa: E731
        slopes[edit.layer, edit.site] = drop(model, inputs, objective, module, towards)
    assert (found["heads"] - slopes).abs().max() <= 0.01 * slopes.abs().max() > 0
    for layer, block in enumerate(plain.layers(model)):
        best = int(found["neurons"][layer].abs().argmax())
        for neuron in (best, 0, 3):
            slope = drop(model, inputs, objective, block.mlp.down_proj, zero_neuron(neuron))
            largest = found["neurons"].abs().max()
            assert abs(float(found["neurons"][layer, neuron]) - slope) <= 0.01 * largest
    assert torch.equal(Attribution.scores(totals, "neurons"), found["neurons"].abs())
    assert [weight.requires_grad for weight in model.parameters()] == trainable
    assert all(weight.grad is None for weight in model.parameters())


def test_per_position_absolute_values_do_not_cancel(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    anatomy = Anatomy.of(family.model)
    example = example_of(inputs_of(family), TARGET)
    found: dict[str, Any] = {}
    for absolute in ("example", "position"):
        settings = AttributionSettings(absolute=absolute)  # type: ignore[arg-type]
        attribution = Attribution(anatomy, Decoder(Replayer(anatomy)).append_answer, settings=settings)
        found[absolute] = attribution.measure(example).sums
    assert torch.equal(found["example"]["heads_signed"], found["position"]["heads_signed"])
    assert bool((found["position"]["heads"] >= found["example"]["heads"] - 1e-9).all())
    assert bool((found["position"]["heads"] > 1.01 * found["example"]["heads"]).any())


def test_integrated_gradients_of_a_layer_add_up_to_its_effect(
    build_family: Callable[[str], Family],
) -> None:
    """Completeness: the signed estimates of a layer's neurons sum to the effect of masking all of them."""
    family = build_family("llava")
    model, inputs = family.model, inputs_of(family)
    anatomy = Anatomy.of(model)
    settings = AttributionSettings("ig", "log_probability", "example", steps=64)
    attribution = Attribution(
        anatomy, Decoder(Replayer(anatomy)).append_answer, settings=settings, kinds=("neurons",)
    )
    totals: Any = attribution.measure(example_of(inputs, TARGET))
    signed = Attribution.scores(totals, "neurons", signed=True).sum(1)
    with torch.no_grad():
        base = value_of("log_probability", read_target(model, inputs, TARGET), TARGET)
        for layer, block in enumerate(plain.layers(model)):
            with moved(block.mlp.down_proj, torch.zeros_like, 1.0):
                masked = value_of("log_probability", read_target(model, inputs, TARGET), TARGET)
            assert float(signed[layer]) == pytest.approx(base - masked, rel=0.02, abs=2e-4)


def test_the_margin_between_two_words_is_the_objective_of_margin_answers(
    build_family: Callable[[str], Family],
) -> None:
    family = build_family("llava")
    model, inputs = family.model, inputs_of(family)
    anatomy = Anatomy.of(model)
    append = Decoder(Replayer(anatomy)).append_answer
    yes, no = 5, 9
    totals = {}
    for gold in (yes, no):
        example = example_of(inputs, [gold], Margin(yes, no))
        totals[gold] = Attribution(anatomy, append).measure(example).sums["heads_signed"]
    torch.testing.assert_close(totals[yes], -totals[no])
    module = plain.layers(model)[1].self_attn.o_proj
    towards = lambda x: plain.replaced_by_mean(x, 2, plain.head_count(model))  # noqa: E731
    values = []
    with torch.no_grad():
        for step in (STEP, -STEP):
            with moved(module, towards, step):
                (row,) = read_target(model, inputs, [yes])
            values.append(row[yes] - row[no])
    slope = (values[1] - values[0]) / (2 * STEP)
    assert float(totals[yes][1, 2]) == pytest.approx(slope, abs=0.01 * float(totals[yes].abs().max()))


def test_a_target_without_tokens_is_an_error(build_family: Callable[[str], Family]) -> None:
    anatomy = Anatomy.of(build_family("llava").model)
    with pytest.raises(TaskError, match="t, doc_id 0: its gold answer 't' has no tokens"):
        Attribution(anatomy, Decoder(Replayer(anatomy)).append_answer).measure(example_of({}, []))


def test_gradients_that_are_not_finite_name_layer_and_example(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    anatomy = Anatomy.of(family.model)
    weight = plain.layers(family.model)[1].self_attn.o_proj.weight
    kept = weight.detach().clone()
    attribution = Attribution(anatomy, Decoder(Replayer(anatomy)).append_answer)
    try:
        weight.data[0, 0] = float("nan")
        with pytest.raises(HonesError, match="t, doc_id 0: the gradient at the heads of layer 0 is not"):
            attribution.measure(example_of(inputs_of(family), TARGET))
    finally:
        weight.data.copy_(kept)


def test_a_model_without_gradients_names_the_way_out(
    build_family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final norm is cut off from the graph, as kernels without a backward pass are."""
    family = build_family("llava")
    anatomy = Anatomy.of(family.model)
    monkeypatch.setattr(anatomy.final_norm, "forward", lambda x: torch.zeros_like(x.detach()))
    with pytest.raises(HonesError, match=r"gives no gradients \(.*\); use a method without"):
        Attribution(anatomy, Decoder(Replayer(anatomy)).append_answer).measure(
            example_of(inputs_of(family), TARGET)
        )


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def ranked(own: own_answers.Prepared, tmp_path_factory: pytest.TempPathFactory) -> Ranking:
    out = tmp_path_factory.mktemp("atp")
    assert main(own.command("rank", "--method", "atp", "--limit", 3, "--heads", 4, "--out", out)) == 0
    return Ranking.load(out)


def test_the_command_ranks_heads_and_neurons(ranked: Ranking) -> None:
    assert ranked.report is not None
    assert ranked.report["objective"] == ranked.provenance.settings["objective"] == "margin"
    assert ranked.provenance.settings["absolute"] == "position"
    for scores, direction in (
        (ranked.head_scores, ranked.head_direction),
        (ranked.neuron_scores, ranked.neuron_direction),
    ):
        assert scores is not None
        assert direction is not None
        assert bool((scores >= direction.abs() - 1e-6).all())
        assert bool((direction < 0).any())
        assert bool((direction > 0).any())


def test_signed_scales_follow_the_direction_and_not_the_absolute_scores(ranked: Ranking) -> None:
    """Heads that hurt to first order are lowered, although their absolute score is positive."""
    direction = ranked.head_direction
    assert direction is not None
    strength = 0.9 / float(direction.abs().max())
    scales = scaling.signed(ranked, strength).head_scales
    torch.testing.assert_close(scales, (1 + strength * direction).clamp(0, 2))
    assert bool((scales < 1).any())
    exact = dataclasses.replace(ranked, head_estimate=ranked.head_scores, head_scores=-direction)
    torch.testing.assert_close(scaling.signed(exact, strength).head_scales, 1 - strength * direction)


def test_several_processes_give_the_same_ranking(
    own: own_answers.Prepared, ranked: Ranking, tmp_path: Path
) -> None:
    given = own.command("rank", "--method", "atp", "--limit", 3, "--heads", 4, "--out", tmp_path)
    command = [
        sys.executable,
        "-m",
        "hones_eval",
        *map(str, given),
        "--devices",
        "2",
    ]
    assert subprocess.run(command, timeout=300, check=False).returncode == 0
    two = Ranking.load(tmp_path)
    for name in ("head_scores", "neuron_scores", "head_direction", "neuron_direction"):
        torch.testing.assert_close(getattr(two, name), getattr(ranked, name), rtol=1e-6, atol=1e-9)


def test_bfloat16_gives_about_the_same_scores(
    own: own_answers.Prepared, ranked: Ranking, tmp_path: Path
) -> None:
    given = own.command("rank", "--method", "atp", "--limit", 3, "--heads", 4, "--out", tmp_path)
    assert main([*given, "--dtype", "bfloat16"]) == 0
    scores, exact = Ranking.load(tmp_path).neuron_scores, ranked.neuron_scores
    assert scores is not None
    assert exact is not None
    correlation = torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.95


@pytest.mark.parametrize(
    "task", ["scenes_vqa_relation_discovery", "scenes_retrieval_margin_discovery", "scenes_caption_discovery"]
)
def test_every_kind_of_answer_of_the_bundled_tasks(task: str, tmp_path: Path) -> None:
    shared = ["--model", "llava_hf", "--model_args", f"pretrained={checkpoint_path()}", "--tasks", task]
    given = ["rank", "--method", "atp", *shared, "--limit", "10", "--out", str(tmp_path)]
    assert main(given) == 0
    ranking = Ranking.load(tmp_path)
    assert ranking.neuron_scores is not None
    assert ranking.neuron_scores.abs().max() > 0


def test_options_of_other_methods_are_refused(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, says in (
        (["--method", "dvp", "--estimate", "ig"], "--estimate only applies to --method atp, not to dvp"),
        (["--method", "dvp", "--edit", "zero"], "--edit only applies to --method hones, vseam and atp"),
        (["--method", "atp", "--race", "0.1"], "only apply to --method hones, not to atp"),
    ):
        assert main(own.command("rank", *flags, "--out", tmp_path / "new")) == 1
        assert says in own_answers.complaint(capsys.readouterr().err)


def test_heads_of_another_edit_are_estimated_against_its_replacement(
    own: own_answers.Prepared,
) -> None:
    """With `zero`, the estimate of a head is the sum of gradient times activation over its features."""
    lmm = load_lmm(own_answers.MODEL, own.model_args)
    examples = TaskExamples(lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, limit=2)
    anatomy = Anatomy.of(inner_model(lmm))
    replacement = HeadReplacement("zero", anatomy, examples)
    append = Decoder(Replayer(anatomy)).append_answer
    sums = Attribution(anatomy, append, replacement).measure(examples[0]).sums
    example = examples[0]
    width = anatomy.shape.head_width

    def towards(x: Tensor) -> Tensor:
        edited = x.clone()
        edited[..., width : 2 * width] = 0
        return edited

    module = plain.layers(inner_model(lmm))[1].self_attn.o_proj
    values = []
    with torch.no_grad():
        for step in (STEP, -STEP):
            with moved(module, towards, step):
                rows = read_target(inner_model(lmm), example.inputs, example.target_ids)
            values.append(value_of("margin", rows, example.target_ids))
    slope = (values[1] - values[0]) / (2 * STEP)
    largest = float(sums["heads_signed"].abs().max())
    assert float(sums["heads_signed"][1, 1]) == pytest.approx(slope, abs=0.02 * largest)
