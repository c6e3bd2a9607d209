"""A run that is killed at random moments and goes on ends with the bytes of one that never was."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import families
import pytest
from drawn_data import write_folder
from safetensors import safe_open

from hones_eval.__main__ import main
from hones_eval.core.ranking import Ranking
from hones_eval.errors import HonesError
from hones_eval.runs import checkpoint
from hones_eval.runs.checkpoint import Partial, Progress
from hones_eval.runs.lightning import _Pass

CAPTIONS = ["--tasks", "hones_caption", "--gen_kwargs", "max_new_tokens=3", "--heads", "4"]
RACE = ["--tasks", "hones_vqa", "--gen_kwargs", "max_new_tokens=3", "--heads", "3", "--race", "0.9"]
ATTRIBUTION = ["--method", "atp", "--tasks", "hones_vqa", "--gen_kwargs", "max_new_tokens=3", "--heads", "3"]
SCREEN = ["--screen", "first_order", "--screen_share", "0.7"]
TWO = ["--devices", "2"]


@pytest.fixture
def rank_arguments(tmp_path: Path, llava_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HONES_EVAL_DATA", str(write_folder(tmp_path / "data", 11)))
    return [
        *("rank", "--method", "hones", "--model", "llava_hf", "--neurons", "0.05"),
        *("--model_args", f"pretrained={llava_checkpoint}"),
    ]


@pytest.mark.parametrize(
    ("kills", "others"),
    [
        (6, CAPTIONS),
        (5, [*CAPTIONS, *TWO]),
        (5, [*RACE, *SCREEN]),
        (4, [*RACE, *TWO]),
        (2, [*ATTRIBUTION, "--confirm", "30", *TWO]),
    ],
    ids=[
        *("one process", "two processes", "race after a screen", "race of two processes"),
        "attribution patching of two processes, confirmed",
    ],
)
def test_killed_runs_end_with_the_same_bytes(
    tmp_path: Path, rank_arguments: list[str], kills: int, others: list[str]
) -> None:
    script = [sys.executable, str(Path(__file__).parent / "helpers" / "killed_runs.py")]
    folders = [str(tmp_path / "whole"), str(tmp_path / "killed")]
    done = subprocess.run(
        [*script, *folders, str(kills), *rank_arguments, *others],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    useful = re.search(r"useful kills: (\d+)", done.stdout)
    assert useful, done.stdout[-500:]
    assert int(useful[1]) > 0, "no kill left anything to go on from: the test has shown nothing"


@pytest.fixture
def interrupted(
    tmp_path: Path, rank_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], Path]:
    """The arguments of a ranking that stopped after four examples, and its folder."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    step, out = _Pass.predict_step, tmp_path / "out"

    def stopping(self: _Pass, *arguments: object) -> None:
        step(self, *arguments)
        if self.done == 4:
            raise HonesError("the power went")

    arguments = [*rank_arguments, *CAPTIONS, "--out", str(out)]
    with monkeypatch.context() as broken:
        broken.setattr(_Pass, "predict_step", stopping)
        assert main(arguments) == 1
    assert any((out / "partial").glob("*.safetensors"))
    return arguments, out


def test_other_settings_are_not_gone_on_with(
    interrupted: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = interrupted
    assert main([*arguments, "--resume", "--heads", "5"]) == 1
    assert "another model, other examples, settings or versions" in capsys.readouterr().err
    assert not (out / "ranking.json").exists()


def test_other_weights_at_the_same_path_are_not_gone_on_with(
    interrupted: tuple[list[str], Path], llava_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint replaced in place is another model, whatever its path says."""
    arguments, out = interrupted
    weights = llava_checkpoint / "model.safetensors"
    kept = weights.read_bytes()
    try:
        families.save_checkpoint("llava", llava_checkpoint, seed=5)
        assert weights.read_bytes() != kept
        assert main([*arguments, "--resume"]) == 1
    finally:
        weights.write_bytes(kept)
    assert "was measured with another model" in capsys.readouterr().err
    assert not (out / "ranking.json").exists()
    assert main([*arguments, "--resume"]) == 0
    assert Ranking.load(out).provenance.weights is not None


def test_sigterm_saves_the_progress_and_says_how_to_go_on(
    tmp_path: Path,
    rank_arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A scheduler's signal comes in the third example, long before a checkpoint is due."""
    step, out = _Pass.predict_step, tmp_path / "out"
    arguments = [*rank_arguments, *CAPTIONS, "--out", str(out)]

    def signalled(self: _Pass, *given: object) -> None:
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, *given)

    with monkeypatch.context() as broken:
        broken.setattr(_Pass, "predict_step", signalled)
        assert main(arguments) == 128 + signal.SIGTERM
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line
        == "hones-eval: stopped by SIGTERM; with --resume the same command goes on from what was measured"
    )
    (kept,) = (out / "partial").glob("*.safetensors")
    with safe_open(kept, "pt") as file:
        assert json.loads(file.metadata()["about"])["done"] == 3
    assert main([*arguments, "--resume"]) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    kept = Partial(tmp_path, "print", resume=True)
    kept.save("heads", 0, 1, Progress(1, {}, {0: None}), last=True)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(HonesError, match=r"heads-0-of-1\.safetensors cannot be read"):
        kept.load("heads", 0, 1)


def test_what_a_kill_left_half_written_is_cleared_with_the_rest(tmp_path: Path) -> None:
    kept = Partial(tmp_path / "partial", "print", resume=True)
    kept.save("heads", 0, 1, Progress(1, {}, {0: None}), last=True)
    (whole,) = kept.folder.iterdir()
    (kept.folder / f".{whole.name}.k1ll3d").write_bytes(b"half")
    kept.clear()
    assert not kept.folder.exists()
