"""Several processes that share one job: they end together, and none waits for one that failed.

Every process knows the process ids of the others on its host. A process that was killed says nothing, and a
collective on GPUs would wait for it until its timeout. So three places look for dead processes: a pass after
each example, a thread while a pass runs, and the error of a failed collective.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import distributed

from hones_eval.core.files import is_alive
from hones_eval.errors import HonesError, first_line

POLL, GRACE = 0.5, 10.0
"""Seconds between two looks for dead processes; seconds that a process has to end by itself after one."""
_peers: list[tuple[str, int]] = []
"""Host and process id by rank, once the processes have met."""


def several() -> bool:
    """Whether this process is in a process group with others."""
    return distributed.is_available() and distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is alone, or the first of several."""
    return not several() or distributed.get_rank() == 0


def meet_others() -> None:
    """Exchange process ids with the other processes, once per process group."""
    if several() and not _peers:
        shared: list[tuple[str, int]] = [("", 0)] * distributed.get_world_size()
        distributed.all_gather_object(shared, (socket.gethostname(), os.getpid()))
        _peers[:] = shared


def ended_ranks() -> list[int]:
    """The ranks on this host whose process has ended."""
    here = socket.gethostname()
    return [rank for rank, (host, pid) in enumerate(_peers) if host == here and not is_alive(pid)]


def wait_for_others() -> None:
    """Return when every process has reached this point, as at the end of a command.

    Raises: HonesError when one of them has already ended.
    """
    if not several():
        return
    try:
        distributed.all_gather_object([None] * distributed.get_world_size(), None)
    except RuntimeError as error:
        raise left_alone(error) from error


def leave_others() -> None:
    """Leave the process group, if there is one.

    The threads of a group that still exists when Python exits can end the process by SIGABRT.
    """
    _peers.clear()
    if several():
        distributed.destroy_process_group()


@contextmanager
def ends_with_others(end_started: Callable[[], None]) -> Iterator[None]:
    """A block in which a thread ends this process some seconds after another process of the run has died.

    A block that notices by itself ends with an error of its own before that. One that waits in a collective
    or works on a long example is ended by the thread, which prints the same line.

    Args:
        end_started: ends the processes that this one has started.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL):
            if ended_ranks() and not over.wait(GRACE):
                print(f"hones-eval: {_alone()}", file=sys.stderr, flush=True)
                end_started()
                os._exit(1)

    thread = threading.Thread(target=watch, name="hones-eval-processes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def is_about_others(error: BaseException) -> bool:
    """Whether an error is that of a failed collective, by which a process learns that another one ended.

    Failures of the gloo backend have no type of their own; their message names it.
    """
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def left_alone(error: BaseException | None = None) -> HonesError:
    """The error of a process that cannot continue because another one ended; `error` is how it noticed."""
    if not several():
        return HonesError(
            "the processes could not connect: MASTER_ADDR and MASTER_PORT have to be those of the first one, "
            f"and the port has to be free ({first_line(error) if error else 'no process group'})"
        )
    return HonesError(_alone())


def _alone() -> str:
    """Which process ended, and how to continue."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    until = time.monotonic() + GRACE
    while not (ended := ended_ranks()) and _peers and time.monotonic() < until:
        time.sleep(0.05)  # its connections close a little before it has ended
    named = " and ".join(map(str, ended))
    which = f"process{'es' if len(ended) > 1 else ''} {named}" if ended else "another process"
    return (
        f"process {rank} of {ranks} stopped because {which} ended; see the error of that process. If it was "
        "killed and printed none, run the same command again, with --resume where it has that flag"
    )
