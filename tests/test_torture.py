"""The short form of `make torture`: damaged artifacts, hostile logs and kills, in one process tree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "torture" / "run.py"


@pytest.mark.slow
def test_nothing_but_clean_refusals_and_correct_results(tmp_path: Path) -> None:
    sizes = ["--kills", "10", "--artifacts", "150", "--logs", "14"]
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
    for part in ("artifacts: refused", "logs: the good row was there", "kills: killed, then whole"):
        assert part in done.stdout
