"""Damaged artifacts, configuration files, tables, images and task files, given to commands that read them.

A call either refuses its input in one line, or succeeds. Where it succeeds, a changed figure has to come with
a changed record of its input (settings, examples or digest); otherwise the change was accepted silently.
"""

import csv
import io
import json
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import yaml
from commands import make_table, remove
from PIL import Image
from sandbox import SECONDS, child, limit_time

from hones_eval.__main__ import main
from hones_eval.core.artifact import header_digest

VALUES = [
    *(None, True, 1, -1, 0, 10**30, 1e308, 1.5, "", "x" * 5000, "\ud800", "\x1b[2J", "NaN", [], {}, [[[]]]),
    *("../../../etc/passwd", "!!python/object/apply:os.system [id]", [1] * 1000, {"a": {"b": {}}}),
]
IMAGES = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
BATCH = 25


def replace_value(draw: random.Random, content: Any) -> None:
    """Replace, delete or repeat a value somewhere in JSON-like content."""
    holder = content
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw.choice(keys)
        if isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.6:
            holder = holder[key]
            continue
        break
    if draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(VALUES)


def change_bytes(draw: random.Random, content: bytes) -> bytes:
    """Flip some bytes, cut the end off, or repeat a part."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    kind = draw.random()
    if kind < 0.3:
        return bytes(changed[: draw.randrange(len(changed))])
    if kind < 0.4:
        at = draw.randrange(len(changed))
        return bytes(changed[:at] + changed[at // 2 :])
    return bytes(changed)


def change_lines(draw: random.Random, text: str) -> str:
    """Delete, repeat or swap lines of a text, or replace the value after a colon or between commas."""
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    kind = draw.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, draw.choice(lines))
    elif kind == 2:
        other = draw.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        sign = ":" if ":" in lines[at] else ","
        parts = lines[at].split(sign)
        value = json.dumps(draw.choice(VALUES)) if sign == ":" else str(draw.choice(VALUES))
        parts[draw.randrange(len(parts))] = f" {value}"
        lines[at] = sign.join(parts)
    return "\n".join(lines) + "\n"


class Refused(Exception):
    """The command ended with a line on standard error."""


def call(arguments: list[str]) -> None:
    """Run a command. Raises: Refused after a clean refusal; AssertionError after one that was not clean."""
    errors = io.StringIO()
    with redirect_stderr(errors):
        status = main(arguments)
    text = errors.getvalue()
    assert "Traceback" not in text, text[-1500:]
    if status:
        lines = [line for line in text.splitlines() if line.startswith("hones-eval: ")]
        assert status in (1, 2), status
        assert len(lines) == 1, text[-1500:]
        assert "\x1b" not in text, "a control character reached the terminal"
        raise Refused


class Calls:
    """Calls of one kind, numbered; each on an input that its number damages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = folder / "case"

    def artifact(self, seed: int) -> str:
        """Damage a file of a ranking for `scale`, or of a steering for `export`."""
        draw = random.Random(seed)
        kind = ("ranking", "steering")[seed % 2]
        shutil.copytree(self.folder / {"ranking": "first", "steering": "steering"}[kind], self.place / "in")
        path = draw.choice(sorted((self.place / "in").iterdir()))
        signed = False
        if path.suffix == ".json" and draw.random() < 0.8:
            header = json.loads(path.read_bytes())
            replace_value(draw, header)
            if draw.random() < 0.1:
                header["format_version"] = 1
            signed = draw.random() < 0.4
            if signed:
                header["header_digest"] = header_digest(header)
            path.write_text(json.dumps(header))
        else:
            path.write_bytes(change_bytes(draw, path.read_bytes()))
        out = self.place / "out"
        if kind == "ranking":
            call(["scale", "--ranking", str(self.place / "in"), "--how", "fixed", "--out", str(out)])
        else:
            call(["export", "--steering", str(self.place / "in"), "--to", "ia3", "--out", str(out)])
        if signed:
            return "accepted with its digest"
        reference = self.folder / "references" / kind
        made = [path for path in reference.iterdir() if path.name != "index.html"]  # it names its input
        same = all((out / path.name).read_bytes() == path.read_bytes() for path in made)
        return "accepted unchanged" if same else "wrong: accepted silently"

    def config(self, seed: int) -> str:
        """Damage the file of `--config` of `scale`."""
        draw = random.Random(seed)
        given = {"ranking": str(self.folder / "first"), "how": "fixed", "factor": 2.0, "neurons": 0.05}
        text = yaml.safe_dump(given)
        path = self.place / "config.yaml"
        path.write_bytes(
            change_lines(draw, text).encode("utf-8", "surrogatepass")
            if draw.random() < 0.7
            else change_bytes(draw, text.encode())
        )
        call(["scale", "--config", str(path), "--out", str(self.place / "out")])
        made = json.loads((self.place / "out" / "steering.json").read_text())
        reference = json.loads((self.folder / "references" / "ranking" / "steering.json").read_text())
        if made["digest"] != reference["digest"] and made["settings"] == reference["settings"]:
            return "wrong: accepted silently"
        return "accepted"

    def table(self, seed: int) -> str:
        """Damage the table of `task new`."""
        draw = random.Random(seed)
        photos = self.folder / "photos"
        text = (photos / "table.csv").read_text()
        path = self.place / draw.choice(["table.csv", "table.jsonl"])
        if path.suffix == ".jsonl":
            rows = list(csv.DictReader(text.splitlines()))
            replace_value(draw, rows)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif draw.random() < 0.6:
            path.write_bytes(change_lines(draw, text).encode("utf-8", "surrogatepass"))
        else:
            path.write_bytes(change_bytes(draw, text.encode()))
        return self._new_task(path, photos)

    def image(self, seed: int) -> str:
        """Damage one of the images of `task new`."""
        draw = random.Random(seed)
        photos = shutil.copytree(self.folder / "photos", self.place / "photos")
        path = photos / f"{draw.randrange(4)}.png"
        held = io.BytesIO()
        Image.open(path).convert("RGB").save(held, draw.choice(IMAGES))
        path.write_bytes(change_bytes(draw, held.getvalue()))
        return self._new_task(photos / "table.csv", photos)

    def _new_task(self, table: Path, photos: Path) -> str:
        out = self.place / "out"
        call(
            ["task", "new", "--csv", str(table), "--images", str(photos), "--name", "made", "--out", str(out)]
        )
        made = [json.loads(line) for line in (out / "made.jsonl").read_text().split("\n") if line]
        text = table.read_text(encoding="utf-8-sig")
        rows = (
            [line for line in text.splitlines() if line.strip()]
            if table.suffix == ".jsonl"
            else list(csv.reader(text.splitlines(keepends=True)))[1:]
        )
        lost = len([row for row in rows if row]) - len(made)
        return "accepted" if not lost else f"wrong: {lost} rows vanished"

    def task_file(self, seed: int) -> str:
        """Damage a task file, and rank heads on the task."""
        draw = random.Random(seed)
        shutil.copytree(self.folder / "tasks", self.place / "tasks")
        path = self.place / "tasks" / "own_a_discovery.yaml"
        text = path.read_text()
        path.write_bytes(
            change_lines(draw, text).encode("utf-8", "surrogatepass")
            if draw.random() < 0.7
            else change_bytes(draw, text.encode())
        )
        out = self.place / "out"
        arguments = ["rank", "--method", "activation", "--model", "llava_hf", "--tasks", "own_a_discovery"]
        arguments += ["--model_args", f"pretrained={self.folder / 'model'}", "--neurons", "0.05"]
        call([*arguments, "--include_path", str(self.place / "tasks"), "--out", str(out)])
        made = json.loads((out / "ranking.json").read_text())
        reference = json.loads((self.folder / "references" / "task" / "ranking.json").read_text())
        recorded = ("settings", "examples", "method", "seed")
        if made["digest"] != reference["digest"] and all(made[key] == reference[key] for key in recorded):
            return "wrong: accepted silently"
        return "accepted"


