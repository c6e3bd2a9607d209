"""Kills, damaged inputs, hostile logs and the determinism matrix, in numbers: `make torture`.

Every case runs in a forked process with at most 2 GB of memory beyond what the imports take, and 30 seconds
of processor time per call. Finished cases are kept in the output file, so that a run that was stopped goes on
where it was. The exit code is 1 when anything but a clean refusal or a correct result was seen.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "helpers")]

import torch  # noqa: E402
from boards import boards  # noqa: E402
from commands import commands, demo_without_programs  # noqa: E402
from kills import kills  # noqa: E402
from matrix import matrix  # noqa: E402
from mutations import calls, references  # noqa: E402

from hones_eval.commands import COMMANDS, command  # noqa: E402
from hones_eval.leaderboard.lmms_tasks import find_aggregation  # noqa: E402
from hones_eval.lmms.examples.tasks import _index  # noqa: E402
from hones_eval.version import __version__  # noqa: E402

BAD = ("traceback", "wrong", "leftovers", "took too long", "ended")
Cases = Iterator[tuple[str, Callable[[], str]]]


def warm_up() -> None:
    """Import once what every fork then has."""
    torch.set_num_threads(1)
    find_aggregation("shapes", "exact_match", None)
    _index()
    for name in COMMANDS:
        command(name)


def parts_of(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Cases]]:
    """The parts of a run, with inputs that are written when a part begins."""
    if options.logs:
        yield "logs", boards(options.logs, folder / "boards")
    listed = commands(folder)
    if options.calls:
        references(folder)
        yield "calls", calls(options.calls, folder)
    if options.kills:
        every = listed | {"demo": demo_without_programs()}
        chosen = {name: given for name, given in every.items() if not options.only or name in options.only}
        yield "kills", kills(chosen, folder, options.kills)
    if options.matrix:
        yield "matrix", matrix(listed, folder)


def summary(totals: Counter[str], seconds: float) -> dict[str, object]:
    """What a run found, for the record."""
    return {
        "package_version": __version__,
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "hours": round(seconds / 3600, 2),
        "results": dict(sorted(totals.items())),
    }


def is_bad(result: str) -> bool:
    """Whether a result, without its part and kind, is one that must not be."""
    return any(part.startswith(BAD) for part in result.split(": "))


def run(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=float, default=1.0, help="share of the kills in commands.py, or 0")
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--logs", type=int, default=210)
    parser.add_argument("--matrix", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", nargs="*", help="kill only these commands")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so long; run it again"
    )
    parser.add_argument("--summary", type=Path, help="a JSON file to write the counts to")
    parser.add_argument("--out", type=Path, default=Path("torture.jsonl"))
    options = parser.parse_args(arguments)
    began = time.monotonic()
    warm_up()
    done: dict[str, str] = {}
    seconds = 0.0
    if options.out.exists():
        lines = [json.loads(line) for line in options.out.read_text().splitlines()]
        done, seconds = {case: result for case, result, _ in lines}, sum(line[2] for line in lines)
    totals: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        with options.out.open("a") as kept:
            for part, cases in parts_of(options, folder):
                for case, work in cases:
                    if case not in done:
                        if time.monotonic() - began > options.seconds:
                            print("stopped: run it again to go on")
                            return 3
                        started = time.monotonic()
                        done[case] = work()
                        took = round(time.monotonic() - started, 1)
                        kept.write(json.dumps([case, done[case], took]) + "\n")
                        kept.flush()
                        seconds += took
                    found = json.loads(done[case]) if done[case].startswith("{") else {done[case]: 1}
                    for result, count in found.items():
                        totals[f"{part}: {result}"] += count
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for result, count in sorted(totals.items()):
        print(f"{count:6} {result}")
    if options.summary is not None:
        options.summary.write_text(json.dumps(summary(totals, seconds), indent=1) + "\n")
    return int(any(is_bad(result) for result in totals))


if __name__ == "__main__":
    sys.exit(run())
