"""Forked child processes with limits on memory and time."""

import contextlib
import io
import os
import resource
import signal
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

MEMORY, SECONDS = 2 << 30, 30
"""Bytes beyond what the imports take; seconds of processor time per call."""
DIED = 9
"""The exit status of a child that ended itself, as a kill would."""


class Ended(NamedTuple):
    """How a child ended: its result, or "died", "took too long" or a traceback; and what it printed."""

    result: str
    printed: str = ""


def limit_time(seconds: float) -> None:
    """End this process after so many seconds of processor time, or twenty times as many on the clock."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(int(20 * seconds))


def limit_memory() -> None:
    """Refuse this process more than `MEMORY` bytes beyond what it has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def start(
    work: Callable[[], str], seconds: float, environment: Mapping[str, str], dies_after: float | None = None
) -> tuple[int, int]:
    """Run `work` in a fork under the limits.

    Args:
        work: what to run; its result is sent back.
        seconds: of processor time that it may take.
        environment: variables of the child.
        dies_after: seconds of its own processor time after which the system ends it, as SIGKILL does. Times
            on the clock would depend on the load of the machine.

    Returns: the process, and a pipe with its result.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    os.close(reading)
    os.environ |= environment
    limit_memory()
    limit_time(seconds)
    if dies_after is not None:
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, max(dies_after, 1e-4))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            result = work()
    except BaseException:  # noqa: BLE001 - the harness reports whatever escapes
        result = "traceback: " + traceback.format_exc()[-1500:]
    text = result + "\0" + printed.getvalue()[-4000:]
    os.write(writing, text.encode("utf-8", "replace")[:60_000])
    os._exit(0)


def finish(process: int, reading: int) -> Ended:
    """Wait for a child."""
    with os.fdopen(reading, "rb") as file:
        result, _, printed = file.read().decode("utf-8", "replace").partition("\0")
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    known = {DIED: "died", -signal.SIGKILL: "died", -signal.SIGVTALRM: "died"}
    known |= {-signal.SIGALRM: "took too long", -signal.SIGPROF: "took too long"}
    return Ended(result if status == 0 else known.get(status, f"ended {status}"), printed)


def child(work: Callable[[], str], *, seconds: float = SECONDS) -> Ended:
    """Run `work` in a child under the limits, and wait for it."""
    return finish(*start(work, seconds, {}))
