"""`hones-eval edit`."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from hones_eval.choices import Category, DType, EditorName, Level, MaskName
from hones_eval.commands.answer import Answer
from hones_eval.errors import HonesError
from hones_eval.notes import note

if TYPE_CHECKING:
    from hones_eval.editing.reading import Reading
    from hones_eval.editing.run import Report

NAMED = 10


def edit(
    out: Path,
    editor: EditorName,
    questions: Path | None = None,
    images: Path | None = None,
    task: str | None = None,
    level: Level | None = None,
    category: Category | None = None,
    limit: int | None = None,
    scene_graphs: Path | None = None,
    mask: MaskName = "cut",
    segmenter: str | None = None,
    folder: Path | None = None,
    checkpoint: str | None = None,
    steps: int = 50,
    guidance: float = 7.5,
    negative_prompt: str = "low quality, blurry",
    longest_side: int = 1024,
    composite: bool = True,
    batch: int = 1,
    device: str = "auto",
    dtype: DType = "auto",
    offload: bool = False,
    min_psnr: float = 30.0,
    min_ssim: float = 0.95,
    min_change: float = 3.0,
    model: str | None = None,
    model_args: str = "",
    workers: int = 0,
    sheet: int = 60,
    include_path: Path | None = None,
    seed: int = 0,
) -> Answer:
    """Edit images so that the answers to their yes/no questions change, and check that it worked.

    Args:
        out: the folder to write images, masks, vseam_pairs.json, report.json and the contact sheet to; the
            same command continues where it stopped.
        editor: remove (object), recolor, retexture (attribute), move, mirror (relation), auto (the one of
            these that fits), inpaint (a diffusers checkpoint, any level) or folder (images made elsewhere).
        questions: a JSON file of records, as the V-SEAM release has them.
        images: the folder of the clean images; by default that of the questions.
        task: an lmms-eval task whose documents are such records, instead of questions and images.
        level: edit only the records of this semantic level.
        category: the category of records that do not name theirs.
        limit: read at most this many records.
        scene_graphs: GQA scene graphs with the boxes of records that have none.
        mask: the region to edit; cut is the thing in the box, found by its colors.
        segmenter: a checkpoint of the SAM family, for --mask segmenter.
        folder: where --editor folder finds the edited images; by default --images.
        checkpoint: a diffusers inpainting checkpoint, for --editor inpaint.
        steps: inpaint: denoising steps.
        guidance: inpaint: how strongly the prompt guides.
        negative_prompt: inpaint: what not to paint.
        longest_side: inpaint: larger images are painted at this size.
        composite: inpaint: keep the clean image outside the mask.
        batch: inpaint: images of one size painted at once.
        device: for inpaint and segmenter: auto, cpu, cuda, cuda:1 ...
        dtype: inpaint: the checkpoint's floating-point type.
        offload: inpaint: keep parts of the checkpoint on the CPU until they run.
        min_psnr: reject edits with a lower PSNR outside the mask, in decibels.
        min_ssim: reject edits with a lower SSIM outside the mask.
        min_change: reject edits with a smaller mean color difference (CIE76) inside the mask.
        model: an lmms-eval model that answers the clean and the edited question, to count flipped answers.
        model_args: of that model, as in lmms-eval --model_args.
        workers: processes for editors that need no weights; 0 edits in this one.
        sheet: show at most this many edits on the contact sheet, taken evenly from all.
        include_path: a folder with more task YAML files.
        seed: for everything that is drawn at random.

    Example:
        hones-eval edit --questions pairs.json --images photos --editor auto --out edits
        hones-eval edit --task vseam_color --level attribute --editor recolor --out edits
    """
    from hones_eval.editing.checks import Bounds
    from hones_eval.editing.inpaint import InpaintSettings
    from hones_eval.editing.run import edit_records
    from hones_eval.editing.sheet import contact_sheet
    from hones_eval.editing.work import EditSettings

    for flag, value, least in (("limit", limit, 1), ("workers", workers, 0), ("sheet", sheet, 0)):
        if value is not None and value < least:
            raise HonesError(f"--{flag} {value}: give {least} or more")
    settings = EditSettings(
        editor=editor,
        level=level,
        mask=mask,
        segmenter=segmenter,
        device=device,
        seed=seed,
        bounds=Bounds(min_psnr, min_ssim, min_change),
        folder=str(folder) if folder else None,
        inpaint=InpaintSettings(
            checkpoint,
            steps,
            guidance,
            negative_prompt,
            longest_side,
            composite,
            batch,
            device,
            dtype,
            offload,
        )
        if checkpoint
        else None,
    )
    reading, folder_of_images = _records(
        questions, images, task, out, scene_graphs, category, limit, include_path
    )
    report = edit_records(
        reading, folder_of_images, out, settings, workers=workers, progress=sys.stderr.isatty()
    )
    if model is not None:
        from hones_eval.commands.edit_answers import count_flips

        report = count_flips(report, out, settings, model, model_args)
    if not reading.records and not reading.problems:
        raise HonesError(f"{questions or task}: there is no record in it")
    if not report.accepted and not report.rejected:
        first = f": {report.problems[0].question_id}: {report.problems[0].reason}" if report.problems else ""
        raise HonesError(
            f"none of {len(reading.records) + len(reading.problems)} records could be edited{first}"
        )
    contact_sheet(out, report, shown=sheet)
    if report.resumed:
        note(f"{report.resumed} edits are kept from an earlier run")
    lines = _lines(report)
    lines.append(f"wrote {out / 'vseam_pairs.json'}, {out / 'report.json'} and {out / 'contact_sheet.html'}")
    data = {"out": str(out), "by_level": report.by_level(), "left_out": report.left_out}
    return Answer(lines, data, _headline(report))


def _records(
    questions: Path | None,
    images: Path | None,
    task: str | None,
    out: Path,
    scene_graphs: Path | None,
    category: str | None,
    limit: int | None,
    include_path: Path | None,
) -> "tuple[Reading, Path]":
    """The records to edit, and the folder of their images."""
    from hones_eval.editing.reading import Reading, read_records

    if (questions is None) == (task is None):
        raise HonesError("give either --questions FILE (with --images DIR) or --task TASK")
    if task is not None:
        from hones_eval.commands.edit_task import records_of_task

        return records_of_task(task, out, include_path, scene_graphs, category, limit)
    assert questions is not None
    folder = images or questions.parent
    if not folder.is_dir():
        raise HonesError(f"--images {folder} is not a folder")
    reading = read_records(questions, scene_graphs=scene_graphs, category=category)
    return Reading(reading.records[:limit], reading.problems), folder


def _headline(report: "Report") -> str:
    totals = Counter[str]()
    for counts in report.by_level().values():
        totals.update(counts)
    accepted = totals["accepted"]
    return (
        f"{accepted} edit{'' if accepted == 1 else 's'} accepted, {totals['rejected']} rejected, "
        f"{totals['not_editable']} not editable"
    )


def _summary(report: "Report") -> str:
    parts = [
        f"{level}: {counts['accepted']} accepted, {counts['rejected']} rejected, "
        f"{counts['not_editable']} not editable"
        for level, counts in report.by_level().items()
    ]
    return "; ".join(parts) + "."


def _lines(report: "Report") -> list[str]:
    """How many edits were accepted, and why the others were not."""
    lines = [_summary(report)]
    lines += [
        f"rejected {row['question_id']}: {'; '.join(row['reasons'])}" for row in report.rejected[:NAMED]
    ]
    lines += [f"not editable {each.question_id}: {each.reason}" for each in report.problems[:NAMED]]
    more = max(0, len(report.rejected) - NAMED) + max(0, len(report.problems) - NAMED)
    if more:
        lines.append(f"and {more} more, in report.json")
    if report.left_out:
        lines.append(f"{report.left_out} records of other levels or categories are left out")
    return lines
