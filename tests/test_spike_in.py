"""Spike-ins, tuned scales and power through the commands, compared with plain hooks and loops."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import own_answers
import plain
import pytest
import torch

from hones_eval import api
from hones_eval.__main__ import main
from hones_eval.core.attach import steer
from hones_eval.core.ranking import Ranking
from hones_eval.core.scope import answer_follows
from hones_eval.core.sites import Head, Neuron, top_neurons
from hones_eval.core.steering import Steering
from hones_eval.engine.decoding import Decoder
from hones_eval.errors import HonesError
from hones_eval.jobs.learn import fit
from hones_eval.jobs.rank import Discovery, discover, provenance
from hones_eval.jobs.spike_in import SpikeIn, shuffled, spike_in, standing
from hones_eval.jobs.tune import TuneSettings, folds_by_image, tune
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.learning import AnswerLoss, Fold, LearnedScales, TargetLosses
from hones_eval.reports.spike_in import headline


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def ranking(own: own_answers.Prepared) -> Ranking:
    return Ranking.load(own.rankings / "hones")


@pytest.fixture(scope="module")
def model(own: own_answers.Prepared) -> api.Model:
    return api.load(own_answers.MODEL, own.model_args)


def part(model: api.Model, own: own_answers.Prepared, offset: int, limit: int) -> TaskExamples:
    return model.examples("own_a", include_path=own.tasks, offset=offset, limit=limit)


def plain_match(model: api.Model, examples: TaskExamples, scales: torch.Tensor) -> float:
    """Exact match with every neuron multiplied by its scale, by independent hooks on `down_proj`."""
    blocks = zip(plain.layers(model.model), scales, strict=True)
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args, row=row: (args[0] * row,))
        for block, row in blocks
    ]
    try:
        right = 0
        for i in range(len(examples)):
            example = examples[i]
            tokens = model.model.generate(**example.inputs, **example.settings)[0]
            text = examples.decode(i, tokens[example.inputs["input_ids"].shape[1] :].tolist())
            right += text.strip() == example.target
    finally:
        for handle in handles:
            handle.remove()
    return right / len(examples)


def test_the_damage_and_its_repair_are_those_of_plain_hooks(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking
) -> None:
    test = part(model, own, 8, 4)
    inputs = test[0].inputs
    before = model.model(**inputs).logits
    job = SpikeIn(
        ranking,
        model.replayer,
        model.loop,
        discovery=part(model, own, 4, 2),
        development=part(model, own, 6, 2),
        test=test,
        neurons=0.3,
        damp=0.01,
        method="dvp",
        ways=("fixed",),
        factor=3.0,
        trials=2,
    )
    report = spike_in(job)
    assert torch.equal(model.model(**inputs).logits, before), "the model was not given back as it was"
    damage = torch.ones_like(ranking.neuron_scores)
    planted = [Neuron(*site) for site in report["planted"]]
    assert planted == top_neurons(ranking.neuron_scores, round(0.3 * damage.numel()))
    for neuron in planted:
        damage[neuron] = 0.01
    assert report["undamaged"] == plain_match(model, test, torch.ones_like(damage))
    assert report["damaged"] == plain_match(model, test, damage)
    assert report["damaged"] < report["undamaged"], "the damage costs nothing, so this test is uninformative"
    repair, fixed = report["rows"][0], report["rows"][1]
    assert (repair["scales"], repair["value"], repair["recovered"]["value"]) == (
        "exact repair",
        report["undamaged"],
        1.0,
    )
    assert fixed["scales"] == "fixed"
    assert fixed["value"] - report["damaged"] == pytest.approx(fixed["gain"])
    loss = report["undamaged"] - report["damaged"]
    assert fixed["recovered"]["value"] == pytest.approx(fixed["gain"] / loss)
    assert [row["scales"] for row in report["rows"]][2:] == ["fixed, on a random bank"]
    assert {row["scales"] for row in report["controls"]} == {
        f"random {trial}: {name}" for trial in (1, 2) for name in ("exact repair", "fixed")
    }
    assert {row["verdict"] for row in report["rows"]} == {"too few"}
    assert report["planted_in_rankings"]["undamaged"]["found"] == len(planted)


def test_tuned_may_scale_all_sites_as_in_scale(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking
) -> None:
    """By default `tuned` is not confined to the share of neurons that is planted."""
    job = SpikeIn(
        ranking,
        model.replayer,
        model.loop,
        discovery=part(model, own, 0, 2),
        development=part(model, own, 2, 8),
        test=part(model, own, 10, 2),
        neurons=0.3,
        damp=0.01,
        method="dvp",
        trials=1,
        chosen_on_random=False,
        tune=TuneSettings(folds=2, epochs=1),
    )
    chosen = spike_in(job)["chosen"]["tuned"]
    shape = ranking.provenance.shape
    assert chosen["sites"] == shape.layers * (shape.heads + shape.neurons)


@pytest.mark.parametrize("method", ["hones", "vseam", "dvp"])
def test_a_model_that_is_damaged_by_hooks_is_ranked_as_one_with_damaged_weights(
    method: str, model: api.Model, own: own_answers.Prepared, ranking: Ranking
) -> None:
    """A hook that replay applied twice would damp the planted sites by the square."""
    examples = part(model, own, 4, 2)
    damage = scaling.fixed(ranking, 0.1, 0.3)
    model.replayer.record(examples[0].inputs, 1)  # proven on the undamaged model
    found = []
    for attach in ("hook", "fold"):
        with steer(model.model, damage, attach):
            source = provenance(model.anatomy, examples, method, {}, 0)
            job = Discovery(model.replayer.unproven(), examples, model.loop, source, 3, 0.1)
            found.append(discover(job))
    by_hook, by_fold = found
    torch.testing.assert_close(by_hook.head_scores, by_fold.head_scores, rtol=1e-4, atol=1e-6)
    if method == "hones":
        torch.testing.assert_close(by_hook.head_log_probability, by_fold.head_log_probability)
    if by_hook.neuron_scores is not None:
        torch.testing.assert_close(by_hook.neuron_scores, by_fold.neuron_scores, rtol=1e-4, atol=1e-6)


def test_the_headline_names_the_best_way_that_is_not_the_exact_repair() -> None:
    rows = [
        {"scales": scales, "recovered": {"value": value}, "verdict": "better"}
        for scales, value in (("exact repair", 1.0), ("fixed", 0.25), ("tuned", 0.5), ("grid", None))
    ]
    report = {"rows": rows, "repairable": True, "metric": "acc", "undamaged": 0.9, "damaged": 0.4}
    assert headline(report) == "tuned recovers 50% of the planted loss: better"
    assert headline(report | {"repairable": False}).startswith("The damage is not clear")
    assert headline(report | {"rows": rows[:1]}) == "The damage is clear: acc falls from 0.900 to 0.400."


def test_the_command_writes_a_report_a_table_and_a_figure(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = own.command("spike-in", "--ranking", own.rankings / "hones", "--plant", "heads", "--heads", 3)
    given += ["--damp", "0.1", "--parts", "[2,1,4]", "--how", '["fixed"]', "--trials", "1", "--method", "dvp"]
    assert main([*given, "--out", str(tmp_path / "not")]) == 1
    line = own_answers.complaint(capsys.readouterr().err)
    assert "1 of the 4 images of own_a" in line
    assert "testing needs other images" in line
    ranked = ["--method", "hones", "--limit", 2, "--heads", 3, "--out", tmp_path / "ranking"]
    assert main(own.command("rank", *ranked)) == 0
    given[given.index(str(own.rankings / "hones"))] = str(tmp_path / "ranking")
    given[given.index("[2,1,4]")] = "[2,3,4]"
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "spike_in.json").read_text())
    assert len(report["planted"]) == 3
    assert [one["offset"] for one in report["examples"].values()] == [0, 2, 5]
    page = (tmp_path / "out" / "spike_in.md").read_text()
    assert "| exact repair |" in page
    assert "The same scales on random sites" in page
    assert (tmp_path / "out" / "spike_in.png").read_bytes().startswith(b"\x89PNG")
    assert "exact repair: recovered" in capsys.readouterr().out
    for flags, message in (
        (["--damp", "0"], "--damp 0: give a scale above 0"),
        (["--parts", "[1]"], "--parts"),
        (["--test_limit", "9"], "--test_limit has no effect with --parts"),
    ):
        assert main([*given, *flags, "--out", str(tmp_path / "not")]) == 1
        assert message in own_answers.complaint(capsys.readouterr().err)


def test_tuned_scales_are_the_mean_of_folds_that_were_learned_apart(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking
) -> None:
    """The held-out loss is that of a plain loop over folds, and the steering the mean of their scales.

    The end of the answer counts as a token, since `max_new_tokens` leaves room for it.
    """
    room = "max_new_tokens=5"
    examples = model.examples("own_a", include_path=own.tasks, offset=4, limit=8, gen_kwargs=room)
    settings = TuneSettings(rates=(0.05, 0.2), epochs=2, sparsity=0.1, folds=2)
    banks = {
        "heads": [Head(layer, head) for layer in range(4) for head in range(2)],
        "neurons": [Neuron(layer, neuron) for layer in range(4) for neuron in range(20)],
    }
    found = tune(
        ranking, model.replayer, examples, [*banks["heads"], *banks["neurons"]], settings, model.loop
    )
    folds = folds_by_image(examples, 2, settings.seed)
    assert sorted(index for fold in folds for index in fold) == list(range(8))
    shown = [{image for i in fold for image in examples[i].image_hashes} for fold in folds]
    assert not shown[0] & shown[1]
    losses = found.report["held_out_loss_by_kind_rate_and_epoch"]
    settled = [f"{kind}, {rate}" for kind in ("heads", "neurons") for rate in ("0.05", "0.2")]
    assert list(losses) == [f"{name}, {epoch}" for name in settled for epoch in (1, 2)]
    assert found.report["held_out_loss_without"] == pytest.approx(
        plain_loss(model, examples, list(range(8)), None), rel=1e-4
    )
    assert found.steering is not None
    best = min(losses, key=losses.__getitem__)
    assert found.report["held_out_loss"] == losses[best] < found.report["held_out_loss_without"]
    kind, rate, epoch = best.split(", ")
    learned = [
        fit(
            model.replayer,
            examples,
            banks[kind],
            settings.fit_settings(float(rate)),
            model.loop,
            [index for index in range(8) if index not in fold],
        ).epochs[int(epoch) - 1]
        for fold in folds
    ]
    measured = [
        plain_loss(model, examples, fold, found_in.neuron_scales, found_in.head_scales)
        for fold, found_in in zip(folds, learned, strict=True)
    ]
    assert found.report["held_out_loss"] == pytest.approx(sum(measured) / 2, rel=1e-3)
    heads, neurons = (torch.stack(scales).mean(0) for scales in zip(*(x[:2] for x in learned), strict=True))
    torch.testing.assert_close(found.steering.head_scales, heads)
    torch.testing.assert_close(found.steering.neuron_scales, neurons)
    assert found.report["kind"] == kind
    changed = int((heads != 1).sum()), int((neurons != 1).sum())
    assert changed[kind == "heads"] == 0, "only the chosen kind is scaled"
    assert found.report["scaled_sites"] == sum(changed) > 0
    assert not found.report["folds_disagree"]
    everything = list(range(8))
    assert found.report["loss_of_mean"] == pytest.approx(
        plain_loss(model, examples, everything, neurons, heads), rel=1e-3
    )


def test_a_mean_that_does_worse_than_its_folds_gives_way_to_scales_learned_from_all_images(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = part(model, own, 4, 8)
    settings = TuneSettings(rates=(0.2,), epochs=2, folds=2)
    bank = [Head(layer, head) for layer in range(4) for head in range(2)]
    monkeypatch.setattr("hones_eval.jobs.tune._mean", harmful_mean)
    found = tune(ranking, model.replayer, examples, bank, settings, model.loop)
    assert found.report["folds_disagree"]
    assert found.report["loss_of_mean"] > found.report["held_out_loss"]
    learned = fit(model.replayer, examples, bank, settings.fit_settings(0.2), model.loop)
    last = learned.epochs[found.report["best_epoch"] - 1]
    assert found.steering is not None
    torch.testing.assert_close(found.steering.head_scales, last.head_scales)


def test_a_smaller_rate_is_tried_where_the_default_helps_nowhere(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is so large here that every scale ends at 0 or at the ceiling."""
    examples, bank = part(model, own, 4, 8), [Head(layer, head) for layer in range(4) for head in range(2)]
    monkeypatch.setattr("hones_eval.jobs.tune.RATES", (400.0,))
    monkeypatch.setattr("hones_eval.jobs.tune.SMALLER_RATES", (0.2,))
    settings = TuneSettings(rates=(400.0,), epochs=2, folds=2)
    found = tune(ranking, model.replayer, examples, bank, settings, model.loop)
    assert found.report["rates"] == [400.0, 0.2]
    assert found.report["learning_rate"] == 0.2
    losses = found.report["held_out_loss_by_kind_rate_and_epoch"]
    assert list(losses) == [f"heads, {rate}, {epoch}" for rate in (400, 0.2) for epoch in (1, 2)]
    without = found.report["held_out_loss_without"]
    assert min(losses[f"heads, 400, {epoch}"] for epoch in (1, 2)) >= without > found.report["held_out_loss"]
    alone = dataclasses.replace(settings, rates=(0.2,))
    expected = tune(ranking, model.replayer, examples, bank, alone, model.loop).steering
    assert found.steering is not None
    assert expected is not None
    torch.testing.assert_close(found.steering.head_scales, expected.head_scales)
    given = dataclasses.replace(settings, rates=(300.0,))  # rates that were asked for are the only ones
    assert tune(ranking, model.replayer, examples, bank, given, model.loop).steering is None


