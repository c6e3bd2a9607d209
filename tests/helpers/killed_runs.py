"""Run `hones-eval` with the arguments of this script, killing it at random moments: see `test_resume.py`.

The forks are of a process that has read no data set yet: its file locks do not outlive a fork. Usage:

    python killed_runs.py WHOLE KILLED KILLS rank --method ... [--devices 2]
"""

import itertools
import os
import random
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from hones_eval.__main__ import main
from hones_eval.commands import command
from hones_eval.lmms.examples import TaskExamples
from hones_eval.lmms.examples.tasks import _index
from hones_eval.runs import checkpoint


class Kill(NamedTuple):
    """A rank is killed some seconds after it has asked for its so-manieth example."""

    rank: int
    example: int
    delay: float


def forked(arguments: list[str], kill: Kill | None = None) -> int:
    """Run in a forked process a device; the first wait status that is not 0, and 0 if all are.

    Where one process ends badly the others are killed, as a launcher does.
    """
    devices = int(arguments[arguments.index("--devices") + 1]) if "--devices" in arguments else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {_start(arguments, rank, devices, port, kill): rank for rank in range(devices)}
    worst = 0
    while running:
        child, status = os.wait()
        del running[child]
        if status and not worst:
            worst = status
            for other in running:
                os.kill(other, signal.SIGKILL)
    return worst


def _start(arguments: list[str], rank: int, devices: int, port: int, kill: Kill | None) -> int:
    child = os.fork()
    if child:
        return child
    if devices > 1:  # what a launcher tells the processes that it starts
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= address | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(devices)}
    if kill is not None and kill.rank % devices == rank:
        arm(kill)
    status = main(arguments)
    sys.stderr.flush()
    os._exit(status)


def arm(kill: Kill) -> None:
    get, count = TaskExamples.__getitem__, itertools.count(1)

    def armed(self: TaskExamples, index: int) -> object:
        if next(count) == kill.example:
            signal.setitimer(signal.ITIMER_REAL, kill.delay)
        return get(self, index)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process on the spot
    TaskExamples.__getitem__ = armed


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
        status = forked(
            resumed, Kill(chance.randint(0, 1), chance.randint(1, 12), chance.uniform(1e-4, 0.05))
        )
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
    _index()  # and reads the names of all tasks once
    checkpoint.SECONDS = 0.0  # write after every example
    print("useful kills:", run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
