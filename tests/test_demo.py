"""The whole job by one command: on drawn scenes, and on real photographs where they are at hand."""

import csv
import json
import re
from pathlib import Path

import edited
import pytest
from make_logs import Questions, Steered, write_run

from hones_eval.__main__ import main

KEPT = ("indoor", "color", "action")


def test_on_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--examples", "6"]) == 0
    rows = board_of(tmp_path / "demo")
    assert {row["task"] for row in rows} >= {"scenes_vqa_relation", "scenes_ocr"}
    assert all(row["n"] == "24" for row in rows)
    assert float(rows[0]["baseline"]) > 0
    told = capsys.readouterr().out
    assert f"the whole story: {tmp_path / 'demo' / 'index.html'}" in told
    story = (tmp_path / "demo" / "index.html").read_text()
    answer = next(line for line in told.splitlines() if line.startswith("Did it help? ") and ":" in line)
    assert f'<h1 class="text">{answer.removesuffix(".").partition("; ")[0]}</h1>' in story
    for step in ("ranking", "verify", "steering", "board"):
        assert f'<a href="{step}/index.html">' in story
        page = (tmp_path / "demo" / step / "index.html").read_text()
        headline = re.search(r"<h1[^>]*>(.*?)</h1>", page)
        assert headline is not None
        assert step == "board" or headline[1] in story
    assert "random neurons cost" in story


def test_on_photographs(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", "")  # set by the command; given back afterwards
    out = tmp_path / "demo"
    for name, steered in (("baseline", None), ("steered", Steered())):  # an earlier demo of another task
        write_run(out / "logs" / name, Questions.drawn("earlier", 20), ["yes"] * 20, steered=steered)
    assert main(["demo", "--out", str(out), "--photos", str(photos), "--examples", "6"]) == 0
    assert [row["task"] for row in board_of(out)] == ["hones_vqa_test"]
    assert "shows the path" in capsys.readouterr().out
    ranking = json.loads((out / "ranking" / "ranking.json").read_text())
    steering = json.loads((out / "steering" / "steering.json").read_text())
    assert steering["ranking"]["digest"] == ranking["digest"]


def test_the_whole_v_seam_path_on_photographs(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Edit, trace, rank, rescale, evaluate, leaderboard; heads of one category are tested on others."""
    monkeypatch.setenv("HONES_EVAL_DATA", "")
    out = tmp_path / "demo"
    kept = [row for row in json.loads((photos / "vseam_pairs.json").read_text()) if row["category"] in KEPT]
    (tmp_path / "pairs.json").write_text(json.dumps(kept))
    assert (
        main(
            ["demo", "--out", str(out), "--questions", str(tmp_path / "pairs.json"), "--photos", str(photos)]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "shows the path" in said
    assert "not editable pair-action" in said
    assert "5. Evaluate" in said
    story = (out / "index.html").read_text()
    assert "2 edits accepted, 0 rejected, 1 not editable" in story
    assert re.search(r"recovers most at layer \d|no share of a logit difference to recover", story)
    assert "8 heads help, 8 hurt" in story
    edits = {row["category"]: row for row in json.loads((out / "edits" / "vseam_pairs.json").read_text())}
    assert set(edits) == {"indoor", "color"}
    trace = json.loads((out / "trace" / "trace.json").read_text())
    assert {"vseam_indoor", "vseam_color"} == {one["clean_task"] for one in trace["categories"]}
    ranking = json.loads((out / "ranking" / "ranking.json").read_text())
    steering = json.loads((out / "steering" / "steering.json").read_text())
    assert steering["ranking"]["digest"] == ranking["digest"]
    rows = board_of(out)
    assert {(row["task"], row["n"]) for row in rows} == {("vseam_color_both", "2")}
    assert {row["metric"] for row in rows} >= {"accuracy", "balanced_accuracy"}


def test_questions_of_which_none_can_be_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = edited.write(tmp_path, [edited.record(object_positions=[])])
    assert main(["demo", "--out", str(tmp_path / "demo"), "--questions", str(questions)]) == 1
    assert "none of 1 records could be edited: q1: it has no box for 'ball'" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "trace").exists()


def test_photographs_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--photos", str(tmp_path / "nothing")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def board_of(folder: Path) -> list[dict[str, str]]:
    page = (folder / "board" / "index.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    with (folder / "board" / "leaderboard.csv").open(newline="") as file:
        return list(csv.DictReader(file))
