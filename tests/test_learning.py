"""Learned scales, compared with a training loop in plain torch with its own hooks and schedule."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import own_answers
import plain
import pytest
import torch
from drawn_data import write_folder
from torch import Tensor

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Neuron, matched_random
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import EditError, HonesError
from hones_eval.jobs.learn import FitSettings, Slots, fit
from hones_eval.jobs.scale import Development, learned
from hones_eval.lmms.examples import Example, TaskExamples, inner_model, load_lmm
from hones_eval.methods.learning import LearnedScales, answer_loss, cosine
from hones_eval.runs.lightning import Loop

COUNT = 6  # a step of four and one of two
STRONG = 50.0  # a KL weight large enough to matter in four steps


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def lmm(own: own_answers.Prepared) -> Any:
    return load_lmm(own_answers.MODEL, own.model_args)


@pytest.fixture(scope="module")
def examples(lmm: Any, own: own_answers.Prepared) -> TaskExamples:
    return TaskExamples(
        lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, offset=4, limit=COUNT
    )


@pytest.fixture(scope="module")
def replayer(lmm: Any) -> Replayer:
    return Replayer(Anatomy.of(inner_model(lmm)))


@pytest.fixture
def loop() -> Loop:
    return Loop("cpu", progress=False)


BANK = [Neuron(0, 3), Neuron(1, 0), Neuron(1, 7), Neuron(3, 20)]


def plain_logits(model: Any, example: Example, bank: Sequence[Neuron], a: Tensor | None) -> Tensor:
    """Logits of the target's tokens after the prompt, with every neuron of the bank times `1 + a`."""

    def hook(layer: int) -> Any:
        def scale(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            columns = list(args[0].unbind(-1))
            for neuron, value in zip(bank, a, strict=True):
                if neuron.layer == layer:
                    columns[neuron.neuron] = columns[neuron.neuron] * (1 + value)
            return (torch.stack(columns, -1),)

        return scale

    handles = []
    if a is not None:
        for layer, block in enumerate(plain.layers(model)):
            handles.append(block.mlp.down_proj.register_forward_pre_hook(hook(layer)))
    try:
        longer = plain.with_answer(model, example.inputs, example.target_ids)
        prompt = example.inputs["input_ids"].shape[1]
        return model(**longer).logits[0, prompt - 1 : -1]
    finally:
        for handle in handles:
            handle.remove()


def plain_fit(
    model: Any, examples: TaskExamples, settings: FitSettings, bank: Sequence[Neuron]
) -> tuple[Tensor, list[float]]:
    """The learned `a` of every neuron, and the cross-entropy of every example in the order of training."""
    a = torch.zeros(len(bank), requires_grad=True)
    optimizer = torch.optim.AdamW([a], lr=settings.learning_rate, weight_decay=0)
    steps = settings.epochs * math.ceil(len(examples) / settings.accumulate)
    done, losses = 0, []
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(settings.seed + epoch)
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), settings.accumulate):
            members = order[start : start + settings.accumulate]
            half = math.cos(math.pi * done / steps)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (0.1 + 0.9 * (1 + half) / 2)
            total = torch.zeros(())
            for index in members:
                example = examples[index]
                p = plain_logits(model, example, bank, a).softmax(-1)
                target = torch.tensor(example.target_ids)
                entropy = -p[range(len(target)), target].log().mean()
                losses.append(float(entropy.detach()))
                q = plain_logits(model, example, bank, None).softmax(-1).detach()
                divergence = (q * (q / p).log()).sum(-1).mean()
                total = total + entropy + settings.beta * divergence
            (total / len(members) + settings.penalty * (a**2).mean()).backward()
            norm = a.grad.norm()
            if norm > settings.clip_norm:
                a.grad.mul_(settings.clip_norm / (norm + 1e-6))
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                a.clamp_(-settings.limit, settings.limit)
            done += 1
    model.zero_grad()
    return a.detach(), losses


