"""A run that is killed at random moments and goes on ends with the bytes of one that never was."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from drawn_data import write_folder

from hones_eval import partial
from hones_eval.__main__ import main
from hones_eval.errors import HonesError
from hones_eval.partial import Partial, Progress

KILLS = 20


@pytest.fixture
def rank_arguments(tmp_path: Path, llava_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HONES_EVAL_DATA", str(write_folder(tmp_path / "data", 9)))
    monkeypatch.setattr(partial, "SECONDS", 0.0)  # write after every example
    return [
        *("rank", "--method", "hones", "--model", "llava_hf", "--tasks", "hones_caption"),
        *("--model_args", f"pretrained={llava_checkpoint}", "--gen_kwargs", "max_new_tokens=3"),
        *("--heads", "4", "--neurons", "0.05"),
    ]


def run_and_kill(arguments: list[str], after: float) -> int:
    """Run in a forked process that an alarm kills after some seconds; its wait status."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process on the spot
        signal.setitimer(signal.ITIMER_REAL, after)
        status = main(arguments)
        sys.stderr.flush()
        os._exit(status)
    return os.waitpid(child, 0)[1]


def test_killed_runs_end_with_the_same_bytes(tmp_path: Path, rank_arguments: list[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert main([*rank_arguments, "--out", str(whole)]) == 0
    length = time.monotonic() - started
    chance, kills, had_to_go_on = random.Random(0), 0, False
    while kills < KILLS:
        status = run_and_kill(
            [*rank_arguments, "--out", str(killed), "--resume"], chance.uniform(0, length / 4)
        )
        if os.WIFSIGNALED(status):
            kills += 1
            had_to_go_on |= any((killed / "partial").glob("*.safetensors"))
            continue
        assert os.WEXITSTATUS(status) == 0
        assert_same_files(whole, killed)
        for path in killed.iterdir():
            path.unlink()
    assert had_to_go_on, "no kill left anything to go on from: the test has shown nothing"
    assert main([*rank_arguments, "--out", str(killed), "--resume"]) == 0
    assert_same_files(whole, killed)


def test_other_settings_are_not_gone_on_with(
    tmp_path: Path, rank_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status = 0
    for tenth in range(5, 100):
        status = run_and_kill([*rank_arguments, "--out", str(out)], tenth / 10)
        if any((out / "partial").glob("*.safetensors")):
            break
    assert os.WIFSIGNALED(status)
    arguments = [*rank_arguments, "--out", str(out), "--resume", "--heads", "5"]
    assert main(arguments) == 1
    assert "other examples, settings or versions" in capsys.readouterr().err
    assert not (out / "ranking.json").exists()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    kept = Partial(tmp_path, "print", resume=True)
    kept.save("heads", 0, 1, Progress(1, {}, {0: None}), last=True)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(HonesError, match=r"heads-0-of-1\.safetensors cannot be read"):
        kept.load("heads", 0, 1)


def assert_same_files(one: Path, other: Path) -> None:
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