def harmful_mean(ranking: Ranking, steerings: Sequence[Steering]) -> Steering:
    """Scales that take all heads out."""
    one = steerings[0]
    return scaling.of_sites(ranking, torch.zeros_like(one.head_scales), one.neuron_scales, {})


def plain_loss(
    model: api.Model,
    examples: TaskExamples,
    indices: list[int],
    neurons: torch.Tensor | None,
    heads: torch.Tensor | None = None,
    with_end: bool = True,
) -> float:
    """The mean cross-entropy of the targets' tokens, and of the answer's end, by independent hooks."""
    total = 0.0
    for index in indices:
        example = examples[index]
        handles = []
        for layer, block in enumerate(plain.layers(model.model)):
            for module, scales in ((block.self_attn.o_proj, heads), (block.mlp.down_proj, neurons)):
                if scales is not None:
                    row = scales[layer].repeat_interleave(module.in_features // scales.shape[1])
                    hook = module.register_forward_pre_hook(lambda _, args, row=row: (args[0] * row,))
                    handles.append(hook)
        ids = example.target_ids
        if with_end:
            end = model.model.generation_config.eos_token_id
            assert isinstance(end, int)
            ids = [*ids, end]
        longer = plain.with_answer(model.model, example.inputs, ids)
        start = example.inputs["input_ids"].shape[1]
        with torch.no_grad():
            logits = model.model(**longer).logits[0, start - 1 : -1]
        for handle in handles:
            handle.remove()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids)))
    return total / len(indices)