@pytest.mark.parametrize(
    "settings",
    [
        FitSettings(learning_rate=0.05),
        FitSettings(beta=0.0, learning_rate=0.3, limit=0.25, clip_norm=0.01, seed=3, epochs=1),
    ],
)
def test_fit_makes_the_same_steps_as_a_plain_loop(
    settings: FitSettings, replayer: Replayer, examples: TaskExamples, loop: Loop
) -> None:
    model = replayer.anatomy.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted = [p.requires_grad for p in model.parameters()]
    found = fit(replayer, examples, BANK, settings, loop)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    expected, losses = plain_fit(model, examples, settings, BANK)
    learned = found.learned.neuron_scales
    scales = torch.ones_like(learned)
    for neuron, a in zip(BANK, expected, strict=True):
        scales[neuron] = 1 + a
    assert float(expected.abs().max()) > 0.05
    torch.testing.assert_close(learned, scales, rtol=0, atol=2e-4)
    assert found.report["steps"] == settings.epochs * 2
    assert found.report["last_learning_rate"] == pytest.approx(settings.learning_rate / 10)
    first = sum(losses[:COUNT]) / COUNT
    assert found.report["epoch_losses"][0]["cross_entropy"] == pytest.approx(first, rel=1e-3)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert not model.training
    if settings.limit == 0.25:
        assert float((learned - 1).abs().max()) == pytest.approx(0.25)


