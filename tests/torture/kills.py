"""Kill every command at each of its renames and at random times, and run it again.

The second run has to give the files of a run that was never killed, to the byte, and leave no other file.
"""

import contextlib
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sandbox
from commands import Command, remove
from sandbox import DIED, Ended, finish

from hones_eval.__main__ import main
from hones_eval.commands import ARTIFACTS
from hones_eval.runs import checkpoint

RENAMES = ("replace", "rename")


class Whole(NamedTuple):
    """A run that was not killed: its files, how often it renames, and its seconds of processor time."""

    files: dict[str, bytes]
    renames: int
    seconds: float


# Seconds on the clock after which the processes of a killed run are ended.
LAUNCHER_WAITS = 60.0


class Kill(NamedTuple):
    """Kill process `rank` just before its rename of that number, or after seconds of processor time."""

    rank: int
    rename: int | None
    after: float = 0.0


def content(folder: Path, given: Command) -> dict[str, bytes]:
    """The files of a folder; those that hold the time of the run without their content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder) for path in files]
    if not all(map(given.compared, names)):
        names = [name for name in names if given.compared(name)] + [
            name.parent for name in names if not given.compared(name)
        ]
    return {str(name): (folder / name).read_bytes() if given.compared(name) else b"" for name in names}


def counted(act: Callable[[int], None]) -> None:
    """Call `act` with the number of every rename of this process, just before it happens."""
    count = iter(range(1 << 40))

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            act(next(count))
            return function(*given, **named)

        return call

    for name in RENAMES:
        setattr(os, name, before(getattr(os, name)))


def status(arguments: list[str], out: Path) -> str:
    checkpoint.SECONDS = 0.0  # write progress after every example, so that there is more to kill
    again = ["--overwrite"] if arguments[0] in ARTIFACTS and "--resume" not in arguments else []
    return f"exit {main([*arguments, *again, '--out', str(out)])}"


def dying(arguments: list[str], out: Path, rename: int | None) -> str:
    if rename is not None:
        counted(lambda number: os._exit(DIED) if number == rename else None)
    return status(arguments, out)


def measured(arguments: list[str], out: Path) -> str:
    """Run and count the renames. Returns: the count and the seconds of processor time after the status."""
    last = [-1]
    counted(lambda number: last.__setitem__(0, number))
    return f"{status(arguments, out)} {last[0] + 1} {os.times().user}"


def run(given: Command, out: Path, kill: Kill | None = None) -> list[Ended]:
    """Run a command in as many forks as it has processes."""
    address: dict[str, str] = {}
    if given.processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        address |= {"NODE_RANK": "0", "WORLD_SIZE": str(given.processes)}
    started = []
    for rank in range(given.processes):
        mine = kill if kill is not None and kill.rank == rank else None

        def work(mine: Kill | None = mine) -> str:
            if kill is None:
                return measured(given.arguments, out)
            return dying(given.arguments, out, None if mine is None else mine.rename)

        local = {"LOCAL_RANK": str(rank)} if address else {}
        after = None if mine is None or mine.rename is not None else mine.after
        started.append(sandbox.start(work, given.seconds, address | local, after))
    # A process that waits for one that died before they had met is ended by its launcher, which this is.
    launcher = threading.Timer(LAUNCHER_WAITS, lambda: [_end(process) for process, _ in started])
    if kill is not None and given.processes > 1:
        launcher.start()
    try:
        return [finish(*each) for each in started]
    finally:
        launcher.cancel()


def _end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


class Killing:
    """The cases of one command."""

    def __init__(self, name: str, given: Command, folder: Path) -> None:
        self.name, self.given = name, given
        self.out = folder / "work" / "out"
        self._whole: Whole | None = None

    def whole(self) -> Whole:
        """The run that was not killed; made once."""
        if self._whole is None:
            remove(self.out.parent)
            ended = run(self.given, self.out)
            if not all(each.result.startswith("exit 0") for each in ended):
                raise RuntimeError(f"wrong: {self.name}, without a kill: {ended}")
            renames, seconds = zip(*(each.result.split()[-2:] for each in ended), strict=True)
            found = content(self.out, self.given)
            self._whole = Whole(found, sum(map(int, renames)), max(map(float, seconds)))
            remove(self.out.parent)
        return self._whole

    def kill(self, number: int) -> Kill:
        """The kill of a case: first each rename in turn, then random times."""
        draw = random.Random(f"{self.name} {number}")
        rank = number % self.given.processes
        if number < self.whole().renames:
            return Kill(rank, number // self.given.processes)
        return Kill(rank, None, draw.random() * self.whole().seconds)

    def at_rename(self, turn: int, most: int) -> str:
        """The kill number `turn` of `most` at renames."""
        renames = self.whole().renames
        if most >= renames:
            return self.case(turn) if turn < renames else "there is no such rename"
        return self.case(turn * renames // most)

    def result(self, turn: int, most: int | None = None) -> str:
        """The result of a kill at random, or of one of `most` at renames."""
        try:
            return self.case(1_000_000 + turn) if most is None else self.at_rename(turn, most)
        except RuntimeError as error:
            return str(error)

    def case(self, number: int) -> str:
        """Kill once, run again, compare."""
        whole = self.whole()
        remove(self.out.parent)
        kill = self.kill(number)
        ended = run(self.given, self.out, kill)
        again = run(self.given.second(), self.out)
        bad = [each for each in ended if each.result.startswith(("traceback", "took"))]
        if bad or any("Traceback" in each.printed for each in (*ended, *again)):
            return f"traceback: {self.name}, {kill}: {bad or (ended, again)}"
        if not all(each.result.startswith("exit 0") for each in again):
            return f"wrong: {self.name}, {kill}: {ended}, then {again}"
        left = [
            path.name for path in (*self.out.parent.iterdir(), *self.out.rglob("*")) if path.name[0] == "."
        ]
        if left:
            return f"leftovers: {self.name}, {kill}: {left}"
        found = content(self.out, self.given)
        if found != whole.files:
            names = {name for name in found | whole.files if found.get(name) != whole.files.get(name)}
            return f"wrong: {self.name}, {kill}: other files: {sorted(names)[:5]}"
        died = any(each.result == "died" for each in ended)
        how = "at a rename" if kill.rename is not None else "at a random time"
        return f"killed {how}, then the same bytes" if died else "it had ended before the kill"


def kills(listed: dict[str, Command], folder: Path, share: float) -> Iterator[tuple[str, Callable[[], str]]]:
    """The cases of all commands in turns; `share` of each command's kills at random times and at renames.

    Where a command renames more often than it is killed, the renames are taken evenly from all of them.
    """
    killings = [Killing(name, given, folder) for name, given in listed.items()]
    for turn in range(max(round(share * each.given.kills) for each in killings)):
        for killing in killings:
            most = max(1, round(share * killing.given.kills))
            if turn < most:
                yield f"{killing.name}, random {turn}", lambda k=killing, t=turn: k.result(t)
                yield f"{killing.name}, rename {turn}", lambda k=killing, t=turn, m=most: k.result(t, m)
