"""The short form of `make torture`: damaged inputs, hostile logs, kills at renames and at random times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "torture" / "run.py"


@pytest.mark.slow
def test_nothing_but_clean_refusals_and_correct_results(tmp_path: Path) -> None:
    sizes = ["--kills", "0.2", "--calls", "60", "--logs", "14", "--no-matrix"]
    sizes += ["--only", "rank", "scale", "task new", "export ia3", "rank, two processes"]
    command = [sys.executable, str(SCRIPT), *sizes, "--out", str(tmp_path / "torture.jsonl")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    same = "then the same bytes"
    for part in ("calls: artifact: refused", "calls: image: refused", "logs: the good row was there"):
        assert part in done.stdout
    assert f"kills: killed at a rename, {same}" in done.stdout
    assert f"kills: killed at a random time, {same}" in done.stdout
