"""Records to edit from the documents of an lmms-eval task."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from lmms_eval.api.model import lmms
from PIL import Image

from hones_eval.core.artifact import read_json, write_bytes
from hones_eval.core.images import image_hash, refuse_truncated_images
from hones_eval.editing.photographs import png
from hones_eval.editing.problems import Problem, RecordError
from hones_eval.editing.reading import Reading, records_from
from hones_eval.editing.single import file_name
from hones_eval.errors import TaskError
from hones_eval.lmms.examples.tasks import build_requests, build_task


def records_of_task(
    task: str,
    out: Path,
    include_path: Path | None,
    scene_graphs: Path | None,
    category: str | None,
    limit: int | None,
) -> tuple[Reading, Path]:
    """Make records of a task's documents and save its images, each once.

    A document is a V-SEAM record itself, or carries one as JSON text in the column `record`.

    Returns: the records, and the folder with their images, next to `out`.
    Raises: TaskError when the task cannot be built or its documents have no image.
    """
    # The only attributes of a model that building a task needs: its kind of prompts, and a place for data.
    reader = cast(lmms, SimpleNamespace(is_simple=True, task_dict={}))
    built = build_task(task, reader, model_name="default", include_path=include_path, gen_kwargs=None)
    requests = [asked[0] for asked in build_requests(built, limit, 0)]
    folder = out.with_name(f"{out.name}_pictures")
    rows, problems = [], []
    for request in requests:
        doc = reader.task_dict[built.task_name][request.args[-1]][request.doc_id]
        try:
            rows.append(_row(doc, request.doc_id, request.args[2], folder, task))
        except RecordError as error:
            problems.append(Problem(str(doc.get("question_id", request.doc_id)), None, str(error)))
    graphs = read_json(scene_graphs) if scene_graphs else {}
    reading = records_from(rows, scene_graphs=graphs, category=category or _category(task))
    return Reading(reading.records, problems + reading.problems), folder


def _row(
    doc: Mapping[str, Any], doc_id: int, show: Callable[[Any], list[Any]], folder: Path, task: str
) -> dict[str, Any]:
    """A document as a record, with its image saved.

    Raises: RecordError when its image, or the record that it carries, cannot be read.
    """
    plain = {key: value for key, value in doc.items() if not isinstance(value, Image.Image)}
    if isinstance(plain.get("record"), str):
        try:
            plain |= json.loads(plain["record"])
        except (ValueError, TypeError) as error:
            raise RecordError(f"its column 'record' is not a JSON object: {error}") from None
    try:
        with refuse_truncated_images():
            clean = _keep(show(doc), folder, task)
    except (OSError, SyntaxError) as error:
        raise RecordError(f"its image cannot be read: {' '.join(str(error).split())}") from None
    objects = plain.get("involved_objects") or plain.get("relevant_objects") or plain.get("objects")
    return (
        {"question_id": str(doc_id)} | plain | {"involved_objects": objects, "edited": None, "clean": clean}
    )


def _keep(images: list[Any], folder: Path, task: str) -> str:
    if not images or not isinstance(images[0], Image.Image):
        raise TaskError(f"task {task} shows no image, so there is nothing to edit")
    seen = images[0].convert("RGB")
    name = f"{file_name(image_hash(seen)[:24])}.png"
    if not (folder / name).is_file():
        write_bytes(folder / name, png(np.asarray(seen)))
    return name


def _category(task: str) -> str | None:
    """The category in a task's name: `animal` for `vseam_animal` and `vseam_animal_test`."""
    words = task.split("_")
    return words[1] if words[0] == "vseam" and len(words) > 1 and words[1] not in ("pope", "cocoqa") else None
