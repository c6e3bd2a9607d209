"""Run `hones-eval` with the arguments of this script, killing it at random moments: see `test_resume.py`.

The forks are of a process that has read no data set yet: its file locks do not outlive a fork. Usage:

    python killed_runs.py WHOLE KILLED KILLS rank --method ...
"""

import itertools
import os
import random
import signal
import sys
from pathlib import Path

from hones_eval import partial
from hones_eval.__main__ import main
from hones_eval.commands import command
from hones_eval.loops import _Pass


def forked(arguments: list[str], example: int | None = None, delay: float = 0.0) -> int:
    """Run in a forked process, killed some seconds into an example; its wait status."""
    child = os.fork()
    if child == 0:
        if example is not None:
            kill_after(example, delay)
        status = main(arguments)
        sys.stderr.flush()
        os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_after(example: int, delay: float) -> None:
    step, count = _Pass.predict_step, itertools.count(1)

    def armed(self: _Pass, *arguments: object) -> None:
        if next(count) == example:
            signal.setitimer(signal.ITIMER_REAL, delay)
        step(self, *arguments)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process on the spot
    _Pass.predict_step = armed


def assert_same_files(one: Path, other: Path) -> None:
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def run(whole: Path, killed: Path, wanted: int, arguments: list[str]) -> int:
    """Kill until it was done often enough, and finish; how many kills left something to go on from."""
    assert forked([*arguments, "--out", str(whole)]) == 0
    chance, kills, useful = random.Random(0), 0, 0
    resumed = [*arguments, "--out", str(killed), "--resume"]
    while kills < wanted:
        status = forked(resumed, chance.randint(1, 8), chance.uniform(1e-4, 0.05))
        if os.WIFSIGNALED(status):
            kills += 1
            useful += any((killed / "partial").glob("*.safetensors"))
            continue
        assert status == 0, "a run that was to go on failed"
        assert_same_files(whole, killed)
        for path in killed.iterdir():
            path.unlink()
    assert forked(resumed) == 0
    assert_same_files(whole, killed)
    return useful


if __name__ == "__main__":
    command("rank")  # imports once what every fork then has
    partial.SECONDS = 0.0  # write after every example
    print("useful kills:", run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
