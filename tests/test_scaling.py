"""Scales made from scores, and scales chosen by trying them on development examples."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import own_answers
import plain
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hones_eval as he
from hones_eval.__main__ import main
from hones_eval.api import scaling as scaling_api
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import steer
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Neuron
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError, MisfitError
from hones_eval.jobs import halving
from hones_eval.jobs.learn import _Fit
from hones_eval.jobs.mean_difference import mean_difference
from hones_eval.jobs.scale import Development, choose, grid, layer_groups, search
from hones_eval.jobs.tune import folds_by_image
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods import scaling
from hones_eval.runs import checkpoint
from hones_eval.runs.lightning import Loop, _Pass


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def hones(own: own_answers.Prepared) -> Ranking:
    return Ranking.load(own.rankings / "hones")


@pytest.fixture(scope="module")
def vseam(own: own_answers.Prepared) -> Ranking:
    return Ranking.load(own.rankings / "vseam")


@pytest.fixture(scope="module")
def lmm(own: own_answers.Prepared) -> Any:
    return load_lmm(own_answers.MODEL, own.model_args)


@pytest.fixture(scope="module")
def development(own: own_answers.Prepared, hones: Ranking, lmm: Any) -> Development:
    examples = TaskExamples(
        lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, offset=4, limit=5
    )
    replayer = Replayer(Anatomy.of(inner_model(lmm)))
    return Development(hones, replayer, examples, Loop("cpu", progress=False), neurons=0.2)


def test_fixed_scales_the_bank_and_nothing_else(hones: Ranking) -> None:
    steering = scaling.fixed(hones, 2.0, 0.05)
    bank = hones.neurons(0.05)
    changed = [Neuron(*site) for site in (steering.neuron_scales != 1).nonzero().tolist()]
    assert sorted(changed) == sorted(bank)
    assert set(steering.neuron_scales.unique().tolist()) == {1.0, 2.0}
    assert bool((steering.head_scales == 1).all())


def test_signed_clips_large_scores_and_ignores_small_ones(vseam: Ranking) -> None:
    scores = torch.linspace(-3, 3, vseam.head_scores.numel()).reshape(vseam.head_scores.shape)
    ranking = dataclasses.replace(vseam, head_scores=scores)
    found = scaling.signed(ranking, strength=0.5, epsilon=0.3).head_scales
    for score, scale in zip(scores.flatten().tolist(), found.flatten().tolist(), strict=True):
        expected = 1.0 if abs(score) < 0.3 else min(2.0, max(0.0, 1 + 0.5 * score))
        assert scale == pytest.approx(expected)


def test_topk_treats_a_head_in_both_lists_by_its_larger_score(vseam: Ranking) -> None:
    up, down = torch.zeros_like(vseam.head_positive), torch.zeros_like(vseam.head_negative)
    up[0, 0], up[1, 1], down[1, 1], down[2, 3] = 0.5, 0.4, 0.6, 0.2
    ranking = dataclasses.replace(vseam, head_positive=up, head_negative=down)
    steering = scaling.topk(ranking, 2, enhance=0.5, suppress=0.25)
    expected = torch.ones_like(steering.head_scales)
    expected[0, 0], expected[1, 1], expected[2, 3] = 1.5, 0.75, 0.75
    torch.testing.assert_close(steering.head_scales, expected)
    assert steering.provenance.settings["in_both_lists"] == [[1, 1]]
    up[1, 1] = 0.6
    equal = scaling.topk(dataclasses.replace(ranking, head_positive=up), 2, enhance=0.5, suppress=0.25)
    expected[1, 1] = 1
    torch.testing.assert_close(equal.head_scales, expected)
    up[1, 1] = 0.1
    alone = scaling.topk(ranking, 1, enhance=0.5, suppress=0.25)
    assert "in_both_lists" not in alone.provenance.settings


def plain_metric(job: Development, scales: torch.Tensor, module: str = "mlp.down_proj") -> float:
    """Exact match with every neuron (or head) multiplied by its scale, by independent hooks."""
    model = job.replayer.anatomy.model

    def hook(row: torch.Tensor) -> Any:
        return lambda _, args: (args[0] * row,)

    pairs = zip(plain.layers(model), scales, strict=True)
    handles = [block.get_submodule(module).register_forward_pre_hook(hook(row)) for block, row in pairs]
    try:
        right = 0
        for i in range(len(job.examples)):
            example = job.examples[i]
            tokens = model.generate(**example.inputs, **example.settings)[0]
            text = job.examples.decode(i, tokens[example.inputs["input_ids"].shape[1] :].tolist())
            right += text.strip() == example.target
    finally:
        for handle in handles:
            handle.remove()
    return right / len(job.examples)


def test_grid_chooses_the_best_factor_of_a_plain_loop(development: Development) -> None:
    job = dataclasses.replace(development, factors=(-3.0, 0.0, 1.0, 2.0))
    steering = grid(job)
    found = steering.provenance.settings["metric_by_factor"]
    values = {}
    for factor in job.factors:
        scales = torch.ones_like(job.ranking.neuron_scores)
        for neuron in job.bank:
            scales[neuron] = factor
        values[factor] = plain_metric(job, scales)
    assert found == {str(factor): pytest.approx(value) for factor, value in values.items()}
    assert len(set(values.values())) > 1
    best = max(values.values())
    chosen = steering.provenance.settings["factor"]
    assert values[chosen] == best
    assert abs(chosen - 1) == min(abs(f - 1) for f, value in values.items() if value == best)
    changed = steering.neuron_scales[steering.neuron_scales != 1]
    assert set(changed.tolist()) <= {chosen}


def test_grid_minimizes_a_metric_where_lower_is_better(
    development: Development, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(development.examples, "higher_is_better", False)
    job = dataclasses.replace(development, factors=(-3.0, 1.0))
    found = grid(job).provenance.settings
    assert found["metric_by_factor"][str(found["factor"])] == min(found["metric_by_factor"].values())
    assert found["factor"] == -3.0


@pytest.mark.parametrize("how", ["topk", "signed"])
def test_head_strengths_are_the_best_of_a_plain_loop(
    development: Development, vseam: Ranking, how: str
) -> None:
    job = dataclasses.replace(development, ranking=vseam, heads=3, strengths=(1.0, 40.0))
    steering = choose(job, how)
    found = steering.provenance.settings
    width = vseam.provenance.shape.head_width
    tried = [0.0, 1.0, 40.0]
    if how == "signed":
        scales = {f"{one:g}": (1 + one * vseam.head_scores).clamp(0, 2) for one in tried}
    else:
        up, down = (
            torch.zeros_like(scores).flatten().index_fill(0, scores.flatten().topk(3).indices, 1)
            for scores in (vseam.head_positive, vseam.head_negative)
        )
        helps, hurts = up * vseam.head_positive.flatten(), down * vseam.head_negative.flatten()
        up, down = (helps > hurts).float(), (helps < hurts).float()
        scales = {
            f"{one:g}, {other:g}": (1 + one * up - other * down).reshape(vseam.head_scores.shape)
            for one in tried
            for other in tried
        }
    by_loop = {
        name: plain_metric(job, one.repeat_interleave(width, 1), "self_attn.o_proj")
        for name, one in scales.items()
    }
    assert found["metric_by_strength"] == pytest.approx(by_loop)
    assert len(set(by_loop.values())) > 1
    best = max(by_loop.values())
    assert found["best"] == best
    changes = {
        name: float((scales[name] - 1).abs().sum()) for name, value in by_loop.items() if value == best
    }
    torch.testing.assert_close(steering.head_scales, scales[min(changes, key=changes.__getitem__)])
    assert found["baseline"] == by_loop["0" if how == "signed" else "0, 0"]
    assert [one.offset for one in steering.provenance.examples] == [0, 4]


def test_search_never_loses_and_reports_measured_values(
    development: Development,
) -> None:
    job = dataclasses.replace(development, factors=(0.0, 1.0, 3.0), groups=2)
    steering = search(job)
    found = steering.provenance.settings
    values = [found["baseline"], *(step["metric"] for step in found["trace"])]
    assert values == sorted(values)
    assert [step["group"] for step in found["trace"]] == [1, 0, 1, 0]
    assert found["best"] == pytest.approx(plain_metric(job, steering.neuron_scales))
    for layers, factor in zip(found["layers"], found["factors"], strict=True):
        for layer in layers:
            changed = {neuron.neuron for neuron in job.bank if neuron.layer == layer}
            for neuron in range(steering.neuron_scales.shape[1]):
                assert steering.neuron_scales[layer, neuron] == (factor if neuron in changed else 1)


def test_groups_hold_whole_layers_and_are_of_about_equal_size() -> None:
    bank = [Neuron(layer, i) for layer, count in enumerate([2, 2, 1, 3, 6]) for i in range(count)]
    groups = layer_groups(bank, 3)
    assert [sorted({neuron.layer for neuron in group}) for group in groups] == [[0, 1, 2], [3], [4]]
    assert sorted(neuron for group in groups for neuron in group) == sorted(bank)
    assert layer_groups([Neuron(3, i) for i in range(5)], 3) == [[Neuron(3, i) for i in range(5)]]
    with pytest.raises(HonesError, match="--groups 0"):
        layer_groups(bank, 0)


def test_a_ranking_of_another_model_is_refused(development: Development, hones: Ranking) -> None:
    shape = dataclasses.replace(hones.provenance.shape, heads=9)
    provenance = dataclasses.replace(hones.provenance, shape=shape)
    other = Ranking(provenance, neuron_scores=hones.neuron_scores)
    with pytest.raises(MisfitError, match=r"heads: 9 here, \d there"):
        dataclasses.replace(development, ranking=other)


def test_the_commands_write_steerings(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hones, vseam = own.rankings / "hones", own.rankings / "vseam"
    for how, ranking in (("fixed", hones), ("signed", vseam), ("topk", vseam)):
        out = tmp_path / how
        assert main(["scale", "--ranking", str(ranking), "--how", how, "--out", str(out)]) == 0
        assert not Steering.load(out).is_noop
    flags = ["--offset", 4, "--limit", 4, "--factors", "[0.9, 1, 1.1]", "--neurons", 0.2]
    flags += ["--metric", "log_probability"]  # which every factor changes
    for how, groups in (("grid", []), ("search", ["--groups", 2])):
        out = tmp_path / how
        given = own.command("scale", "--how", how, "--ranking", hones, *flags, *groups, "--out", out)
        assert main(given) == 0
        content = json.loads((out / "steering.json").read_text())
        assert content["settings"]["how"] == how
        assert [one["count"] for one in content["examples"]] == [4, 4]
        assert not Steering.load(out).is_noop
    printed = capsys.readouterr().out
    assert "on development examples: log_probability" in printed


@pytest.mark.parametrize(("how", "groups"), [("grid", []), ("search", ["--groups", 1])], ids=str)
def test_nothing_is_written_when_no_strength_helps(
    how: str,
    groups: list[str | int],
    own: own_answers.Prepared,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The refusal has the warnings that a steering would have: here that all gold answers are the same."""
    flags = ["--offset", 4, "--limit", 2, "--factors", "[1]", *groups, "--out", tmp_path]
    flags += ["--metric", "log_probability", "--target", "{{'red'}}"]
    assert main(own.command("scale", "--how", how, "--ranking", own.rankings / "hones", *flags)) == 1
    said = own_answers.complaint(capsys.readouterr().err)
    assert "no strength helped on development examples: nothing was written" in said
    assert "all 2 gold answers of own_a are 'red', so any edit" in said
    assert not list(tmp_path.iterdir())


