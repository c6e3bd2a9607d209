"""Through the commands: what cannot be measured is counted, named with its place, and never passed over."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_answers
import pytest
import torch
from drawn_data import write_folder
from transformers import LlavaForConditionalGeneration

from hones_eval.__main__ import main
from hones_eval.core.ranking import Ranking

pytestmark = pytest.mark.usefixtures("models_loaded_once")


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture
def complains(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 1
        return own_answers.complaint(capsys.readouterr().err)

    return run


def commands(own: own_answers.Prepared, out: Path, task: str = "own_a") -> dict[str, list[str]]:
    """Whatever runs a model, on one example each."""

    def command(name: str, *more: Any) -> list[str]:
        return own.command(name, *more, "--limit", 1, "--offset", 6, "--out", out, task=task)

    held_out = ["--ranking", own.rankings / "hones"]
    ranked = {
        f"rank {one}": command("rank", "--method", one, "--heads", 4)
        for one in ("hones", "vseam", "dvp", "activation")
    }
    chosen = {
        f"scale {how}": command("scale", *held_out, "--how", how) for how in ("grid", "search", "learned")
    }
    return {**ranked, "verify": command("verify", *held_out, "--trials", 2), **chosen}


def test_without_a_helpful_head_neurons_are_those_that_write_most(
    own: own_answers.Prepared,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    complains: Callable[[list[str]], str],
) -> None:
    """A task that any answer satisfies, so that no head's replacement costs anything."""
    tasks = shutil.copytree(own.tasks, tmp_path / "tasks")
    text = (tasks / "own_a.yaml").read_text().replace("task: own_a", "task: own_easy")
    text = text.replace("exact_match", "said").replace(
        "metric_list:", "process_results: !function utils.results\nmetric_list:"
    )
    (tasks / "own_easy.yaml").write_text(text)
    with (tasks / "utils.py").open("a") as utils:
        utils.write("\n\ndef results(doc, answers):\n    return {'said': float(answers[0] != '~')}\n")
    easy = own._replace(tasks=tasks)
    for method in ("hones", "dvp"):
        out = ["--method", method, "--limit", 2, "--heads", 4, "--neurons", 0.05, "--out", tmp_path / method]
        assert main(easy.command("rank", *out, task="own_easy")) == 0
        said = capsys.readouterr().out
        assert ("no head's replacement lowers the metric" in said) == (method == "hones"), said
    hones, dvp = (Ranking.load(tmp_path / method) for method in ("hones", "dvp"))
    assert hones.report["heads_with_positive_score"] == 0
    assert not hones.head_scores.any()
    torch.testing.assert_close(hones.neuron_scores, dvp.neuron_scores)
    zeroed = ["--ranking", tmp_path / "hones", "--sites", "heads", "--offset", 4, "--out", tmp_path / "v"]
    line = complains(easy.command("verify", *zeroed, task="own_easy"))
    assert "no head of this ranking has a score above 0" in line


def test_neurons_that_the_model_has_not_are_refused_with_both_sides(
    own: own_answers.Prepared, tmp_path: Path, complains: Callable[[list[str]], str]
) -> None:
    made = Ranking.load(own.rankings / "hones")
    wide = torch.nn.functional.pad(made.neuron_scores, (0, 8))
    wide[2, -1] = 9.0  # the best neuron is one that the model has not
    shape = dataclasses.replace(made.provenance.shape, neurons=wide.shape[1])
    source = dataclasses.replace(made.provenance, shape=shape)
    dataclasses.replace(made, provenance=source, neuron_scores=wide).save(tmp_path / "hones")
    other = own._replace(rankings=tmp_path)
    for name, given in commands(other, tmp_path / "out").items():
        if not name.startswith("rank"):
            line = complains(given)
            assert f"neurons: {wide.shape[1]} here, {wide.shape[1] - 8} there" in line, name
            assert not (tmp_path / "out").exists()


def test_examples_without_an_answer_are_counted_everywhere(
    own: own_answers.Prepared, tmp_path: Path, complains: Callable[[list[str]], str]
) -> None:
    own_answers.write_splits(own.tasks, tmp_path / "tasks", {"": (0, 12)}, without_answer=[7, 10])
    untold = own._replace(tasks=tmp_path / "tasks")
    for name, given in commands(untold, tmp_path / "out").items():
        given[given.index("--limit") + 1] = "6"
        line = complains(given)
        assert "task own_a: 2 of 6 examples have no gold answer, the first is doc_id 7" in line, name
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def broken_args(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint with one weight of layer 1's FFN infinite."""
    folder = shutil.copytree(llava_checkpoint, tmp_path_factory.mktemp("broken") / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.get_decoder().layers[1].mlp.up_proj.weight.data[5] = float("inf")
    model.save_pretrained(folder)
    return f"pretrained={folder}"


def test_activations_that_are_not_finite_are_named_with_their_layer(
    own: own_answers.Prepared, broken_args: str, tmp_path: Path, complains: Callable[[list[str]], str]
) -> None:
    broken = own._replace(model_args=broken_args)
    for name, given in commands(broken, tmp_path / "out").items():
        line = complains(given)
        assert re.search(r"own_a,? \w+ 6\b.*: the FFN activations of layer 1 are not finite", line), name
        assert not list((tmp_path / "out").glob("*.json"))


def test_margins_that_are_not_finite_are_named_with_their_layer(
    own: own_answers.Prepared,
    broken_args: str,
    tmp_path: Path,
    complains: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(write_folder(tmp_path / "drawn", 4)))
    broken = own._replace(model_args=broken_args)
    for name in ("rank hones", "verify"):
        given = commands(broken, tmp_path / "out", task="hones_retrieval")[name]
        given[given.index("--limit") + 1], given[given.index("--offset") + 1] = "16", "0"
        line = complains(given)
        assert re.search(r"doc_id 0\b.*: the FFN activations of layer 1 are not finite", line), line


def test_captions_without_references_are_counted(
    own: own_answers.Prepared,
    tmp_path: Path,
    complains: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_folder(tmp_path / "drawn", 5)
    content = json.loads((folder / "drawn.json").read_text())
    for number in (1, 3):
        content["data"][number]["captions"] = []
    (folder / "drawn.json").write_text(json.dumps(content))
    monkeypatch.setenv("HONES_EVAL_DATA", str(folder))
    for name, given in commands(own, tmp_path / "out", task="hones_caption").items():
        line = complains(given)
        assert "entry 1 (drawn_1.png): it has no captions; so it is with 2 of 5 entries" in line, name
        assert not (tmp_path / "out").exists()


def test_a_model_with_nothing_to_lose_is_said(
    own: own_answers.Prepared,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(write_folder(tmp_path / "drawn", 4)))
    warning = "the unmasked model already scores 0, so a zero drop is uninformative"
    for task, base in (("hones_ocr", 0.0), ("own_a", 1.0)):
        given = commands(own, tmp_path / task, task=task)["verify"]
        given[given.index("--offset") + 1] = "4" if task == "own_a" else "0"
        assert main(given) == 0
        report = json.loads((tmp_path / task / "verify.json").read_text())
        assert report["baseline"]["metric"] == base
        assert (warning in report["warnings"]) == (base == 0)
        assert (f"warning: {warning}" in capsys.readouterr().out) == (base == 0)