def test_held_out_losses_of_many_steerings_are_those_of_one_at_a_time(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking
) -> None:
    examples = part(model, own, 4, 4)
    steerings = {str(factor): scaling.fixed(ranking, factor, 0.2) for factor in (0.0, 3.0, -2.0)}
    losses = TargetLosses(model.replayer, [Fold(steerings, [1, 3])])
    totals = model.loop.run(examples, losses, "losses")
    assert int(totals.sums["examples"]) == 2
    found = (totals.sums["losses"] / 2).tolist()
    scales = [None, *(steering.neuron_scales for steering in steerings.values())]
    expected = [plain_loss(model, examples, [1, 3], one, with_end=False) for one in scales]
    assert found == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 4) for value in found}) == 4


def test_a_loss_that_is_not_finite_is_named_and_never_the_smallest(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking
) -> None:
    """A comparison with NaN is false, so that the scales with such a loss would be chosen as the best."""
    examples = part(model, own, 4, 2)
    steerings = {"plain": scaling.fixed(ranking, 2.0, 0.2), "huge": scaling.fixed(ranking, 2.0, 0.2)}
    object.__setattr__(steerings["huge"], "neuron_scales", steerings["huge"].neuron_scales * 1e38)
    losses = TargetLosses(model.replayer, [Fold(steerings, [0, 1])])
    with pytest.raises(HonesError, match=r"own_a, doc_id \d+, under the scales huge: the FFN activations of"):
        losses.measure(examples[0])


