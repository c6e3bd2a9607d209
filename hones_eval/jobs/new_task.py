"""Write an lmms-eval task from a table of the user's own images, after checking every row."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from hones_eval.choices import TaskKind
from hones_eval.core.files import check_plain, staged_folder, write_text
from hones_eval.core.images import UNREADABLE, as_displayed, image_hash, refuse_truncated_images
from hones_eval.errors import TaskError, first_line

Row = Mapping[str, str]
SHARES = {"discovery": 0.5, "development": 0.2, "test": 0.3}
"""Shares of the images of the splits; no image is in two of them."""
IMAGE_COLUMNS = ("image", "file_name", "file", "path")
PROMPTS: dict[str, str] = {
    "question": "Question: {question}\nAnswer the question with a short phrase.",
    "choice": "Question: {question}\nAnswer the question with a short phrase.",
    "caption": "Describe the image in one sentence.",
    "box": "Locate the {phrase}.\nAnswer with the box as x1 y1 x2 y2.",
}
NEEDED: dict[str, tuple[str, ...]] = {
    "question": ("question", "answer"),
    "choice": ("question", "answer", "choices"),
    "caption": ("caption",),
    "box": ("phrase", "box"),
}
METRICS: dict[str, list[tuple[str, str]]] = {
    "question": [("exact_match", "mean")],
    "choice": [("acc", "mean")],
    "caption": [("bleu_4", "!function utils.corpus_bleu")],
    "box": [("iou", "mean"), ("iou_at_least_50", "mean")],
}
UTILS = '''"""The functions that this folder's task files name; they are part of hones-eval."""

