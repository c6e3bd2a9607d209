"""Edit and check one record. Files are returned as bytes, not written."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hones_eval.choices import EditorName
from hones_eval.editing import photographs
from hones_eval.editing.checks import Bounds, Verdict, judge, sound
from hones_eval.editing.counterfactual import Change, choose_change
from hones_eval.editing.editors import Edited, Editor, editor_for, window_of
from hones_eval.editing.masks import Masker, Region
from hones_eval.editing.photographs import Photograph
from hones_eval.editing.problems import RecordError
from hones_eval.editing.records import Record

SMALLEST_SIDE = 16


@dataclass(frozen=True)
class Job:
    """A record, and how to edit it."""

    record: Record
    images: Path
    editor: EditorName
    seed: int
    bounds: Bounds


class Prepared(NamedTuple):
    """A record that can be edited, with its image read and its change chosen."""

    job: Job
    path: Path
    photograph: Photograph
    editor: Editor
    change: Change

    @property
    def seed(self) -> int:
        """The seed of this record."""
        text = f"{self.job.seed}:{self.job.record.question_id}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


class Made(NamedTuple):
    """A row of the table, and the files that it refers to."""

    row: dict[str, Any]
    files: dict[str, bytes]


def make(job: Job, masks: Masker) -> Made:
    """Edit one record with an editor that needs no weights.

    Raises: RecordError with the reason why it cannot be done.
    """
    prepared = prepare(job)
    assert prepared.editor.apply is not None
    pixels = prepared.photograph.pixels
    return finish(prepared, prepared.editor.apply(pixels, prepared.change, masks, prepared.seed))


def prepare(job: Job) -> Prepared:
    """Choose the change, find the image and read it.

    Raises: RecordError with the reason why it cannot be done.
    """
    editor = editor_for(job.record, job.editor)
    change = choose_change(job.record, editor.kind, job.seed)
    path = photographs.find(job.images, job.record.image, job.record.image_id)
    photograph = photographs.read(path)
    if min(photograph.pixels.shape[:2]) < SMALLEST_SIDE:
        raise RecordError(f"{path.name} is smaller than {SMALLEST_SIDE} pixels")
    window_of(change.target.box, photograph.pixels)
    return Prepared(job, path, photograph, editor, change)


def region_of(prepared: Prepared, masks: Masker) -> Region:
    """The mask of the thing that changes."""
    pixels = prepared.photograph.pixels
    return masks(pixels, window_of(prepared.change.target.box, pixels))


def finish(prepared: Prepared, edited: Edited) -> Made:
    """Check an edit, and encode its files."""
    clean = prepared.photograph.pixels
    verdict = judge(clean, edited.image, edited.mask, prepared.job.bounds)
    encoded = photographs.png(edited.image)
    broken = sound(encoded, clean.shape[1], clean.shape[0])
    if broken and verdict.accepted:
        verdict = verdict._replace(reasons=(broken,))
    name = file_name(prepared.job.record.question_id)
    clean_name, clean_bytes = _clean_file(prepared)
    row = _row(prepared, edited, verdict) | {
        "clean": clean_name,
        "edited": f"images/{name}_edited.png",
        "mask": f"masks/{name}.png",
    }
    files = {clean_name: clean_bytes, row["edited"]: encoded, row["mask"]: _mask_file(edited.mask)}
    return Made(row, files)


def file_name(question_id: str) -> str:
    """A question's id as a file name. If characters had to change, a hash keeps names distinct."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", question_id).strip(".")[:80]
    if safe == question_id:
        return safe
    return f"{safe}-{hashlib.sha256(question_id.encode()).hexdigest()[:8]}"


def _clean_file(prepared: Prepared) -> tuple[str, bytes]:
    """The clean image for any reader: the file itself, or its decoded pixels as PNG."""
    content = prepared.path.read_bytes()
    name = f"{file_name(prepared.path.stem)}-{hashlib.sha256(content).hexdigest()[:8]}"
    if prepared.photograph.plain and prepared.path.suffix.lower() in (".jpg", ".jpeg", ".png"):
        return f"images/{name}{prepared.path.suffix.lower()}", content
    return f"images/{name}.png", photographs.png(prepared.photograph.pixels)


def _mask_file(mask: NDArray[np.bool_]) -> bytes:
    return photographs.png(np.where(mask, 255, 0).astype(np.uint8))


def _row(prepared: Prepared, edited: Edited, verdict: Verdict) -> dict[str, Any]:
    record, change = prepared.job.record, prepared.change
    counterfactual = {
        "counterfactual_question": change.counterfactual_question,
        "counterfactual_answer": change.counterfactual_answer,
    }
    return {
        "question_id": record.question_id,
        "imageId": record.image_id,
        "semantic_level": record.level,
        "category": record.category,
        "question": record.question,
        "answer": record.answer,
        "edited_answer": change.edited_answer,
        **{key: value for key, value in counterfactual.items() if value is not None},
        "involved_objects": [thing.name for thing in record.things],
        "object_positions": [thing.box._asdict() if thing.box else None for thing in record.things],
        "perturb_prompt": change.prompt,
        "editor": prepared.editor.name,
        "edited_object": edited.thing or change.target.name,
        "value": change.value,
        "answer_from": change.answer_from,
        "accepted": verdict.accepted,
        "reasons": list(verdict.reasons),
        "psnr_outside": _rounded(verdict.psnr_outside, 2),
        "ssim_outside": _rounded(verdict.ssim_outside, 5),
        "change_inside": _rounded(verdict.change_inside, 2),
        "mask_share": _rounded(verdict.mask_share, 5),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
