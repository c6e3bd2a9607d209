"""One writer per output folder."""

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from make_logs import Questions, Steered, write_run

from hones_eval.__main__ import main
from hones_eval.api.lens import lens
from hones_eval.api.ranking import rank
from hones_eval.api.scaling import scale
from hones_eval.api.tracing import trace
from hones_eval.api.verification import verify
from hones_eval.core.files import LOCK
from hones_eval.core.lock import only_writer, writes_to_out
from hones_eval.errors import HonesError
from hones_eval.leaderboard import make_board
from hones_eval.leaderboard.lmms_tasks import find_aggregation

QUESTIONS = Questions.drawn(count=30)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[int]:
    """Another process that holds the lock of `tmp_path / "out"`; its process id."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with only_writer(tmp_path / "out"):
            os.write(writing, b"1")
            signal.pause()
        os._exit(0)
    os.read(reading, 1)
    yield child
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    os.close(reading)
    os.close(writing)


def test_a_second_writer_is_refused_and_the_owner_named(
    writer: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    says = rf"process {writer} on {socket.gethostname()} has been writing"
    with pytest.raises(HonesError, match=says), only_writer(out):
        pass
    assert main(["leaderboard", str(tmp_path), "--out", str(out)]) == 1
    assert f"--out {out}: process {writer} on {socket.gethostname()} " in capsys.readouterr().err
    assert (out / LOCK).exists()


def test_a_killed_owner_loses_the_lock(writer: int, tmp_path: Path) -> None:
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    assert json.loads((tmp_path / "out" / LOCK).read_text())["process"] == writer
    half = tmp_path / "out" / "comparisons" / f".x.html.{socket.gethostname()}-{writer}-ab.tmp"
    half.parent.mkdir()
    half.write_text("half")
    with only_writer(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / LOCK).read_text())["process"] == os.getpid()
        assert not half.exists(), "what the killed command left is cleared"
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "noon"}))
    says = r"process 7 on elsewhere .* delete .*\.hones-eval\.lock"
    with pytest.raises(HonesError, match=says), only_writer(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    with only_writer(tmp_path):
        pass


def test_a_folder_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(HonesError, match="broken"), only_writer(tmp_path / "a" / "b"):
        raise HonesError("broken")
    assert not list(tmp_path.iterdir())
    with only_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").write_text("x")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_only_the_first_process_of_a_run_locks(writer: int, tmp_path: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        with only_writer(tmp_path / "out", {name: "1"}):
            pass
    with pytest.raises(HonesError, match="has been writing"), only_writer(tmp_path / "out", {"RANK": "0"}):
        pass


def test_a_job_inside_a_command_takes_the_lock_again_and_another_thread_does_not(tmp_path: Path) -> None:
    @writes_to_out
    def job(name: str, *, out: Path | None = None) -> bool:
        return out is not None and (out / LOCK).exists()

    assert not job("without a folder")
    assert job("alone", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with only_writer(tmp_path / "out"):
        assert job("inside", out=tmp_path / "out")
        assert (tmp_path / "out" / LOCK).exists(), "the outer one still holds it"
        with ThreadPoolExecutor() as pool, pytest.raises(HonesError, match=f"process {os.getpid()} on "):
            pool.submit(job, "another thread", out=tmp_path / "out").result()


def test_the_python_functions_take_the_lock_of_the_command(writer: int, tmp_path: Path) -> None:
    """Each is refused before it looks at its other arguments."""
    out = tmp_path / "out"
    nothing: Any = None
    for start in (
        lambda: rank(nothing, "no_task", out=out),
        lambda: scale(nothing, out=out),
        lambda: verify(nothing, nothing, "no_task", out=out),
        lambda: trace(nothing, nothing, out),
        lambda: lens(nothing, "no_task", out),
        lambda: make_board([], out),
    ):
        with pytest.raises(HonesError, match=rf"process {writer} on .* has been writing"):
            start()


def test_what_a_killed_study_left_is_cleared_four_levels_deep_and_next_to_the_folder(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead = f"{socket.gethostname()}-{child}-ab.tmp"
    out = tmp_path / "out"
    left = [
        out / "rankings" / "vqa" / "hones" / f".ranking.json.{dead}",
        out / "steerings" / "vqa" / "fixed" / "deeper" / f".steering.json.{dead}",
        tmp_path / f".out.{dead}",
    ]
    kept = [out / "rankings" / "vqa" / f".x.elsewhere-{child}-ab.tmp", tmp_path / f".other.{dead}"]
    for path in (*left, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    with only_writer(out):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept), "of another host, or of another folder"


def test_two_commands_started_together_end_with_one_result_and_one_refusal(tmp_path: Path) -> None:
    """Forks that run the whole command, released at the same moment."""
    date = {"date": "20260102_030405"}, {"date": "20260102_030505"}
    write_run(tmp_path / "logs", QUESTIONS, QUESTIONS.answers(0.4, 1), **date[0])
    write_run(tmp_path / "logs", QUESTIONS, QUESTIONS.answers(0.9, 2), steered=Steered(), **date[1])
    arguments = ["leaderboard", str(tmp_path / "logs"), "--out", str(tmp_path / "board"), "--resamples", "99"]
    find_aggregation("shapes", "exact_match", None)  # imports lmms-eval once, before the forks
    waiting, release = os.pipe()
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            with (tmp_path / f"error-{number}").open("w") as sys.stderr:
                os.read(waiting, 1)
                status = main(arguments)
            os._exit(status)
        children.append(child)
    os.write(release, b"12")
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    errors = [(tmp_path / f"error-{number}").read_text() for number in range(2)]
    assert sorted(ended) == [0, 1], errors
    assert "has been writing here since" in errors[ended.index(1)]
    assert (tmp_path / "board" / "index.html").is_file()
    assert not [
        path for path in (*tmp_path.iterdir(), *(tmp_path / "board").iterdir()) if path.name[0] == "."
    ]