from hones_eval.lmms.table_tasks import (  # noqa: F401
    box_results,
    caption_results,
    corpus_bleu,
    images,
    question_results,
)
'''


@dataclass(frozen=True)
class NewTask:
    """A written task. `splits` are the numbers of examples of each task file, by task name."""

    name: str
    kind: str
    images: int
    splits: dict[str, int]
    warnings: list[str]


def new_task(
    table: Path, images: Path, out: Path, name: str | None, kind: TaskKind, prompt: str | None
) -> NewTask:
    """Check a table and its images, and write a task with image-disjoint splits.

    Args:
        table: a CSV file in UTF-8 with a header, or JSON lines (`.jsonl`).
        images: the folder that the image column is relative to.
        out: the folder for the task files.
        name: the task's name; by default that of the table's file.
        kind: the kind of task; `auto` decides by the columns.
        prompt: the prompt, with column names in braces; by default that of the HONES paper.

    Raises: TaskError naming the first bad row and the number of bad rows.
    """
    rows = read_table(table)
    found = _kind(table, rows, kind)
    name = _task_name(name or table.stem)
    column = _image_column(table, rows)
    shown = {name: _image(images, name) for name in dict.fromkeys(row[column] for row in rows)}
    documents = _documents(table, rows, images, column, found, prompt or PROMPTS[found], shown)
    known = {str((images / name).resolve()): image for name, image in shown.items()}
    splits = _splits(documents, {path: image.hash for path, image in known.items() if image.fault is None})
    tasks = {f"{name}{suffix and '_'}{suffix}": part for suffix, part in {"": documents, **splits}.items()}
    with staged_folder(out, last=[f"{task}.yaml" for task in tasks]) as folder:
        for task, chosen in tasks.items():
            _write_split(folder, out, task, found, chosen)
        write_text(folder / "utils.py", UTILS)
    counts = {task: len(chosen) for task, chosen in tasks.items()}
    return NewTask(
        name,
        found,
        len({document["image_path"] for document in documents}),
        counts,
        _warnings(documents, found),
    )


def read_table(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV or JSON-lines table as text. Raises: TaskError for a table that cannot be read."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise TaskError(f"{table} is not UTF-8 text: save the table as UTF-8") from None
    rows = _json_rows(table, text) if table.suffix in (".jsonl", ".json") else _csv_rows(table, text)
    if not rows:
        raise TaskError(f"{table} has no rows below its header")
    return rows


def _csv_rows(table: Path, text: str) -> list[dict[str, str]]:
    header = text.splitlines()[0] if text.strip() else ""
    if "," not in header and (";" in header or "\t" in header):
        raise TaskError(
            f"{table}: the columns of the header are not separated by commas; save it with commas"
        )
    reader = csv.reader(io.StringIO(text, newline=""))
    rows: list[dict[str, str]] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise TaskError(f"{table}: two columns of the header are called {twice!r}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise TaskError(
                    f"{table}, line {reader.line_num}: it has another number of cells than the header"
                )
            rows.append(dict(zip(names, (cell.strip() for cell in cells), strict=True)))
    except csv.Error as error:
        raise TaskError(f"{table}, line {reader.line_num}: not valid CSV: {error}") from None
    return rows


def _json_rows(table: Path, text: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            check_plain(row)
        except RecursionError:
            raise TaskError(f"{table}, line {number}: not valid JSON: it is nested too deeply") from None
        except ValueError as error:
            raise TaskError(f"{table}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise TaskError(f"{table}, line {number}: it is not a JSON object")
        if rows and row.keys() != rows[0].keys():
            differing = sorted(row.keys() ^ rows[0].keys())
            raise TaskError(f"{table}, line {number}: its fields differ from those before: {differing[0]!r}")
        try:
            rows.append({key: _as_cell(value) for key, value in row.items()})
        except TypeError as error:
            raise TaskError(f"{table}, line {number}: {error}") from None
    return rows


def _as_cell(value: Any) -> str:
    """A JSON value as it would stand in a CSV cell: lists with bars between their items, null as nothing.

    Raises: TypeError for true, false, objects, and lists in lists.
    """
    if isinstance(value, list):
        return "|".join(_as_cell(item) for item in value if not isinstance(item, list) or _as_cell(item))
    if isinstance(value, bool | dict):
        raise TypeError(f"{json.dumps(value)[:100]} is neither text, a number nor a list of them")
    return "" if value is None else str(value).strip()


def _kind(table: Path, rows: Sequence[Row], asked: str) -> str:
    columns = rows[0]
    if asked == "auto":
        order = ("choice", "caption", "box", "question")
        asked = next((kind for kind in order if set(NEEDED[kind]) <= set(columns)), "")
        if not asked:
            needs = "; ".join(f"{kind}: {', '.join(NEEDED[kind])}" for kind in order)
            raise TaskError(
                f"{table}: the columns {', '.join(columns)} fit no kind of task; needed are {needs}"
            )
    for column in NEEDED[asked]:
        if column not in columns:
            near = get_close_matches(column, columns, n=1)
            hint = f"; did you mean {near[0]}? Rename it" if near else ""
            raise TaskError(f"{table}: --kind {asked} needs a column {column!r}{hint}")
    return asked


def _task_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise TaskError(
            f"--name {name!r}: a task's name has letters, digits and underscores, such as my_task"
        )
    return name


def _image_column(table: Path, rows: Sequence[Row]) -> str:
    found = next((column for column in IMAGE_COLUMNS if column in rows[0]), None)
    if found is None:
        raise TaskError(
            f"{table}: no column names the image; call it image (the columns are {', '.join(rows[0])})"
        )
    return found


class _Image(NamedTuple):
    """An image as it is displayed: its width and height, and the hash of its pixels; or its fault."""

    size: tuple[int, int] = (0, 0)
    hash: str = ""
    fault: str | None = None


def _documents(
    table: Path,
    rows: Sequence[Row],
    folder: Path,
    column: str,
    kind: str,
    prompt: str,
    shown: Mapping[str, _Image],
) -> list[dict[str, Any]]:
    documents, faults = [], []
    for number, row in enumerate(rows, start=1):
        name = row[column]
        image = shown[name]
        fault = image.fault or _fault(row, kind, image.size)
        if fault:
            faults.append(f"row {number}: {fault}")
            continue
        if prompt == PROMPTS["box"]:  # which has an article of its own
            row = {**row, "phrase": re.sub(r"^(the|an?)\s+", "", row["phrase"], flags=re.IGNORECASE)}
        documents.append({"image_path": str((folder / name).resolve()), **_content(table, row, kind, prompt)})
    if faults:
        raise TaskError(
            f"{table}: {len(faults)} of {len(rows)} rows cannot be used, the first is {faults[0]}"
        )
    return _merged(documents) if kind == "caption" else documents


def _image(folder: Path, name: str) -> _Image:
    """Read an image. The whole file is decoded, and rotated as its camera says."""
    if not name:
        return _Image(fault="it names no image")
    try:
        with refuse_truncated_images(), Image.open(folder / name) as opened:
            displayed = as_displayed(opened)
            return _Image(displayed.size, image_hash(displayed))
    except FileNotFoundError:
        return _Image(fault=f"there is no image {name} in {folder}")
    except (*UNREADABLE, MemoryError) as error:
        return _Image(fault=f"the image {name} cannot be read: {first_line(error)}")


def _fault(row: Row, kind: str, size: tuple[int, int]) -> str | None:
    empty = next((column for column in NEEDED[kind] if not _several(row[column])), None)
    if empty:
        return f"its {empty} is empty"
    if kind == "choice" and row["answer"] not in _several(row["choices"]):
        return f"its answer {row['answer']!r} is not among its choices {row['choices']!r} (separated by |)"
    return _box_fault(row["box"], size) if kind == "box" else None


def _box_fault(text: str, size: tuple[int, int]) -> str | None:
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    if len(numbers) != 4:
        return f"its box {text!r} is not four numbers: left, top, right, bottom"
    left, top, right, bottom = numbers
    if left >= right or top >= bottom:
        return f"its box {text!r} has no area: the numbers are left, top, right, bottom"
    width, height = (1, 1) if max(numbers) <= 1 else size
    if left < 0 or top < 0 or right > width or bottom > height:
        return f"its box {text!r} is not inside the image of {size[0]} x {size[1]} pixels"
    return None


def _several(cell: str) -> list[str]:
    return [part.strip() for part in cell.split("|") if part.strip()]


def _content(table: Path, row: Row, kind: str, prompt: str) -> dict[str, Any]:
    try:
        text = prompt.format_map(row)
    except (LookupError, ValueError, AttributeError):
        raise TaskError(
            f"--prompt {prompt!r}: the names in braces have to be columns of {table.name}: {', '.join(row)}"
        ) from None
    if kind == "choice":
        choices = _several(row["choices"])
        return {"prompt": text, "choices": choices, "target": choices.index(row["answer"])}
    references = _several(row[{"question": "answer", "caption": "caption", "box": "box"}[kind]])
    if kind == "box":
        references = [row["box"].strip("[]() ")]
    return {"prompt": text, "answer": references[0], "references": references}


def _merged(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One example per image: captions of the same image become its references."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for document in documents:
        key = document["image_path"], document["prompt"]
        if key in merged:
            merged[key]["references"] += document["references"]
        else:
            merged[key] = document
    return list(merged.values())


def _splits(
    documents: Sequence[dict[str, Any]], hashes: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Assign whole images to splits, in the order of a hash of their file names.

    Files with the same pixels, by their `hashes`, are one image.
    """
    paths = sorted(
        {document["image_path"] for document in documents},
        key=lambda path: hashlib.sha256(Path(path).name.encode()).digest(),
    )
    same: dict[str, list[str]] = {}
    for path in paths:
        same.setdefault(hashes[path], []).append(path)
    images = list(same.values())
    splits: dict[str, list[dict[str, Any]]] = {}
    share = 0.0
    for name, part in SHARES.items():
        first, share = round(share * len(images)), share + part
        chosen = {path for image in images[first : round(share * len(images))] for path in image}
        splits[name] = [document for document in documents if document["image_path"] in chosen]
    return {name: chosen for name, chosen in splits.items() if chosen}


def _write_split(folder: Path, out: Path, task: str, kind: str, documents: Sequence[dict[str, Any]]) -> None:
    """Write a split's table and task file into `folder`; the task file names the table in `out`."""
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    write_text(folder / f"{task}.jsonl", lines)
    write_text(folder / f"{task}.yaml", task_file(task, kind, (out / f"{task}.jsonl").resolve()))


def task_file(task: str, kind: str, table: Path) -> str:
    """The YAML of a task over a JSON-lines table with `image_path`, `prompt` and the gold answer."""
    config: dict[str, Any] = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(table)}},
        "test_split": "test",
        "output_type": "multiple_choice" if kind == "choice" else "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "target" if kind == "choice" else "answer",
    }
    lines = [
        "# Written by `hones-eval task new`. Run the command again after moving the images or this folder."
    ]
    lines.append(yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip())
    lines.append("doc_to_visual: !function utils.images")
    if kind == "choice":
        lines.append("doc_to_choice: choices")
    else:
        lines += ["generation_kwargs:", "  max_new_tokens: 32", "  do_sample: false"]
        lines.append(f"process_results: !function utils.{kind}_results")
    lines.append("metric_list:")
    for metric, aggregation in METRICS[kind]:
        lines += [f"- metric: {metric}", f"  aggregation: {aggregation}", "  higher_is_better: true"]
    return "\n".join(lines) + "\n"


def _warnings(documents: Sequence[dict[str, Any]], kind: str) -> list[str]:
    found = []
    answers = {
        document["choices"][document["target"]] if kind == "choice" else document["answer"]
        for document in documents
    }
    if len(answers) == 1 and len(documents) > 1:
        found.append(f"all gold answers are {answers.pop()!r}: a model that always says so is always right")
    paths = {document["image_path"] for document in documents}
    if len(paths) < 10:
        found.append(f"there are only {len(paths)} images: too few for a verdict on a steering")
    return found