def test_a_strong_sparsity_keeps_every_scale_at_one_and_settings_are_checked(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking
) -> None:
    few = part(model, own, 4, 3)
    with pytest.raises(HonesError, match="3 development images are too few"):
        folds_by_image(few, 4, 0)
    for wrong in ({"ceiling": 1.0}, {"sparsity": 1.0}, {"rates": ()}, {"epochs": 0}, {"folds": 1}):
        with pytest.raises(HonesError):
            TuneSettings(**wrong)


def test_controls_are_the_same_scales_on_other_sites_of_the_same_layers(ranking: Ranking) -> None:
    steering = scaling.fixed(ranking, 4.0, 0.1)
    control = shuffled(steering, 1)
    assert torch.equal((control.neuron_scales != 1).sum(1), (steering.neuron_scales != 1).sum(1))
    assert not torch.equal(control.neuron_scales, steering.neuron_scales)
    planted = steering.neuron_scales == 4
    apart = shuffled(steering, 1, [Neuron(*site) for site in planted.nonzero().tolist()]).neuron_scales
    assert bool((apart[planted] == 1).all())
    assert torch.equal((apart == 4).sum(1), planted.sum(1))
    assert isinstance(control, Steering)
    worst = top_neurons(-ranking.neuron_scores, 3)
    assert standing(ranking, worst)["found"] == 0


