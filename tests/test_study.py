"""The whole experiment through the command, on tasks whose gold answers come from a small model."""

import csv
import dataclasses
import json
from pathlib import Path

import families
import own_answers
import pytest

from hones_eval.__main__ import main
from hones_eval.core.ranking import Ranking
from hones_eval.core.steering import Steering
from hones_eval.jobs.study import WAYS, fallbacks

METHODS = ["hones", "dvp", "entropy"]


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def splits(own: own_answers.Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tasks, each cut into three image-disjoint splits."""
    folder = tmp_path_factory.mktemp("splits") / "tasks"
    own_answers.write_splits(own.tasks, folder, {"_discovery": (0, 4), "_development": (4, 7), "": (7, 12)})
    return folder


def arguments(own: own_answers.Prepared, splits: Path, out: Path, *others: str) -> list[str]:
    given = own.command(
        "study", "--shifted", "", "--methods", json.dumps(METHODS), "--out", out, task="own_a,own_b"
    )
    given[given.index("--include_path") + 1] = str(splits)
    return [*given, "--heads", "4", "--neurons", "0.05", "--trials", "2", *others]


def test_a_study_matches_its_parts_and_a_second_run_reuses_them(
    own: own_answers.Prepared, splits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(own, splits, tmp_path)) == 0
    report = json.loads((tmp_path / "study.json").read_text())
    with (tmp_path / "steering.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["steering"]) == 2 * 2 * len(WAYS)
    assert [row["method"] for row in report["attribution"]][: len(METHODS)] == METHODS
    assert len(report["attribution"]) == 2 * (len(METHODS) + 1)
    page = (tmp_path / "study.md").read_text()
    assert "## Test" in page
    assert "- only 2 random banks were masked" in page
    assert "## Shifted" not in page
    assert {row["verdict"] for row in report["steering"]} == {"too few"}  # five test images
    assert {row["units"] for row in report["steering"]} == {5}
    assert "too few on 2 of 2 tasks" in page
    assert "Power: with so few examples no gain would be found" in page
    _masking_is_that_of_verify(report, own, splits, tmp_path)
    scores = Ranking.load(tmp_path / "rankings" / "own_a" / "hones")
    fixed = Steering.load(tmp_path / "steerings" / "own_a" / "fixed")
    assert sorted(map(tuple, (fixed.neuron_scales != 1).nonzero().tolist())) == sorted(scores.neurons())
    grid = Steering.load(tmp_path / "steerings" / "own_b" / "grid")
    assert [one.task for one in grid.provenance.examples] == ["own_b_discovery", "own_b_development"]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/own_a/*/*.json")}
    assert main(arguments(own, splits, tmp_path)) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((tmp_path / "study.json").read_text()) == report
    _transfers_to_another_task(report, own, splits, tmp_path)
    for figure in ("gains", "side_effects"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    for other, folder in (
        (["--limit", "3"], "rankings/own_a/hones"),
        (["--heads", "5"], "rankings/own_a/hones"),
        (["--factor", "3"], "steerings/own_a/fixed"),
        (["--learning_rate", "0.1"], "steerings/own_a/learned"),
    ):
        capsys.readouterr()
        assert main(arguments(own, splits, tmp_path, *other)) == 1
        said = own_answers.complaint(capsys.readouterr().err)
        assert f"{folder} was made with other examples or settings" in said
    other_weights = families.save_checkpoint("llava", tmp_path / "model", seed=5)
    replaced = own._replace(model_args=f"pretrained={other_weights}")
    assert main(arguments(replaced, splits, tmp_path)) == 1
    said = own_answers.complaint(capsys.readouterr().err)
    assert "rankings/own_a/hones was made with another model" in said


def _transfers_to_another_task(before: dict, own: own_answers.Prepared, splits: Path, folder: Path) -> None:
    assert main(arguments(own, splits, folder, "--shifted", "own_a=own_b")) == 0
    report = json.loads((folder / "study.json").read_text())
    found = {row["how"]: row for row in report["steering"] if row["split"] == "shifted"}
    assert {row["tested_on"] for row in found.values()} == {"own_b"}
    known = [
        row for row in before["steering"] if (row["chosen_for"], row["measured_on"]) == ("own_a", "own_b")
    ]
    assert {row["how"]: row["gain"] for row in known} == {how: row["gain"] for how, row in found.items()}
    assert "## Shifted" in (folder / "study.md").read_text()


def _masking_is_that_of_verify(report: dict, own: own_answers.Prepared, splits: Path, folder: Path) -> None:
    ranking = folder / "rankings" / "own_a" / "hones"
    given = own.command("verify", "--ranking", ranking, "--trials", 2, "--out", folder / "verified")
    given[given.index("--include_path") + 1] = str(splits)
    assert main(given) == 0
    alone = json.loads((folder / "verified" / "verify.json").read_text())
    mine = report["attribution"][0]
    assert (mine["task"], mine["method"]) == ("own_a", "hones")
    assert mine["drop"] == pytest.approx(alone["banks"]["selected"]["metric_drop"]["value"])
    assert report["attribution"][len(METHODS)]["drop"] == pytest.approx(
        alone["random"]["metric"]["drop_mean"]
    )


def test_a_study_rejects_test_images_that_were_used_for_choosing(
    own: own_answers.Prepared, splits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_answers.write_splits(
        own.tasks, tmp_path / "t", {"_discovery": (0, 4), "_development": (4, 7), "": (6, 12)}
    )
    assert main(arguments(own, tmp_path / "t", tmp_path / "out")) == 1
    assert "1 of the 6 images of own_a" in own_answers.complaint(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert main(arguments(own, tmp_path / "t", tmp_path / "out", "--shifted", "own_c=own_b")) == 1
    assert "--shifted own_c=own_b: give TASK=OTHER" in own_answers.complaint(capsys.readouterr().err)
    assert main(arguments(own, tmp_path / "t", tmp_path / "out", "--methods", '["dvp"]')) == 1
    assert "must include hones" in own_answers.complaint(capsys.readouterr().err)
    assert main(arguments(own, splits, tmp_path / "out", "--trials", "1")) == 1
    assert "--trials 1: estimating how much random banks differ" in own_answers.complaint(
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_task_can_have_its_own_limits(
    own: own_answers.Prepared, splits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--limits", '{"own_b": 2}', "--test_limit", "5", "--test_limits", '{"own_a": 4}']
    assert main(arguments(own, splits, tmp_path, "--methods", '["hones"]', *few)) == 0
    report = json.loads((tmp_path / "study.json").read_text())
    assert report["examples"] == {
        "own_a": {"test": 4, "development": 3},
        "own_b": {"test": 5, "development": 2},
    }
    counts = [Ranking.load(tmp_path / "rankings" / one / "hones").provenance for one in ("own_a", "own_b")]
    assert [one.examples[0].count for one in counts] == [4, 2]
    capsys.readouterr()
    assert main(arguments(own, splits, tmp_path, "--tasks", "own_a")) == 1
    said = own_answers.complaint(capsys.readouterr().err)
    assert "entropy compares tasks, and --tasks own_a is one: leave it out" in said
    assert main(arguments(own, splits, tmp_path, "--limits", '{"own_c": 2}')) == 1
    said = own_answers.complaint(capsys.readouterr().err)
    assert "--limits names own_c, which is not one of --tasks own_a,own_b" in said


def test_a_task_without_a_helpful_head_is_named(own: own_answers.Prepared) -> None:
    ranking = Ranking.load(own.rankings / "hones")
    none = dataclasses.replace(ranking, report=ranking.report | {"heads_with_positive_score": 0})
    (note,) = fallbacks({"own_a": ranking, "own_b": none})
    assert note.startswith("own_b: replacing a head never lowers the metric")