def test_a_chosen_steering_that_changes_nothing_is_refused_by_the_function_too(
    development: Development, own: own_answers.Prepared, hones: Ranking
) -> None:
    """`fixed --factor 1`, a grid and a search follow one rule."""
    job = dataclasses.replace(development, factors=(1.0,), groups=1)
    assert all(chosen.is_noop for chosen in (grid(job), search(job)))
    with pytest.raises(HonesError, match="every scale is 1: this steering would change nothing"):
        he.scale(hones, how="fixed", factor=1.0)


def test_strengths_of_heads_are_chosen_by_the_command(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--ranking", own.rankings / "vseam", "--how", "topk", "--heads", 3, "--out", tmp_path / "topk"]
    given = own.command("scale", *chosen, "--offset", 4, "--limit", 4, "--strengths", "[-0.05, 0.05]")
    given += ["--metric", "log_probability"]
    assert main(given) == 0
    steering = Steering.load(tmp_path / "topk")
    settings = steering.provenance.settings
    assert list(settings["metric_by_strength"]) == [
        f"{up}, {down}" for up in (-0.05, 0, 0.05) for down in (-0.05, 0, 0.05)
    ]
    said = f"enhancing by {settings['enhance']:g} and suppressing by {settings['suppress']:g} is best"
    assert said in capsys.readouterr().out
    assert bool((steering.neuron_scales == 1).all())
    for flags, message in (
        (["--offset", 2, "--limit", 4], "2 of the 4 images of own_a"),
        (["--offset", 4, "--enhance", 0.5], "--enhance 0.5 leaves nothing to choose on --tasks own_a"),
        (["--offset", 4, "--heads", 0], "cannot choose 0 of 16 heads"),
    ):
        assert main([*own.command("scale", *chosen[:-1], tmp_path / "not"), *map(str, flags)]) == 1
        assert message in own_answers.complaint(capsys.readouterr().err)
    alone = ["scale", *map(str, chosen[:-1]), str(tmp_path / "not"), "--model", own_answers.MODEL]
    assert main(alone) == 1
    assert "give --model, --model_args and --tasks" in own_answers.complaint(capsys.readouterr().err)
    assert not (tmp_path / "not").exists()


def test_signed_neurons_follow_the_direction_by_hand(hones: Ranking) -> None:
    """Of three selected neurons the strongest moves by the strength, the others in proportion."""
    scores = torch.zeros_like(hones.neuron_scores)
    direction = torch.zeros_like(scores)
    scores[0, 3], scores[1, 0], scores[1, 2] = 9.0, 8.0, 7.0
    direction[0, 3], direction[1, 0], direction[1, 2], direction[0, 1] = 0.2, -0.4, 0.1, 5.0
    source = dataclasses.replace(hones.provenance, settings={"neurons": 3 / scores.numel()})
    ranking = dataclasses.replace(hones, provenance=source, neuron_scores=scores, neuron_direction=direction)
    expected = torch.ones_like(scores)
    expected[0, 3], expected[1, 0], expected[1, 2] = 1 + 0.8 * 0.5, 1 - 0.8, 1 + 0.8 * 0.25
    steering = he.scale(ranking, how="signed_neurons", strength=0.8)
    torch.testing.assert_close(steering.neuron_scales, expected)
    assert bool((steering.head_scales == 1).all())
    # A confirmed ranking has exact effects, which replace the estimate where they were measured.
    exact, measured = torch.zeros_like(scores), torch.zeros_like(scores)
    for place, effect in (((0, 3), -0.1), ((1, 0), -0.2), ((1, 2), -0.3)):
        exact[place], measured[place] = effect, 4
    confirmed = dataclasses.replace(
        ranking, neuron_scores=exact, neuron_estimate=scores, neuron_examples=measured
    )
    found = scaling.signed_neurons(confirmed, 0.6).neuron_scales
    assert [float(found[place]) for place in ((0, 3), (1, 0), (1, 2))] == pytest.approx([0.8, 0.6, 0.4])
    with pytest.raises(HonesError, match="rank with --method atp"):
        scaling.signed_neurons(hones)


def test_strengths_of_signed_neurons_are_chosen_by_the_command(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--limit", 4, "--heads", 4, "--neurons", 0.2, "--out", tmp_path / "atp"]
    assert main(own.command("rank", "--method", "atp", *flags)) == 0
    flags = ["--ranking", tmp_path / "atp", "--how", "signed_neurons", "--offset", 4, "--limit", 4]
    flags += ["--strengths", "[-0.2, 0.2]", "--metric", "log_probability", "--out", tmp_path / "steering"]
    assert main(own.command("scale", *flags)) == 0
    settings = Steering.load(tmp_path / "steering").provenance.settings
    values = settings["metric_by_strength"]
    assert list(values) == ["-0.2", "0", "0.2"]
    assert settings["best"] == max(values.values())
    assert f"strength {settings['strength']:g} is best" in capsys.readouterr().out


def test_halving_follows_a_plain_loop_without_gradients(
    development: Development, own: own_answers.Prepared, lmm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rung keeps the better half by the loss of a plain loop, on a model that refuses gradients."""
    model = development.replayer.anatomy.model
    wide = TaskExamples(lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, offset=4, limit=8)
    monkeypatch.setattr(halving, "CANDIDATES", 6)
    damage = scaling.scaled_neurons(development.ranking, development.ranking.neurons(0.3), 1 / 3, {})
    with steer(model, damage, "hook"):
        handle = model.register_forward_pre_hook(lambda *_: refuse_gradients())
        job = dataclasses.replace(
            development,
            replayer=development.replayer.unproven(),
            examples=wide,
            factors=(0.2, 1.0, 3.0),
            groups=1,
            heads=3,
            neurons=0.3,
        )
        try:
            check_halving(job, choose(job, "halving"))
        finally:
            handle.remove()


def check_halving(job: Development, steering: Steering) -> None:
    """Compare the rungs and the choice of two groups of sites with a plain loop."""
    model, wide = job.replayer.anatomy.model, job.examples
    settings = steering.provenance.settings
    order = [index for part in folds_by_image(wide, halving.PARTS, 0) for index in part]
    rows = halving.candidates(2, job.factors, 6, 0)
    heads, neurons = job.ranking.heads(3), job.ranking.neurons(0.3)

    def loss(row: tuple[float, ...], index: int) -> float:
        head_scales = torch.ones(job.ranking.head_scores.shape)
        neuron_scales = torch.ones(job.ranking.neuron_scores.shape)
        for head in heads:
            head_scales[head] = row[0]
        for neuron in neurons:
            neuron_scales[neuron] = row[1]
        return plain_loss(model, wide[index], head_scales, neuron_scales)

    alive, sums, done = list(rows), dict.fromkeys(rows, 0.0), 0
    for rung in settings["rungs"]:
        for row in alive:
            sums[row] += sum(loss(row, index) for index in order[done : rung["examples"]])
        done = rung["examples"]
        alive = sorted(alive, key=sums.__getitem__)
        assert rung["candidates"] == len(alive)
        assert rung["best"] == pytest.approx(sums[alive[0]] / done, rel=1e-4)
        if done < len(order):
            alive = alive[: -(-len(alive) // 2)]
    assert [rung["examples"] for rung in settings["rungs"]] == [1, 2, 4, 8]
    assert tuple(settings["factors"]) == alive[0]
    assert settings["loss_without"] == pytest.approx(
        sum(loss((1, 1), index) for index in order) / 8, rel=1e-4
    )
    assert settings["loss"] < settings["loss_without"]
    assert bool((steering.neuron_scales[tuple(zip(*neurons, strict=True))] == settings["factors"][1]).all())


def refuse_gradients() -> None:
    assert not torch.is_grad_enabled(), "this model has no gradients"


def plain_loss(model: Any, example: Any, head_scales: torch.Tensor, neuron_scales: torch.Tensor) -> float:
    """The mean cross-entropy of an example's target, with sites scaled by independent hooks.

    The end of the answer is one more token of it, where `max_new_tokens` leaves room.
    """
    handles = []
    for block, heads, neurons in zip(plain.layers(model), head_scales, neuron_scales, strict=True):
        for name, row in (("self_attn.o_proj", heads), ("mlp.down_proj", neurons)):
            module = block.get_submodule(name)
            wide = row.repeat_interleave(module.in_features // len(row))
            handles.append(module.register_forward_pre_hook(lambda _, args, wide=wide: (args[0] * wide,)))
    has_room = len(example.target_ids) < example.settings["max_new_tokens"]
    end = [example.settings["eos_token_id"]] if has_room else []
    target = torch.tensor([*example.target_ids, *end])
    ids = torch.cat([example.inputs["input_ids"], target[None, :-1]], dim=1)
    given = example.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with torch.no_grad():
            logits = model(**given).logits[0, -len(target) :]
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.nn.functional.cross_entropy(logits.double(), target))


def test_candidates_of_halving_are_single_groups_and_combinations() -> None:
    assert halving.candidates(2, (1.0, 2.0), 10, 0) == [(2.0, 1.0), (1.0, 2.0), (2.0, 2.0)]
    many = halving.candidates(6, (0.5, 1.0, 1.5, 2.0), 20, 0)
    assert len(many) == len(set(many)) == 20
    alone = [row for row in many if sum(factor != 1 for factor in row) == 1]
    assert 10 <= len(alone) < 20
    with pytest.raises(HonesError, match="no factor but 1"):
        halving.candidates(2, (1.0,), 10, 0)


def test_a_steering_that_would_change_nothing_is_refused(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["scale", "--ranking", str(own.rankings / "hones"), "--how", "fixed", "--factor", "1"]
    assert main([*given, "--out", str(tmp_path)]) == 1
    assert "every scale is 1" in own_answers.complaint(capsys.readouterr().err)
    given = ["scale", "--ranking", str(own.rankings / "hones"), "--how", "topk", "--out", str(tmp_path)]
    assert main(given) == 1
    assert "rank with --method vseam" in own_answers.complaint(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_grid_breaks_ties_by_the_smallest_change(
    development: Development,
) -> None:
    job = dataclasses.replace(development, factors=(1.0001, 1.0, 0.9999))
    settings = grid(job).provenance.settings
    assert len(set(settings["metric_by_factor"].values())) == 1
    assert settings["factor"] == 1.0


@pytest.mark.parametrize(
    ("how", "module", "method", "stops"),
    [("learned", _Fit, "training_step", (6, 1, 4)), ("search", _Pass, "predict_step", (3, 7))],
)
def test_resumed_scaling_gives_the_same_steering(
    own: own_answers.Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    module: type,
    method: str,
    stops: tuple[int, ...],
) -> None:
    """Interrupt learning (two epochs of six examples) and search (four passes) and resume them."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    flags = ["--ranking", own.rankings / "hones", "--offset", 4, "--limit", 6]
    flags += ["--metric", "log_probability"]  # which every factor changes
    flags += ["--how", how, "--neurons", 0.2]
    own_flags = ["--factors", "[0, 1, 3]", "--groups", 2] if how == "search" else ["--learning_rate", 0.1]
    flags += own_flags
    assert main(own.command("scale", *flags, "--out", tmp_path / "whole")) == 0
    step, made, allowed = getattr(module, method), [0], [0]

    def counting(self: object, *arguments: object) -> object:
        made[0] += 1
        if made[0] > allowed[0]:
            raise HonesError("interrupted")
        return step(self, *arguments)

    monkeypatch.setattr(module, method, counting)
    for stop in stops:
        made[0], allowed[0] = 0, stop
        assert main(own.command("scale", *flags, "--out", tmp_path / "pieces", "--resume")) == 1
        assert any((tmp_path / "pieces" / "partial").glob("*.safetensors"))
    made[0], allowed[0] = 0, 1000
    assert main(own.command("scale", *flags, "--out", tmp_path / "pieces", "--resume")) == 0
    assert made[0] < (16 if how == "learned" else 24), "started again from the beginning"
    one, other = ((tmp_path / name / "steering.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert one == other
    reports = [json.loads((tmp_path / name / "steering.json").read_text()) for name in ("whole", "pieces")]
    assert reports[0] == reports[1]
    assert not (tmp_path / "pieces" / "partial").exists()


def test_processes_that_were_killed_at_different_steps_go_on_from_the_newer_one(
    own: own_answers.Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes resume, of which one has saved one step and the other two. One process made the steps."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    flags = ["--ranking", own.rankings / "hones", "--offset", 4, "--limit", 6, "--learning_rate", 0.1]
    flags += ["--how", "learned", "--neurons", 0.2]
    assert main(own.command("scale", *flags, "--out", tmp_path / "whole")) == 0
    step, made = _Fit.training_step, [0]
    (tmp_path / "two" / "partial").mkdir(parents=True)
    for rank, saved in enumerate((1, 2)):

        def counting(self: _Fit, *given: Any, saved: int = saved) -> object:
            made[0] += 1
            if made[0] > 4 * saved:
                raise HonesError("interrupted")
            return step(self, *given)

        made[0], out = 0, tmp_path / f"killed {rank}"
        with monkeypatch.context() as patched:
            patched.setattr(_Fit, "training_step", counting)
            assert main(own.command("scale", *flags, "--out", out)) == 1
        (path,) = (out / "partial").glob("learn-*.safetensors")
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        assert about["done"] == 4 * saved
        about["done"] //= 2  # each of two processes has half of a step's examples
        name = path.name.replace("-0-of-1", f"-{rank}-of-2")
        kept = {"about": json.dumps(about)}
        save_file(load_file(path), tmp_path / "two" / "partial" / name, metadata=kept)
    resumed = own.command("scale", *flags, "--out", tmp_path / "two", "--resume", "--devices", 2)
    done = subprocess.run(
        [sys.executable, "-m", "hones_eval", *resumed],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (Steering.load(tmp_path / name) for name in ("whole", "two"))
    torch.testing.assert_close(two.neuron_scales, one.neuron_scales, rtol=0, atol=1e-4)
    losses = [steering.provenance.settings["epoch_losses"] for steering in (one, two)]
    for epoch, other in zip(*losses, strict=True):
        assert epoch == pytest.approx(other, rel=1e-3)


def test_scaling_is_not_resumed_with_other_weights_at_the_same_path(
    own: own_answers.Prepared,
    llava_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    folder = shutil.copytree(llava_checkpoint, tmp_path / "llava")
    replaced = own._replace(model_args=f"pretrained={folder}")
    flags = ["--ranking", own.rankings / "hones", "--offset", 4, "--limit", 6, "--how", "grid"]
    command = replaced.command("scale", *flags, "--out", tmp_path / "out", "--resume")
    step, made = _Pass.predict_step, [0]

    def interrupted(self: _Pass, *arguments: Any) -> object:
        made[0] += 1
        if made[0] == 4:
            raise HonesError("interrupted")
        return step(self, *arguments)

    monkeypatch.setattr(_Pass, "predict_step", interrupted)
    assert main(command) == 1
    source = scaling_api.model_source
    with monkeypatch.context() as elsewhere:  # the same weights, by another commit of a hub repository
        elsewhere.setattr(scaling_api, "model_source", lambda model: {**source(model), "revision": "c0ffee"})
        assert main(command) == 1
    assert "was measured with another model" in capsys.readouterr().err
    families.save_checkpoint("llava", folder, seed=5)
    assert main(command) == 1
    assert "was measured with another model" in capsys.readouterr().err
    assert not (tmp_path / "out" / "steering.json").exists()


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--how", "fixed", "--factor", "1e300"], "1e+300"),
        (["--how", "fixed", "--factor=-1e9"], "-1e+09"),
    ],
)
def test_scales_that_no_model_could_use_are_refused(
    flags: list[str],
    shown: str,
    own: own_answers.Prepared,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ranking = ["--ranking", str(own.rankings / "hones")]
    assert main(["scale", *ranking, *flags, "--out", str(tmp_path / "out")]) == 1
    assert own_answers.complaint(capsys.readouterr().err) == (
        f"hones-eval: a scale of {shown} was asked for: give numbers up to 10000"
    )
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def last_activations(job: Development) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Per example the heads [L, H, d] and neurons [L, I] at the last prompt token, and the metric."""
    model, shape = job.replayer.anatomy.model, job.ranking.provenance.shape
    heads, neurons, values = [], [], []
    kept: list[torch.Tensor] = []
    modules = [m for layer in plain.layers(model) for m in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for index in range(len(job.examples)):
        example = job.examples[index]
        kept.clear()
        handles = [
            module.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1].clone()))
            for module in modules
        ]
        model(**example.inputs)
        for handle in handles:
            handle.remove()
        heads.append(torch.stack(kept[::2]).view(shape.layers, shape.heads, shape.head_width))
        neurons.append(torch.stack(kept[1::2]))
        tokens = model.generate(**example.inputs, **example.settings)
        new = tokens[0, example.inputs["input_ids"].shape[1] :].tolist()
        values.append(float(job.examples.score(index, job.examples.decode(index, new))[job.examples.metric]))
    return torch.stack(heads), torch.stack(neurons), values


def test_mean_differences_are_those_of_a_plain_loop(
    development: Development, own: own_answers.Prepared
) -> None:
    heads, neurons, values = last_activations(development)
    right = torch.tensor(values) >= 0.5
    assert 0 < int(right.sum()) < len(values)
    steering = mean_difference(development, None, 3, 2.0)
    top = development.ranking.head_scores.flatten().argsort(descending=True, stable=True)[:3]
    chosen = torch.zeros_like(development.ranking.head_scores).flatten().index_fill(0, top, 1)
    expected = 2 * (heads[right].mean(0) - heads[~right].mean(0))
    expected = expected * chosen.view(heads.shape[1:3])[..., None]
    torch.testing.assert_close(steering.head_shifts, expected, atol=1e-5, rtol=1e-4)
    shifts = (neurons[right].mean(0) - neurons[~right].mean(0)) * 2
    bank = torch.zeros(shifts.shape)
    for neuron in development.bank:
        bank[neuron] = 1
    torch.testing.assert_close(steering.neuron_shifts, shifts * bank, atol=1e-5, rtol=1e-4)
    assert bool((steering.head_scales == 1).all())
    assert steering.provenance.settings["examples"] == {
        "right": int(right.sum()),
        "wrong": int((~right).sum()),
    }
    # Of two tasks: here the same examples without the first.
    lmm, flags = development.examples._lmm, {"model_name": own_answers.MODEL, "include_path": own.tasks}
    others = TaskExamples(lmm, "own_a", **flags, offset=5, limit=4)
    against = mean_difference(dataclasses.replace(development, neurons=None), others, 3, 1.0)
    expected = (heads.mean(0) - heads[1:].mean(0)) * chosen.view(heads.shape[1:3])[..., None]
    torch.testing.assert_close(against.head_shifts, expected, atol=1e-5, rtol=1e-4)
    assert against.neuron_shifts is None
    assert [used.offset for used in against.provenance.examples] == [0, 4, 5]


def test_the_command_chooses_the_strength_of_a_mean_difference(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ranking", own.rankings / "hones", "--offset", 4, "--limit", 5, "--strengths", "[1, 3]"]
    flags += ["--metric", "log_probability", "--against", "own_b"]
    given = own.command("scale", "--how", "mean_difference", *flags, "--out", tmp_path / "out")
    code = main(given)
    captured = capsys.readouterr()
    if code == 0:
        assert "heads and 0 neurons are shifted" in captured.out
        assert Steering.load(tmp_path / "out").has_shifts
    else:
        assert "no strength helped" in captured.err
    assert main(["own_a" if part == "own_b" else part for part in given] + ["--overwrite"]) == 1
    assert "--tasks and --against are both own_a" in own_answers.complaint(capsys.readouterr().err)
