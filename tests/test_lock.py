"""One writer per output folder."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hones_eval.__main__ import main
from hones_eval.core.lock import LOCK, only_writer
from hones_eval.errors import HonesError


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