@pytest.mark.parametrize("how", ["learned", "learned_no_kl", "random"])
def test_retrieval_is_learned_from_yes_and_no(
    how: str, own: own_answers.Prepared, lmm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each candidate is trained towards its correct word, at the one token where the margin is read."""
    monkeypatch.setenv("HONES_EVAL_DATA", str(write_folder(tmp_path / "drawn", 3)))
    part = ["--offset", 9, "--limit", COUNT]
    examples = TaskExamples(lmm, "hones_retrieval", model_name=own_answers.MODEL, offset=9, limit=COUNT)
    right = [examples.document(i)["positive"] for i in range(COUNT)]
    yes, no = (examples._tokenizer.convert_tokens_to_ids(word) for word in ("ĠYes", "ĠNo"))
    assert [examples[i].target_ids for i in range(COUNT)] == [[yes] if one else [no] for one in right]
    assert sum(right) == 1
    chosen = ["--ranking", own.rankings / "hones", "--how", how, "--out", tmp_path / how, "--seed", 5]
    steps = ["--learning_rate", 0.05, *(["--beta", STRONG] if how != "learned_no_kl" else [])]
    assert main(own.command("scale", *part, *chosen, *steps, task="hones_retrieval")) == 0
    steering = Steering.load(tmp_path / how)
    ranking = Ranking.load(own.rankings / "hones")
    bank = ranking.neurons()
    if how == "random":
        bank = matched_random(bank, ranking.provenance.shape.neurons, 5)
    settings = FitSettings(beta=0 if how == "learned_no_kl" else STRONG, learning_rate=0.05, seed=5)
    expected, losses = plain_fit(inner_model(lmm), examples, settings, bank)
    scales = torch.ones_like(steering.neuron_scales)
    for neuron, a in zip(bank, expected, strict=True):
        scales[neuron] = 1 + a
    torch.testing.assert_close(steering.neuron_scales, scales, rtol=0, atol=2e-4)
    other = dataclasses.replace(settings, beta=STRONG - settings.beta)
    unlike, _ = plain_fit(inner_model(lmm), examples, other, bank)
    assert float((unlike - expected).abs().max()) > 5e-3, (
        "the KL term has no effect, so this test is uninformative"
    )
    first = steering.provenance.settings["epoch_losses"][0]["cross_entropy"]
    assert first == pytest.approx(sum(losses[:COUNT]) / COUNT, rel=1e-3)


def test_only_the_bank_is_trained_and_no_second_model_is_kept(replayer: Replayer) -> None:
    scales = LearnedScales(replayer.anatomy, BANK)
    assert [tuple(p.shape) for p in scales.parameters()] == [(len(BANK),)]
    assert not list(scales.children())


def test_initial_scales_change_nothing_and_an_edit_that_never_ran_is_an_error(
    replayer: Replayer, examples: TaskExamples
) -> None:
    scales = LearnedScales(replayer.anatomy, BANK)
    model, inputs = replayer.anatomy.model, examples[0].inputs
    with torch.no_grad(), scales.attached():
        same = model(**inputs).logits
    assert torch.equal(same, model(**inputs).logits)
    with pytest.raises(EditError, match="never ran"), scales.attached():
        pass


def test_the_divergence_is_from_the_original_to_the_scaled() -> None:
    scaled, original = torch.randn(3, 5), torch.randn(3, 5)
    target, a = torch.tensor([0, 4, 2]), torch.tensor([0.5, -0.5])
    loss = answer_loss(scaled, original, target[:, None].tolist(), a, beta=0.1, penalty=0.01)
    theirs = torch.nn.functional.kl_div(scaled.log_softmax(-1), original.softmax(-1), reduction="batchmean")
    entropy = torch.nn.functional.cross_entropy(scaled, target)
    torch.testing.assert_close(loss.divergence, theirs)
    torch.testing.assert_close(loss.total, entropy + 0.1 * theirs + 0.01 * 0.25)


def test_the_schedule_falls_along_half_a_cosine_to_a_tenth() -> None:
    rate = cosine(10)
    assert [rate(step) for step in (0, 5, 10, 11)] == pytest.approx([1, 0.55, 0.1, 0.1])


class Numbers:
    """Replaces examples by their numbers."""

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_example_is_in_one_step_of_one_process_and_steps_are_means(world: int) -> None:
    order = [4, 2, 0, 5, 1, 3]
    ranks = [list(Slots(Numbers(), order, 4, rank, world)) for rank in range(world)]  # type: ignore[arg-type]
    assert {len(slots) for slots in ranks} == {8 // world}
    each = 4 // world
    steps = [[slot for slots in ranks for slot in slots[i : i + each]] for i in range(0, 8 // world, each)]
    weights = [{slot.example: slot.weight for slot in step if slot.example is not None} for step in steps]
    assert weights == [dict.fromkeys(order[:4], 1.0), dict.fromkeys(order[4:], 2.0)]


def test_steps_that_cannot_be_shared_are_refused(replayer: Replayer, examples: TaskExamples) -> None:
    with pytest.raises(HonesError, match="3 processes cannot share steps of 4 examples"):
        fit(replayer, examples, BANK, FitSettings(), Loop("cpu", devices=3, progress=False))
    with pytest.raises(HonesError, match="at least one epoch"):
        fit(replayer, examples, BANK, FitSettings(epochs=0), Loop("cpu", progress=False))
    for wrong in (FitSettings(learning_rate=-1.0), FitSettings(learning_rate=0.0), FitSettings(beta=-0.1)):
        with pytest.raises(HonesError, match="needs a learning rate above 0 and a beta of 0 or more"):
            fit(replayer, examples, BANK, wrong, Loop("cpu", progress=False))


def test_an_empty_target_is_named(replayer: Replayer, examples: TaskExamples, loop: Loop) -> None:
    class Emptied:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Example:
            example = examples[index]
            example.target_ids.clear()
            return example

    with pytest.raises(HonesError, match="own_a, doc_id 4: its target has no tokens"):
        fit(replayer, Emptied(), BANK, FitSettings(), loop)  # type: ignore[arg-type]


def test_the_random_bank_is_as_large_in_each_layer(
    replayer: Replayer, examples: TaskExamples, loop: Loop, own: own_answers.Prepared
) -> None:
    ranking = Ranking.load(own.rankings / "hones")
    job = Development(ranking, replayer, examples, loop, settings=FitSettings(epochs=1, seed=5))
    steering = learned(job, "random")
    drawn = {Neuron(*site) for site in (steering.neuron_scales != 1).nonzero().tolist()}
    assert drawn <= set(matched_random(ranking.neurons(), ranking.provenance.shape.neurons, 5))
    assert not drawn & set(ranking.neurons())
    assert drawn


def test_the_command_learns_and_names_its_development_examples(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ranking", own.rankings / "hones", "--offset", 4, "--limit", 5]
    for how in ("learned", "learned_no_kl"):
        assert main(own.command("scale", "--how", how, *flags, "--out", tmp_path / how)) == 0
    assert "4 steps; cross-entropy" in capsys.readouterr().out
    one, two = (Steering.load(tmp_path / how) for how in ("learned", "learned_no_kl"))
    assert one.digest != two.digest
    assert [example_set.offset for example_set in one.provenance.examples] == [0, 4]
    content = json.loads((tmp_path / "learned" / "steering.json").read_text())
    assert content["settings"]["beta"] == 0.05
    assert content["settings"]["how"] == "learned"
    assert float((one.neuron_scales - 1).abs().max()) <= 4 * 5e-4 * 1.01


def test_missing_flags_and_reused_images_are_one_line_errors(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ["scale", "--ranking", str(own.rankings / "hones"), "--how", "learned", "--out", str(tmp_path)]
    assert main(alone) == 1
    assert "give --model, --model_args and --tasks" in own_answers.complaint(capsys.readouterr().err)
    flags = ["--ranking", own.rankings / "hones", "--offset", 3, "--limit", 5, "--out", tmp_path]
    assert main(own.command("scale", "--how", "grid", *flags)) == 1
    assert "1 of the 5 images of own_a" in own_answers.complaint(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
