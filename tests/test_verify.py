"""Masking on held-out examples, compared with a plain loop with its own hooks, through the command."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own_answers
import plain
import pytest
import torch
from scipy import stats

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.jobs import verify as verify_module
from hones_eval.jobs.verify import Measured, Verification, verify
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.banks import few_trials, head_banks, neuron_banks
from hones_eval.runs.lightning import Loop
from hones_eval.stats import verdicts
from hones_eval.stats.clusters import by_images
from hones_eval.stats.resampling import resample_means, resample_metric, resample_results

WRAPPER = own_answers.MODEL


@pytest.fixture(scope="module")
def arguments(llava_checkpoint: Path) -> str:
    return f"pretrained={llava_checkpoint}"


@pytest.fixture(scope="module")
def own(arguments: str, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), arguments)


@pytest.fixture(scope="module")
def tasks(own: own_answers.Prepared) -> Path:
    return own.tasks


@pytest.fixture(scope="module")
def rankings(own: own_answers.Prepared) -> Path:
    return own.rankings


@pytest.fixture(scope="module")
def command(own: own_answers.Prepared) -> Callable[..., list[str]]:
    return own.command


@pytest.fixture(scope="module")
def lmm(arguments: str) -> Any:
    return load_lmm(WRAPPER, arguments)


def held_out(lmm: Any, tasks: Path, offset: int = 4, limit: int = 8) -> TaskExamples:
    return TaskExamples(lmm, "own_a", model_name=WRAPPER, include_path=tasks, offset=offset, limit=limit)


@contextmanager
def zeroed(modules: list[Any], places: list[tuple[int, slice | int]]) -> Iterator[None]:
    """Set some features of the inputs of some modules to zero."""

    def hook(place: slice | int) -> Callable[..., tuple[torch.Tensor]]:
        def zero(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            x = args[0].clone()
            x[:, :, place] = 0
            return (x,)

        return zero

    handles = [modules[layer].register_forward_pre_hook(hook(place)) for layer, place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_values(lmm: Any, examples: TaskExamples, modules: list[Any], places: list[Any]) -> list[float]:
    """Exact match, probability of the first target token, and first-token accuracy."""
    model = inner_model(lmm)
    rows = []
    for i in range(len(examples)):
        example = examples[i]
        with zeroed(modules, places), torch.no_grad():
            tokens = model.generate(**example.inputs, **example.settings)
            logits = model(**example.inputs).logits[0, -1].float()
        text = examples.decode(i, tokens[0, example.inputs["input_ids"].shape[1] :].tolist())
        p = float(logits.softmax(-1)[example.target_ids[0]])
        rows.append([float(text.strip() == example.target), p, float(logits.argmax() in example.target_ids)])
    return np.mean(rows, axis=0).tolist()


@pytest.mark.parametrize("method", ["hones", "vseam"])
def test_the_command_reports_the_values_of_a_plain_loop(
    method: str,
    command: Callable[..., list[str]],
    rankings: Path,
    lmm: Any,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = ["--ranking", rankings / method, "--offset", 4, "--heads", 3, "--trials", 2, "--out", tmp_path]
    assert main(command("verify", *chosen)) == 0
    report = json.loads((tmp_path / "verify.json").read_text())
    (warning,) = (one for one in report["warnings"] if "random banks" in one)
    assert warning.startswith("only 2 random banks were masked")
    lines = capsys.readouterr().out.splitlines()
    assert f"warning: {warning}" in lines
    banks = [bank for name, bank in report["banks"].items() if not name.startswith("random")]
    assert {bank["metric_drop"]["verdict"] for bank in banks} == {"too few"}  # eight images
    assert any("too few; 8 independent examples find" in line for line in lines)
    assert (tmp_path / "verify.png").read_bytes().startswith(b"\x89PNG")
    ranking, examples, model = Ranking.load(rankings / method), held_out(lmm, tasks), inner_model(lmm)
    layers = plain.layers(model)
    if method == "hones":
        modules = [layer.mlp.down_proj for layer in layers]
        banks: dict[str, Any] = dict(neuron_banks(ranking, None, 2, seed=0))
        places = {name: [tuple(site) for site in bank] for name, bank in banks.items()}
    else:
        modules = [layer.self_attn.o_proj for layer in layers]
        banks = dict(head_banks(ranking, 3, 2, seed=0))
        width = ranking.provenance.shape.head_width
        places = {
            name: [(layer, slice(head * width, (head + 1) * width)) for layer, head in bank]
            for name, bank in banks.items()
        }
    assert report["bank_sizes"] == {name: len(bank) for name, bank in banks.items()}
    base = plain_values(lmm, examples, modules, [])
    names = ("metric", "probability", "accuracy")
    assert [report["baseline"][name] for name in names] == pytest.approx(base, abs=1e-5)
    drops = {}
    for bank, sites in places.items():
        if not sites:
            continue
        values = plain_values(lmm, examples, modules, sites)
        assert [report["banks"][bank][name] for name in names] == pytest.approx(values, abs=1e-5)
        drops[bank] = np.array(base) - values
        found = [report["banks"][bank][f"{name}_drop"]["value"] for name in names]
        assert found == pytest.approx(drops[bank].tolist(), abs=1e-5)
        assert report["banks"][bank]["relative_drop"]["value"] == pytest.approx(drops[bank][0] / base[0])
    random = np.mean([drops["random 1"], drops["random 2"]], axis=0)
    spreads = [report["random"][name]["drop_sd"] for name in names]
    assert spreads == pytest.approx(np.abs(drops["random 1"] - drops["random 2"]) / 2**0.5, abs=1e-5)
    for bank in report["beyond_random"]:
        beyond = [report["beyond_random"][bank][name]["value"] for name in names]
        assert beyond == pytest.approx((drops[bank] - random).tolist(), abs=1e-5)
    assert any(drop[1] != 0 for drop in drops.values())


def test_images_of_the_ranking_are_rejected_with_their_count(
    command: Callable[..., list[str]], rankings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--ranking", rankings / "hones", "--offset", 2, "--limit", 6, "--out", tmp_path]
    assert main(command("verify", *chosen)) == 1
    line = own_answers.complaint(capsys.readouterr().err)
    assert "2 of the 6 images of own_a" in line
    assert line.endswith("choose another split, or set --offset and --limit")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trials", [1, 0])
def test_fewer_than_two_random_banks_are_rejected(
    trials: int,
    command: Callable[..., list[str]],
    rankings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = ["--ranking", rankings / "hones", "--offset", 4, "--trials", trials, "--out", tmp_path]
    assert main(command("verify", *chosen)) == 1
    assert (
        f"--trials {trials}: estimating how much random banks differ needs at least 2"
        in own_answers.complaint(capsys.readouterr().err)
    )
    assert not list(tmp_path.iterdir())


def test_five_random_banks_are_enough() -> None:
    assert few_trials(5) is None
    assert few_trials(4) is not None


def test_examples_without_an_answer_are_counted_and_the_first_is_named(
    command: Callable[..., list[str]],
    rankings: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own_answers.write_splits(tasks, tmp_path / "tasks", {"": (0, 12)}, without_answer=[9, 11])
    given = command("verify", "--ranking", rankings / "hones", "--out", tmp_path / "out")
    given[given.index("--include_path") + 1] = str(tmp_path / "tasks")
    assert main(given) == 1
    line = own_answers.complaint(capsys.readouterr().err)
    assert "task own_a: 2 of 12 examples have no gold answer, the first is doc_id 9" in line


def test_another_question_about_a_known_image_is_rejected_too(
    command: Callable[..., list[str]], rankings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command("verify", "--ranking", rankings / "hones", "--limit", 6, "--out", tmp_path)
    assert main([one if one != "own_a" else "own_b" for one in given]) == 1
    assert "4 of the 6 images of own_b" in capsys.readouterr().err


def job(lmm: Any, tasks: Path, ranking: Ranking, **others: Any) -> Verification:
    replayer = Replayer(Anatomy.of(inner_model(lmm)))
    return Verification(ranking, replayer, held_out(lmm, tasks), Loop("cpu", progress=False), **others)


def test_bad_banks_are_rejected(lmm: Any, tasks: Path, rankings: Path) -> None:
    ranking = Ranking.load(rankings / "hones")
    shape = replace(ranking.provenance.shape, neurons=7)
    other = replace(
        ranking, provenance=replace(ranking.provenance, shape=shape), neuron_scores=torch.zeros(4, 7)
    )
    with pytest.raises(HonesError, match=r"neurons: 7 here, \d+ there"):
        verify(job(lmm, tasks, other))
    with pytest.raises(HonesError, match="no neuron scores"):
        verify(job(lmm, tasks, Ranking.load(rankings / "vseam"), sites="neurons"))
    nothing = replace(ranking, head_scores=torch.zeros_like(ranking.head_scores))
    with pytest.raises(HonesError, match="no head of this ranking has a score above 0"):
        verify(job(lmm, tasks, nothing, sites="heads"))


@pytest.mark.parametrize("correction", ["holm", "benjamini_hochberg"])
def test_the_correction_of_a_report_is_the_one_asked_for(
    correction: Any, lmm: Any, tasks: Path, rankings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the metric, the probability and the accuracy of every chosen bank together."""
    monkeypatch.setattr(verdicts, "FEWEST_UNITS", 2)  # the held-out part has eight images
    report = verify(job(lmm, tasks, Ranking.load(rankings / "vseam"), trials=2, correction=correction))
    assert report["correction"] == correction
    rows = [
        bank[f"{what}_drop"]
        for what in ("metric", "probability", "accuracy")
        for name, bank in report["banks"].items()
        if not name.startswith("random")
    ]
    tested = [row for row in rows if row["p"] is not None]
    assert len(tested) > 2
    p = [row["p"] for row in tested]
    if correction == "holm":
        expected = verdicts.holm(p)
    else:
        expected = stats.false_discovery_control(p, method="bh").tolist()
    assert [row["p_adjusted"] for row in tested] == pytest.approx(expected)
    assert [row["p_adjusted"] for row in tested] != pytest.approx(p)