def test_power_says_how_many_examples_a_difference_needs(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["power", "--tasks", "own_a", "--include_path", str(own.tasks), "--out", str(tmp_path)]
    assert main([*given, "--difference", "0.03", "--deviation", "0.5"]) == 0
    report = json.loads((tmp_path / "power.json").read_text())
    assert report["examples_by_share"]["0"] == 263
    assert report["examples_graded"] == 2181
    assert report["tasks"]["own_a"]["examples"] == 12
    out = capsys.readouterr().out
    assert "263 examples if 3% (gains alone) of the answers change" in out
    assert "own_a: 12 examples; the smallest difference found:" in out
    for wrong, message in (
        (["--difference", "3"], "--difference 3: give a number between 0 and 1"),
        (["--deviation", "0.5", "--examples", "0"], "--examples 0: give 1 or more"),
    ):
        assert main([*given, *wrong, "--overwrite"]) == 1
        assert message in own_answers.complaint(capsys.readouterr().err)


def plain_match_at_texts(model: api.Model, examples: TaskExamples, scales: torch.Tensor) -> float:
    """As `plain_match`, where only the text tokens of the prompt are scaled."""
    image = model.model.config.image_token_id
    ids: list[torch.Tensor] = []

    def hook(row: torch.Tensor) -> Any:
        def scale(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            if args[0].shape[1] == 1:
                return args
            return (torch.where((ids[-1] != image)[..., None], args[0] * row, args[0]),)

        return scale

    blocks = zip(plain.layers(model.model), scales, strict=True)
    handles = [block.mlp.down_proj.register_forward_pre_hook(hook(row)) for block, row in blocks]
    right = 0
    for i in range(len(examples)):
        ids.append(examples[i].inputs["input_ids"])
        tokens = model.model.generate(**examples[i].inputs, **examples[i].settings)[0]
        right += examples.decode(i, tokens[ids[-1].shape[1] :].tolist()).strip() == examples[i].target
    for handle in handles:
        handle.remove()
    return right / len(examples)


def test_the_damage_the_ranking_and_the_repair_act_in_the_scope(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking
) -> None:
    test = part(model, own, 8, 4)
    job = SpikeIn(
        ranking,
        model.replayer,
        model.loop,
        discovery=part(model, own, 4, 1),
        development=part(model, own, 6, 1),
        test=test,
        neurons=0.3,
        damp=0.01,
        method="atp",
        ways=("fixed",),
        trials=1,
        chosen_on_random=False,
        scope="text",
    )
    report = spike_in(job)
    damage = torch.ones_like(ranking.neuron_scores)
    for neuron in report["planted"]:
        damage[tuple(neuron)] = 0.01
    assert report["settings"]["scope"] == "text"
    assert report["damaged"] == plain_match_at_texts(model, test, damage)
    assert report["rows"][0]["value"] == report["undamaged"]


def test_losses_under_a_scope_are_those_of_a_steering_with_it(
    model: api.Model, own: own_answers.Prepared, ranking: Ranking
) -> None:
    """Both the losses of many steerings at once, and the loss that learned scales minimize."""
    examples, replayer = part(model, own, 0, 1), model.replayer.in_scope("last+generated")
    bank = ranking.neurons(0.3)
    steering = scaling.scaled_neurons(ranking, bank, 3.0, {})
    example = examples[0]
    inputs = Decoder(replayer).append_answer(example.inputs, example.settings, example.target_ids[:-1])
    count = len(example.target_ids)
    with (
        torch.no_grad(),
        steer(model.model, steering, scope="last+generated"),
        answer_follows(model.model, count - 1),
    ):
        read = model.model(**inputs, use_cache=False).logits[0, -count:].log_softmax(-1)
    expected = -float(read.gather(1, torch.tensor(example.target_ids)[:, None]).mean())
    sums = TargetLosses(replayer, [Fold({"steered": steering}, [0])]).measure(example).sums
    assert float(sums["losses"][1]) == pytest.approx(expected, rel=1e-4)
    assert abs(float(sums["losses"][0]) - expected) > 1e-3
    scales = LearnedScales(replayer.anatomy, bank)
    scales.a.data.fill_(2.0)
    loss = AnswerLoss(scales, Decoder(replayer), beta=0.0)(example)
    assert float(loss.cross_entropy) == pytest.approx(expected, rel=1e-4)
    loss.total.backward()
    assert bool(scales.a.grad.any())


def test_a_scope_that_a_method_does_not_know_is_refused(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = own.command("spike-in", "--ranking", own.rankings / "hones", "--parts", "[2,3,4]")
    for flags, message in (
        (["--method", "dvp", "--scope", "last"], "--scope only applies to --method"),
        (["--scope", "imge"], "scope='imge' is unknown"),
    ):
        assert main([*given, *flags, "--out", str(tmp_path / "not")]) == 1
        assert message in own_answers.complaint(capsys.readouterr().err)
    scale = ["scale", "--ranking", str(own.rankings / "hones"), "--how", "fixed", "--scope", "last"]
    assert main([*scale, "--out", str(tmp_path / "not")]) == 1
    assert "only applies to scales that are chosen on --tasks" in own_answers.complaint(
        capsys.readouterr().err
    )