KINDS = ("artifact", "config", "table", "image", "task_file")
SHARES = {"artifact": 0.4, "config": 0.15, "table": 0.15, "image": 0.2, "task_file": 0.1}


def references(folder: Path) -> None:
    """What the commands make of the undamaged inputs."""
    made = folder / "references"
    call(["scale", "--ranking", str(folder / "first"), "--how", "fixed", "--out", str(made / "ranking")])
    call(["export", "--steering", str(folder / "steering"), "--to", "ia3", "--out", str(made / "steering")])
    arguments = ["rank", "--method", "activation", "--model", "llava_hf", "--tasks", "own_a_discovery"]
    arguments += ["--model_args", f"pretrained={folder / 'model'}", "--include_path", str(folder / "tasks")]
    call([*arguments, "--neurons", "0.05", "--out", str(made / "task")])
    if not (folder / "photos").exists():
        make_table(folder / "photos")


def calls(count: int, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Batches of calls; each batch is a child, each call has its own limit on time."""
    made = Calls(folder)

    def batch(kind: str, first: int, size: int) -> str:
        found: Counter[str] = Counter()
        for seed in range(first, first + size):
            remove(made.place)
            made.place.mkdir(parents=True)
            limit_time(SECONDS)
            try:
                result = str(getattr(made, kind)(seed))
            except Refused:
                result = "refused"
            except BaseException:  # noqa: BLE001 - counted as a traceback
                result = f"traceback: {seed}: {traceback.format_exc()[-700:]}"
            found[f"{kind.replace('_', ' ')}: {result}"] += 1
        return json.dumps(found)

    for kind in KINDS:
        total = round(count * SHARES[kind])
        for first in range(0, total, BATCH):
            size = min(BATCH, total - first)

            def work(kind: str = kind, first: int = first, size: int = size) -> str:
                ended = child(lambda: batch(kind, first, size), seconds=size * SECONDS)
                if ended.result.startswith("{"):
                    return ended.result
                return json.dumps({f"{kind}: ended {ended.result} {first}": size})

            yield f"{kind} {first}", work
