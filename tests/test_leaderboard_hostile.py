"""Hostile logs cost their own row and nothing else: no other row, no time, no private image."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE, media, random_change
from make_logs import Questions, Steered, data_uri, shape, write_run
from PIL import Image

from hones_eval import limits
from hones_eval.__main__ import main
from hones_eval.core.images import image_hash
from hones_eval.leaderboard import Board, make_board

QUESTIONS = Questions.drawn(count=40)
BEFORE, AFTER = QUESTIONS.answers(0.4, 1), QUESTIONS.answers(0.9, 2)


def write_logs(folder: Path, **options: Any) -> None:
    """A good pair of runs, and in a folder of its own a pair to be damaged."""
    for name, base in (("good", "tiny/llava"), ("bad", "tiny/other")):
        write_run(folder / name, QUESTIONS, BEFORE, base=base, date="20260102_030405", **options)
        write_run(
            folder / name, QUESTIONS, AFTER, base=base, steered=Steered(), date="20260102_030505", **options
        )


def good_rows(board: Board) -> list[tuple[float, float | None]]:
    return [
        (row.comparison.difference, row.comparison.test.p if row.comparison.test else None)
        for row in board.rows
        if row.pair.steered.base.name == "tiny/llava"
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float | None]]:
    folder = tmp_path_factory.mktemp("alone")
    write_logs(folder)
    return good_rows(make_board([folder / "good"], folder / "board", resamples=99, images=False))


@pytest.mark.parametrize("kind", [*HOSTILE, *range(25)])
def test_hostile_logs_cost_one_row(tmp_path: Path, alone: list[Any], kind: str | int) -> None:
    """Every kind of damage that was ever found, and 25 at random."""
    write_logs(tmp_path / "logs")
    change = random_change(kind) if isinstance(kind, int) else HOSTILE[kind]
    for path in (tmp_path / "logs" / "bad").rglob("*030405*"):
        path.rename(path.with_name(path.name.replace(".json", ".kept")))  # the baseline stays whole
    change(tmp_path / "logs" / "bad")
    for path in (tmp_path / "logs" / "bad").rglob("*.kept*"):
        path.rename(path.with_name(path.name.replace(".kept", ".json")))
    began = time.thread_time()
    board = make_board([tmp_path / "logs"], tmp_path / "board", resamples=99)
    assert time.thread_time() - began < 10
    assert good_rows(board) == alone
    for name in ("index.html", "leaderboard.md", "leaderboard.csv"):
        content = (tmp_path / "board" / name).read_text(encoding="utf-8")
        assert "\x1b" not in content
        assert "\u202e" not in content


def pages(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "board" / "comparisons").glob("*.html"))


def image_files(folder: Path) -> list[Path]:
    return [
        path
        for path in (folder / "board").rglob("*")
        if path.suffix not in (".html", ".csv", ".md", ".svg", "")
    ]


def image_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape("red", 3).resize((384, 288)).save(path)  # larger than a thumbnail: it would get a file
    return path


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_only_images_of_the_logs_get_into_a_page(tmp_path: Path, prefix: str) -> None:
    """A path in a sample must not publish a private image; one inside the folder of the samples is shown."""
    write_logs(tmp_path / "logs")
    bad = tmp_path / "logs" / "bad"
    private = image_file(tmp_path / "home" / "private.png")
    inside = bad / "tiny__other" / "media" / "shown.png"
    link = bad / "tiny__other" / "link.png"
    link.symlink_to(private)
    escaping = f"{bad}/tiny__other/../../../home/private.png"
    for path, shown in ((private, False), (link, False), (escaping, False), (image_file(inside), True)):
        media([f"{prefix}{path}"])(bad)
        make_board([bad], tmp_path / "board", resamples=99)
        assert ("data:image/jpeg;base64," in pages(tmp_path)) is shown, path
        assert bool(image_files(tmp_path)) is shown, path


def test_an_image_elsewhere_is_shown_if_the_manifest_recorded_its_hash(tmp_path: Path) -> None:
    write_logs(tmp_path / "logs")
    bad = tmp_path / "logs" / "bad"
    elsewhere = image_file(tmp_path / "data" / "shown.png")
    media([str(elsewhere)])(bad)
    with Image.open(elsewhere) as image:
        recorded = image_hash(image)
    for path in bad.rglob("hones_manifest_*"):
        content = json.loads(path.read_text())
        for request in content["requests"]["shapes"].values():
            request["image_sha256"] = [recorded]
        path.write_text(json.dumps(content))
    make_board([bad], tmp_path / "board", resamples=99)
    assert "data:image/jpeg;base64," in pages(tmp_path)
    assert image_files(tmp_path)
    shape("blue", 4).save(elsewhere)
    make_board([bad], tmp_path / "board", resamples=99)
    assert "data:image/jpeg;base64," not in pages(tmp_path)
    assert not image_files(tmp_path), "files of an earlier board go with it"


def test_images_beyond_the_limits_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_logs(tmp_path / "logs", media=True)
    assert len(data_uri(QUESTIONS.images[0])) > 200
    for name, limit in (("IMAGE_BYTES", 100), ("IMAGE_PIXELS", 100)):
        with monkeypatch.context() as small:
            small.setattr(limits, name, limit)
            make_board([tmp_path / "logs"], tmp_path / "board", resamples=99)
            assert "data:image/jpeg;base64," not in pages(tmp_path)
    assert not image_files(tmp_path), "files of an earlier board go with it"
    make_board([tmp_path / "logs"], tmp_path / "board", resamples=99)
    assert "data:image/jpeg;base64," in pages(tmp_path)


def test_a_sparse_file_of_60_gigabytes_is_not_read(tmp_path: Path) -> None:
    write_logs(tmp_path / "logs")
    bad = tmp_path / "logs" / "bad"
    huge = bad / "tiny__other" / "huge.png"
    with huge.open("wb") as file:
        file.truncate(60 << 30)
    media([str(huge)])(bad)
    os.truncate(next(bad.rglob("*030505_results.json")), 60 << 30)
    began = time.perf_counter()
    board = make_board([tmp_path / "logs"], tmp_path / "board", resamples=99)
    assert time.perf_counter() - began < 20
    assert len(board.rows) == 1
    assert any("is larger than" in line for line in board.unreadable)


def test_a_line_and_a_manifest_beyond_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_logs(tmp_path / "logs")
    monkeypatch.setattr(limits, "SAMPLE_LINE_BYTES", 2000)
    monkeypatch.setattr(limits, "MANIFEST_BYTES", 20_000)
    bad = tmp_path / "logs" / "bad"
    with next(bad.rglob("*030505_samples_*")).open("a") as file:
        file.write("x" * 5000)
    path = next(bad.rglob("hones_manifest*030405*"))
    path.write_text(path.read_text() + " " * 20_000)
    board = make_board([tmp_path / "logs"], tmp_path / "board", resamples=99)
    assert len(board.rows) == 1
    assert any("a line is longer than 2,000 bytes" in line for line in board.warnings)
    assert any("is larger than 20,000 bytes" in line for line in board.warnings)


def test_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_logs(tmp_path / "logs")
    name = "evil\x1b[2J\u202e"
    (tmp_path / "logs" / name).mkdir()
    (tmp_path / "logs" / name / "20260102_030405_results.json").write_text("{")
    assert (
        main(["leaderboard", str(tmp_path / "logs"), "--out", str(tmp_path / "board"), "--resamples", "99"])
        == 0
    )
    assert main(["leaderboard", str(tmp_path / name), "--out", str(tmp_path / "board")]) == 1
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "\x1b" not in text
        assert "⟨U+001B⟩[2J⟨U+202E⟩" in text


def test_a_board_without_a_row_fails_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "logs", QUESTIONS, BEFORE)
    assert main(["leaderboard", str(tmp_path / "logs"), "--out", str(tmp_path / "board")]) == 1
    error = capsys.readouterr().err
    assert "no steered run could be compared with a baseline: none of these runs is steered" in error
    assert (tmp_path / "board" / "index.html").exists()


def test_one_example_gets_no_verdict_and_no_interval(tmp_path: Path) -> None:
    few = Questions.drawn(count=1)
    wrong = ["no" if few.golds[0] == "yes" else "yes"]
    write_run(tmp_path, few, wrong, date="20260102_030405")
    write_run(tmp_path, few, list(few.golds), steered=Steered(), date="20260102_030505")
    (row,) = make_board([tmp_path], tmp_path / "board", resamples=99).rows
    assert row.comparison.difference == 1
    assert (row.verdict, row.comparison.interval, row.comparison.test) == ("not judged", None, None)
    assert row.comparison.note == "only one example"


def test_an_interval_stays_within_the_metric(tmp_path: Path) -> None:
    """Three graded examples: Student's t alone would reach beyond any difference of a metric from 0 to 1."""
    few = Questions.drawn(count=3)
    scores = {"a": 0.9, "b": 0.05, "c": 0.45}
    metrics = {"score": lambda answer, gold: scores[answer]}
    write_run(tmp_path, few, ["a", "c", "a"], metrics=metrics, date="20260102_030405")
    write_run(tmp_path, few, ["b", "a", "b"], metrics=metrics, steered=Steered(), date="20260102_030505")
    (row,) = make_board([tmp_path], tmp_path / "board", resamples=99).rows
    interval = row.comparison.interval
    assert interval is not None
    assert interval.low == -1
    assert interval.high <= 1
    assert "cut at ±1, the largest possible difference" in row.comparison.note


def test_a_copied_run_is_called_a_copy(tmp_path: Path) -> None:
    write_logs(tmp_path / "logs")
    write_logs(tmp_path / "copies")
    board = make_board(
        [tmp_path / "logs" / "good", tmp_path / "copies" / "good"], tmp_path / "board", resamples=99
    )
    assert len(board.rows) == 1
    assert [reason for left in board.unranked for reason in left.reasons] == [
        "a copy of this run in another folder is used"
    ] * 2
