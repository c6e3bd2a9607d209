"""Kills, damaged artifacts and hostile logs, in numbers: `make torture`.

Every case runs in a child process with at most 2 GB of memory beyond what the imports take, and 30 seconds
of processor time per call. Finished cases are kept in the output file, so that a run that was stopped goes on
where it was. The exit code is 1 when anything but a clean refusal or a correct result was seen.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import families
import torch
from hostile import HOSTILE, media, random_change
from make_logs import Questions, Steered, save_steering, shape, write_run

from hones_eval.__main__ import main
from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance, header_digest
from hones_eval.core.ranking import Ranking
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError
from hones_eval.leaderboard import make_board
from hones_eval.leaderboard.lmms_tasks import find_aggregation

MEMORY, SECONDS = 2 << 30, 30
OPERATIONS = ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir")
DIED = 9


def limit_time(seconds: float) -> None:
    """End this process after so many seconds of processor time, or ten times as many on the clock."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(int(10 * seconds))


def child(work: Callable[[], str], *, seconds: float = SECONDS, kill_after: float | None = None) -> str:
    """Run `work` in a forked process under the limits. Returns: its result, or how it ended."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        limit_time(seconds)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                result = work()
        except BaseException:  # noqa: BLE001 - the harness reports whatever escapes
            result = "traceback: " + traceback.format_exc()[-1500:]
        os.write(writing, result.encode("utf-8", "replace")[:60_000])
        os._exit(0)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    with os.fdopen(reading, "rb") as file:
        result = file.read().decode("utf-8", "replace")
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return (
        result
        if status == 0
        else {DIED: "died", -9: "died", -14: "took too long", -27: "took too long"}.get(
            status, f"ended {status}"
        )
    )


# Kills


def commands(folder: Path) -> dict[str, list[str]]:
    """Every command of the harness, with inputs that it makes; each writes to `{out}`."""
    model = families.save_checkpoint("llava", folder / "model")
    tiny = torch.Generator().manual_seed(0)
    from transformers import AutoModelForImageTextToText

    from hones_eval.core.anatomy import Anatomy

    size = Anatomy.of(AutoModelForImageTextToText.from_pretrained(model)).shape
    examples = [ExampleSet("vqa", "val", 2, 0, "f00d", [0, 1], ["aa", "bb"])]
    source = Provenance(str(model), None, size, "hones", {"neurons": 0.05}, examples)
    for name in ("first", "second"):
        scores = torch.rand(size.layers, size.heads, generator=tiny)
        neurons = torch.rand(size.layers, size.neurons, generator=tiny)
        Ranking(source, head_scores=scores, neuron_scores=neurons).save(folder / name)
    ones = torch.ones(size.layers, size.heads)
    Steering(ones * 1.5, torch.ones(size.layers, size.neurons), source).save(folder / "steering")
    write_pair(folder / "logs")
    ranking, steering = str(folder / "first"), ["--steering", str(folder / "steering")]
    return {
        "scale": ["scale", "--ranking", ranking, "--how", "fixed", "--factor", "2", "--overwrite"],
        "leaderboard": ["leaderboard", str(folder / "logs"), "--resamples", "99"],
        "compare": ["compare", ranking, str(folder / "second")],
        "export ia3": ["export", *steering, "--to", "ia3"],
        "export checkpoint": ["export", *steering, "--to", "checkpoint"],
    }


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(arguments: Sequence[str], out: Path) -> str:
    return f"exit {main([*arguments, '--out', str(out)])}"


def dying_command(arguments: Sequence[str], out: Path, operation: int) -> str:
    """Run a command that dies just before its file operation number `operation`."""
    left = [operation]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if left[0] == 0:
                os._exit(DIED)
            left[0] -= 1
            return function(*given, **named)

        return call

    for name in OPERATIONS:
        setattr(os, name, dying(getattr(os, name)))
    return command(arguments, out)


def kills(count: int, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Kill every command at each file operation in turn, and at random times; then run it again."""
    listed = list(commands(folder).items())
    whole = {}
    for name, arguments in listed:
        began = time.monotonic()
        found = child(lambda: command(arguments, folder / "whole" / name), seconds=120)  # noqa: B023
        assert found == "exit 0", (name, found)
        whole[name] = (content(folder / "whole" / name), time.monotonic() - began)

    def case(k: int) -> str:
        name, arguments = listed[k % len(listed)]
        out = folder / "killed" / str(k) / "out"
        turn, at_random = divmod(k // len(listed), 2)
        if at_random:
            after = random.Random(k).random() * whole[name][1]
            ended = child(lambda: command(arguments, out), seconds=120, kill_after=after)
        else:
            ended = child(lambda: dying_command(arguments, out, turn), seconds=120)
        again = child(lambda: command(arguments, out), seconds=120)
        if ended not in ("died", "exit 0") or again != "exit 0":
            return f"wrong: {name}: {ended}, then {again}"
        left = [p.name for p in [*out.parent.glob(".*"), *out.rglob(".*")]]
        if left:
            return f"leftovers: {name}: {left}"
        # Paths in the files differ with the folder; sizes and names do not depend on a kill.
        if content(out).keys() != whole[name][0].keys():
            return f"wrong: {name}: other files"
        shutil.rmtree(out.parent)
        return "killed, then whole" if ended == "died" else "whole before the kill"

    for k in range(count):
        yield f"kill {k}", lambda k=k: case(k)


# Artifacts


VALUES = [None, True, -1, 0, 10**30, 1.5, "", "x" * 5000, "\ud800", [], {}, [[[]]], "NaN"]


def damaged(folder: Path, seed: int) -> bool:
    """Damage one of the two files of an artifact. Returns: whether the content may still count as valid."""
    draw = random.Random(seed)
    path = draw.choice(sorted(folder.iterdir()))
    raw = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.8:
        header = json.loads(raw)
        holder: Any = header
        while True:
            key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.6:
                holder = holder[key]
                continue
            break
        holder[key] = draw.choice(
            [None, True, -1, 0, 10**30, 1.5, "", "x" * 5000, "\ud800", [], {}, [[[]]], "NaN"]
        )
        signed = draw.random() < 0.5
        if signed:
            header["header_digest"] = header_digest(header)
        path.write_text(json.dumps(header))
        return signed
    changed = bytearray(raw)
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    path.write_bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.3 else changed)
    return False


