"""The determinism matrix: every method of `rank`, and `verify`, by one, two and three processes.

The files of several processes have to be those of one, to the byte.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from commands import Command, remove
from kills import content, run

from hones_eval.methods.registry import METHODS

PROCESSES = (2, 3)


def lines(listed: dict[str, Command]) -> dict[str, str]:
    """The command lines by name."""
    rank = listed["rank"].line.replace(" --resume", "").replace("--tasks own_a", "--tasks TASKS")
    found = {}
    for name, row in METHODS.items():
        tasks = "own_a,own_b" if row.contrasts_tasks else "own_a"
        found[f"rank by {name}"] = rank.replace("--method hones", f"--method {name}").replace("TASKS", tasks)
    return found | {"verify": listed["verify"].line}


def matrix(listed: dict[str, Command], folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The cells of the matrix."""
    whole: dict[str, dict[str, bytes]] = {}
    out = folder / "matrix" / "out"

    def files(line: str, processes: int) -> dict[str, bytes]:
        remove(out.parent)
        several = f" --devices {processes}" if processes > 1 else ""
        given = Command(f"{line}{several}", processes=processes, seconds=120)
        ended = run(replace(given, processes=processes), out)
        assert all(each.result.startswith("exit 0") for each in ended), ended
        return content(out, given)

    def cell(name: str, line: str, processes: int) -> str:
        if name not in whole:
            whole[name] = files(line, 1)
        found = files(line, processes)
        if found == whole[name]:
            return f"the bytes of one process: {name}"
        other = [file for file in whole[name] if found.get(file) != whole[name][file]]
        return f"wrong: {name} by {processes} processes differs in {other}"

    for name, line in lines(listed).items():
        for processes in PROCESSES:
            yield (
                f"matrix {name} {processes}",
                lambda name=name, line=line, processes=processes: cell(name, line, processes),
            )
