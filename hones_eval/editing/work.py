"""The work on one record in one process, and its settings. Does not import torch."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import TypeVar

import cv2

from hones_eval.choices import EditorName, Level, MaskName
from hones_eval.editing import photographs
from hones_eval.editing.checks import Bounds
from hones_eval.editing.editors import Edited
from hones_eval.editing.inpaint import InpaintSettings
from hones_eval.editing.masks import Masker, masker
from hones_eval.editing.problems import Problem, RecordError, no_memory
from hones_eval.editing.records import Record
from hones_eval.editing.single import Job, Made, finish, make, prepare, region_of

Result = TypeVar("Result")


@dataclass(frozen=True)
class EditSettings:
    """The settings that determine the result of an edit."""

    editor: EditorName
    level: Level | None = None
    mask: MaskName = "cut"
    segmenter: str | None = None
    device: str = "auto"
    seed: int = 0
    bounds: Bounds = field(default_factory=Bounds)
    inpaint: InpaintSettings | None = None
    folder: str | None = None
    """Where the editor `folder` finds images made elsewhere, by the record's path or its question id."""


def guarded(job: Job, work: Callable[[], Result]) -> Result | Problem:
    """Turn the failure of one record into a problem, so that the run continues."""
    try:
        return work()
    except RecordError as error:
        return problem_of(job, str(error))
    except (MemoryError, RuntimeError, cv2.error) as error:
        if no_memory(error):
            return problem_of(
                job, "not enough memory for its image; use fewer --workers, or a smaller --batch"
            )
        if isinstance(error, cv2.error):
            return problem_of(job, f"OpenCV cannot edit its image: {' '.join(str(error).split())}")
        raise


def make_one(job: Job, masks: Masker, settings: EditSettings) -> Made:
    """Edit one record, or use an edited image that was made elsewhere.

    Raises: RecordError with the reason why it cannot be done.
    """
    if settings.editor == "folder":
        prepared = prepare(job)
        mask = region_of(prepared, masks).footprint(*prepared.photograph.pixels.shape[:2])
        path = elsewhere(job.record, job.images, settings)
        return finish(prepared, Edited(photographs.read(path).pixels, mask))
    return make(job, masks)


def elsewhere(record: Record, images: Path, settings: EditSettings) -> Path:
    """Find the image of an edit that was made elsewhere.

    Raises: RecordError when there is none.
    """
    folder = Path(settings.folder) if settings.folder else images
    return photographs.find(folder, record.edited, record.question_id)


def problem_of(job: Job, reason: str) -> Problem:
    """Name a record and its problem."""
    return Problem(job.record.question_id, job.record.level, reason)


def start_worker() -> None:
    """Initialize a worker process."""
    cv2.setNumThreads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is gone; otherwise it would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def in_worker(job: Job, settings: EditSettings) -> Made | Problem:
    """Edit one record in a worker process."""
    masks = masker(settings.mask, settings.segmenter, settings.device)
    return guarded(job, partial(make_one, job, masks, settings))