def test_random_banks_are_pooled_over_their_seeds(
    lmm: Any, tasks: Path, rankings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example counts once, with its mean over the banks; the p-value is that of all sign flips."""
    kept: list[Any] = []

    class Kept(Measured):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            kept.append(self)

    monkeypatch.setattr(verify_module, "Measured", Kept)
    monkeypatch.setattr(verdicts, "FEWEST_UNITS", 2)
    report = verify(job(lmm, tasks, Ranking.load(rankings / "hones"), trials=3))
    (measured,) = kept
    columns = [k for k, name in enumerate(measured.names) if name.startswith("random")]
    assert len(columns) == 3
    for what in ("probability", "metric"):
        values = measured.first[what] if what == "probability" else measured.by_example[0]
        drops = values[:, 0] - values[:, columns].mean(1)
        pooled = report["random"][what]["pooled"]
        assert pooled["value"] == pytest.approx(report["random"][what]["drop_mean"], abs=1e-12)
        assert pooled["value"] == pytest.approx(drops.mean(), abs=1e-12)
        assert pooled["low"] <= drops.mean() <= pooled["high"]
        if not drops.any():
            continue
        flips = np.array([*itertools.product((-1, 1), repeat=len(drops))]) @ drops
        exact = float((np.abs(flips) >= abs(drops.sum()) - 1e-12).mean())
        assert pooled["p"] == pytest.approx(exact, abs=0.02)
        assert pooled["p_adjusted"] == pooled["p"]


def test_pooling_a_corpus_metric_takes_the_mean_of_its_values() -> None:
    """Three answers under two banks: the mean of two corpus values, not that of all answers together."""
    measured = object.__new__(Measured)
    measured.names, measured.sign, measured.seed, measured.clusters = ["baseline", "a", "b"], 1.0, 0, None
    measured.aggregate = lambda results: float(np.prod([1 + x for x in results]))
    measured.results = [[1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]
    measured.by_example, measured.first = None, {}
    found = measured.pooled(["a", "b"])
    assert found.comparison.difference == pytest.approx((2 * 2 * 1 + 1 * 3 * 2) / 2 - 2 * 3 * 1)
    same = measured.pooled(["baseline", "never measured"])
    assert same.comparison.difference == 0


def test_weights_that_are_not_finite_are_named(lmm: Any, tasks: Path, rankings: Path) -> None:
    weight = plain.layers(inner_model(lmm))[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        work = job(lmm, tasks, Ranking.load(rankings / "hones"))
        weight.data[0, 0] = float("nan")
        with pytest.raises(
            HonesError, match=r"own_a, doc_id 4, under baseline: the FFN activations of layer \d are not"
        ):
            verify(work)
    finally:
        weight.data.copy_(kept)


def test_random_heads_are_other_heads_and_as_many(rankings: Path) -> None:
    ranking = Ranking.load(rankings / "vseam")
    banks = head_banks(ranking, 3, 5, seed=0)
    taken = {*banks.get("positive", []), *banks.get("negative", [])}
    drawn = [set(banks[f"random {i}"]) for i in range(1, 6)]
    assert all(len(bank) == 3 and not bank & taken for bank in drawn)
    assert len({tuple(sorted(bank)) for bank in drawn}) > 1
    assert all(isinstance(head, Head) for head in banks["random 1"])


def test_intervals_of_means_match_scipy_and_resample_whole_images() -> None:
    generator = np.random.default_rng(0)
    values = generator.random((60, 2))
    each = resample_means(values, np.arange(60), seed=1)
    found = each.estimate(lambda v: v[..., 0] - v[..., 1])
    theirs = stats.bootstrap(
        (values[:, 0] - values[:, 1],), np.mean, n_resamples=9999, rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.value == pytest.approx((values[:, 0] - values[:, 1]).mean())
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.006)
    doubled = resample_means(np.repeat(values, 2, axis=0), np.repeat(np.arange(60), 2), seed=1)
    assert doubled.estimate(lambda v: v[..., 0]).low == pytest.approx(
        each.estimate(lambda v: v[..., 0]).low, abs=1e-9
    )


def test_a_ratio_of_zero_has_no_value_and_says_so() -> None:
    values = np.zeros((10, 2))
    ratio = resample_means(values, np.arange(10)).estimate(lambda v: (v[..., 0] - v[..., 1]) / v[..., 0])
    assert ratio.value is None
    assert "zero" in ratio.note
    constant = resample_means(np.ones((10, 2)), np.arange(10)).estimate(lambda v: v[..., 0] - v[..., 1])
    assert (constant.value, constant.low) == (0, None)
    assert constant.note


def test_a_recomputed_corpus_metric_agrees_with_the_mean_where_it_is_a_mean() -> None:
    generator = np.random.default_rng(3)
    values = generator.random((40, 2))
    items = [[{"m": float(v)} for v in column] for column in values.T]
    mean = resample_results("m", lambda rs: float(np.mean([r["m"] for r in rs])), items, np.arange(40))
    again = resample_metric(
        lambda rs: float(np.mean([r["m"] for r in rs])), items, np.arange(40), resamples=999
    )
    a, b = (one.estimate(lambda v: v[..., 0] - v[..., 1]) for one in (mean, again))
    assert a.value == pytest.approx(b.value)
    assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.03)
    top = resample_results("m", lambda rs: max(r["m"] for r in rs), items, np.arange(40))
    assert top.observed.tolist() == pytest.approx(values.max(axis=0).tolist())
    assert len(top.boot) == 199


def test_examples_of_the_same_images_share_a_number() -> None:
    assert by_images([["x"], ["y"], ["x"], [], []]).tolist() == [0, 1, 0, 2, 3]