def artifacts(count: int, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Load damaged rankings and steerings, and give them to `scale` and to the board."""
    size = ModelShape(3, 4, 8, 32, 20, 99)
    source = Provenance(
        "m", "r", size, "hones", {"neurons": 0.05}, [ExampleSet("t", "v", 1, 0, "h", [0], ["a"])]
    )
    scores, neurons = torch.rand(3, 4), torch.rand(3, 20)
    Ranking(source, head_scores=scores, neuron_scores=neurons, report={"x": 1}).save(folder / "ranking")
    Steering(1 + scores, 1 + neurons, source).save(folder / "steering")

    def one(seed: int) -> str:
        kind = ("ranking", "steering")[seed % 2]
        place = folder / f"damaged-{os.getpid()}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / kind, place)
        signed = damaged(place, seed)
        loader: Any = Ranking if kind == "ranking" else Steering
        try:
            loaded = loader.load(place)
        except HonesError as error:
            return "refused" if "\n" not in str(error) else f"wrong: two lines: {error}"
        if signed:  # somebody changed a field and the digest with it: valid, if it fits the schema
            if kind == "ranking":
                main(
                    [
                        "scale",
                        "--ranking",
                        str(place),
                        "--how",
                        "fixed",
                        "--factor",
                        "2",
                        "--out",
                        f"{place}-out",
                    ]
                )
                shutil.rmtree(f"{place}-out", ignore_errors=True)
            return "accepted with its digest"
        original = loader.load(folder / kind)
        same = loaded.digest == original.digest and loaded.provenance == original.provenance
        return "accepted unchanged" if same else "wrong: accepted silently"

    def batch(first: int, size: int) -> str:
        found: Counter[str] = Counter()
        for seed in range(first, first + size):
            limit_time(SECONDS)
            try:
                found[one(seed)] += 1
            except BaseException:  # noqa: BLE001 - counted as a traceback
                found[f"traceback: seed {seed}: {traceback.format_exc()[-600:]}"] += 1
        return json.dumps(found)

    step = 50
    for first in range(0, count, step):
        yield f"artifacts {first}", lambda first=first: child(lambda: batch(first, min(step, count - first)))


# Logs


QUESTIONS = Questions.drawn(count=30)
ANSWERS = QUESTIONS.answers(0.4, 1), QUESTIONS.answers(0.9, 2)


def write_pair(folder: Path, base: str = "tiny/llava") -> None:
    write_run(folder, QUESTIONS, ANSWERS[0], base=base, date="20260102_030405")
    write_run(folder, QUESTIONS, ANSWERS[1], base=base, steered=Steered(), date="20260102_030505")


def logs(count: int, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Boards of a good pair and a damaged one: the good row stays, and no private image is published."""
    private = folder / "private.png"
    shape("red", 1).save(private)
    save_steering(folder / "scales")
    names = list(HOSTILE)

    def case(k: int) -> str:
        place = folder / f"logs-{k}"
        write_pair(place / "logs" / "good")
        write_pair(place / "logs" / "bad", "tiny/other")
        bad = place / "logs" / "bad"
        media([str(private)])(bad)
        kept = list(bad.rglob("*030405*"))
        for path in kept:
            path.rename(path.with_name(path.name.replace(".json", ".kept")))  # the baseline stays whole
        if k % 7:  # the others try to publish a private image and nothing else
            (HOSTILE[names[k]] if k < len(names) else random_change(k))(bad)
        for path in kept:
            path.with_name(path.name.replace(".json", ".kept")).rename(path)
        board = make_board([place / "logs"], place / "board", resamples=99, images=False)
        good = [row for row in board.rows if row.pair.steered.base.name == "tiny/llava"]
        pages = "".join(
            p.read_text() for p in (place / "board").rglob("*") if p.suffix in (".html", ".md", ".csv")
        )
        shutil.rmtree(place)
        if len(good) != 1:
            return "wrong: the good row is missing"
        return "wrong: a private image in a page" if "data:image/jpeg" in pages else "the good row was there"

    for k in range(count):
        yield f"logs {k}", lambda k=k: child(lambda: quiet_errors(lambda: case(k)))


def quiet_errors(work: Callable[[], str]) -> str:
    """The result of `work`; damage that the harness itself cannot apply twice counts as not applicable."""
    try:
        return work()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        inside = traceback.extract_tb(error.__traceback__)
        if all("hones_eval" not in frame.filename or "torture" in frame.filename for frame in inside):
            return "not applicable"
        raise


def run(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--artifacts", type=int, default=3000)
    parser.add_argument("--logs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("torture.jsonl"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    find_aggregation("shapes", "exact_match", None)  # imports lmms-eval once, before the children start
    done = {}
    if options.out.exists():
        done = dict(json.loads(line) for line in options.out.read_text().splitlines())
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, options.out.open("a") as kept:
        for part in (artifacts, logs, kills):
            folder = Path(name) / part.__name__
            folder.mkdir()
            for case, work in part(getattr(options, part.__name__), folder):
                if case not in done:
                    done[case] = work()
                    kept.write(json.dumps([case, done[case]]) + "\n")
                    kept.flush()
                found = json.loads(done[case]) if done[case].startswith("{") else {done[case]: 1}
                for result, count in found.items():
                    totals[f"{part.__name__}: {result}"] += count
    for result, count in sorted(totals.items()):
        print(f"{count:6} {result}")
    bad = ("traceback", "wrong", "leftovers", "took too long", "ended")
    return int(
        any(result.split(": ", 1)[1].startswith(bad) and "before the kill" not in result for result in totals)
    )


if __name__ == "__main__":
    sys.exit(run())
