"""Processes of `hones-eval` of which one fails, or as srun would start them: see `test_processes.py`.

    python launched.py fails RANK rank --method ... --devices 2
    python launched.py killed RANK rank --method ... --devices 2
    python launched.py stopped RANK rank --method ... --devices 2
    python launched.py srun PORT rank --method ...

The first fails on that rank at its second example, where the others fall asleep; in the second form that rank
is killed there, in the third it is sent SIGTERM. The last starts the command on two nodes, so that the second
node fails at its second example, and then once more with --resume, and prints the exit statuses as two lists.
The nodes are forks, so that all is imported once.
"""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hones_eval.__main__ import main
from hones_eval.commands import command
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples
from hones_eval.lmms.examples.tasks import _index
from hones_eval.runs import checkpoint, processes

JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "discovery", "SLURM_NNODES": "2", "SLURM_NTASKS": "2"}
JOB |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}


def fail() -> NoReturn:
    raise HonesError("the camera fell into the sea")


def die() -> NoReturn:
    time.sleep(2)  # the other rank has written its first example
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def terminate() -> None:
    while not Path("working").exists():  # until the other rank is in its second example too
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def work() -> None:
    Path("working").touch()
    time.sleep(3)


def sleep() -> None:
    time.sleep(3600)


def at_second_example(act: Callable[[], None]) -> None:
    """Have a pass over examples call `act` where it asks for its second one."""
    get, count = TaskExamples.__getitem__, itertools.count(1)

    def armed(self: TaskExamples, index: int) -> object:
        if sys._getframe(1).f_globals["__name__"].startswith("torch.utils.data") and next(count) == 2:
            act()
        return get(self, index)

    TaskExamples.__getitem__ = armed  # type: ignore[method-assign, assignment]


def on_nodes(arguments: list[str], port: int, failing: int | None) -> list[int]:
    """The exit statuses of two nodes, in their order."""
    nodes = []
    for node in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= JOB | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if node == failing:
                at_second_example(fail)
            sys.exit(main(arguments))
        nodes.append(child)
    return [os.waitpid(child, 0)[1] for child in nodes]


if __name__ == "__main__":
    how, *rest = sys.argv[1:]
    if how == "stopped":  # long before a checkpoint is due
        stopping, *rest = rest
        at_second_example(terminate if stopping == os.environ.get("LOCAL_RANK", "0") else work)
        sys.exit(main(rest))
    checkpoint.SECONDS = 0.0  # write after every example
    if how in ("fails", "killed"):
        failing, *rest = rest
        processes.GRACE = 2.0
        act = fail if how == "fails" else die
        at_second_example(act if failing == os.environ.get("LOCAL_RANK", "0") else sleep)
        sys.exit(main(rest))
    command("rank")  # imports once what every fork then has
    _index()
    port, *rest = rest
    statuses = [on_nodes(rest, int(port), failing=1), on_nodes([*rest, "--resume"], int(port), failing=None)]
    print(json.dumps(statuses))
