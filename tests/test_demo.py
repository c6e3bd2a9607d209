"""The whole job by one command: on drawn scenes, and on real photographs where they are at hand."""

import csv
import json
from pathlib import Path

import pytest

from hones_eval.__main__ import main


def test_on_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--examples", "6"]) == 0
    rows = board_of(tmp_path / "demo")
    assert {row["task"] for row in rows} >= {"scenes_vqa_relation", "scenes_ocr"}
    assert all(row["n"] == "24" for row in rows)
    assert float(rows[0]["baseline"]) > 0
    assert "index.html" in capsys.readouterr().out


def test_on_photographs(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", "")  # set by the command; given back afterwards
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--photos", str(photos), "--examples", "6"]) == 0
    assert [row["task"] for row in board_of(out)] == ["hones_vqa_test"]
    assert "shows the path" in capsys.readouterr().out
    ranking = json.loads((out / "ranking" / "ranking.json").read_text())
    steering = json.loads((out / "steering" / "steering.json").read_text())
    assert steering["ranking"]["digest"] == ranking["digest"]


def test_photographs_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--photos", str(tmp_path / "nothing")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def board_of(folder: Path) -> list[dict[str, str]]:
    page = (folder / "board" / "index.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    with (folder / "board" / "leaderboard.csv").open(newline="") as file:
        return list(csv.DictReader(file))
