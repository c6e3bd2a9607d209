"""Edit many records, in parallel and resumable. Records that cannot be edited are counted and named."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from hones_eval.core.artifact import read_json, write_bytes, write_json
from hones_eval.core.files import LOCK, clear_dead_files
from hones_eval.editing import photographs
from hones_eval.editing.editors import EDITORS, Edited, levels_of
from hones_eval.editing.inpaint import Inpainter, Painting
from hones_eval.editing.masks import Masker, Region, masker
from hones_eval.editing.photographs import Pixels
from hones_eval.editing.problems import Problem, RecordError
from hones_eval.editing.reading import Reading
from hones_eval.editing.records import Record
from hones_eval.editing.single import Job, Made, Prepared, file_name, finish, prepare, region_of
from hones_eval.editing.work import (
    EditSettings,
    elsewhere,
    guarded,
    in_worker,
    make_one,
    start_worker,
)
from hones_eval.errors import HonesError
from hones_eval.version import __version__


class Report(NamedTuple):
    """The outcome of a run."""

    accepted: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    problems: list[Problem]
    left_out: int
    """Number of records of other levels or categories than requested."""
    resumed: int
    """Number of edits of an earlier run that were kept."""

    def by_level(self) -> dict[str, dict[str, int]]:
        """Accepted, rejected and not editable, by semantic level."""
        counts: dict[str, Counter[str]] = {}
        for kind, rows in (("accepted", self.accepted), ("rejected", self.rejected)):
            for row in rows:
                counts.setdefault(row["semantic_level"], Counter())[kind] += 1
        for problem in self.problems:
            counts.setdefault(problem.level or "unknown", Counter())["not_editable"] += 1
        kinds = ("accepted", "rejected", "not_editable")
        return {level: {kind: count[kind] for kind in kinds} for level, count in sorted(counts.items())}


def edit_records(
    reading: Reading,
    images: Path,
    out: Path,
    settings: EditSettings,
    *,
    workers: int = 0,
    progress: bool = False,
) -> Report:
    """Edit every record that the settings select. The same settings give the same files, bit for bit.

    Args:
        reading: records, and those that were found unfit when read.
        images: the folder of the clean images.
        out: gets `images/`, `masks/`, `rows/`, `vseam_pairs.json` (accepted) and `report.json`. A run that
            stopped continues where it was.
        settings: how to edit.
        workers: additional processes, for editors without weights; 0 edits in this process.
        progress: whether to show a bar.

    Raises: HonesError when the editor cannot edit the level, or `out` holds edits of other settings.
    """
    _check(settings)
    wanted = [record for record in reading.records if _wanted(record, settings)]
    problems = [
        problem
        for problem in reading.problems
        if settings.level in (None, problem.level) or problem.level is None
    ]
    _claim(out, settings)
    done: dict[str, dict[str, Any]] = {}
    jobs: list[Job] = []
    for record in wanted:
        kept = _kept(record, images, out, settings)
        if kept is not None:
            done[record.question_id] = kept
        else:
            jobs.append(Job(record, images, settings.editor, settings.seed, settings.bounds))
    resumed = len(done)
    for job, made in tqdm(
        _results(jobs, settings, workers), total=len(jobs), disable=not progress, unit="edit"
    ):
        if isinstance(made, Problem):
            problems.append(made)
        else:
            done[job.record.question_id] = _write(made, job.record, images, out, settings)
    rows = [done[record.question_id] for record in wanted if record.question_id in done]
    places = {record.question_id: place for place, record in enumerate(wanted)}
    problems.sort(key=lambda problem: places.get(problem.question_id, -1))
    report = Report(
        [row for row in rows if row["accepted"]],
        [row for row in rows if not row["accepted"]],
        problems,
        len(reading.records) - len(wanted),
        resumed,
    )
    write_tables(report, out, settings)
    return report


def _check(settings: EditSettings) -> None:
    served = levels_of(settings.editor)
    if settings.level is not None and settings.level not in served:
        able = [name for name, editor in EDITORS.items() if settings.level in levels_of(editor.name)]  # type: ignore[arg-type]
        raise HonesError(
            f"the editor {settings.editor} can edit {' and '.join(served)}, not {settings.level}; "
            f"for {settings.level} use {' or '.join(able)}"
        )
    if settings.editor == "inpaint" and settings.inpaint is None:
        raise HonesError(
            "the editor inpaint needs a checkpoint, for example "
            "--checkpoint runwayml/stable-diffusion-inpainting"
        )


def _wanted(record: Record, settings: EditSettings) -> bool:
    serves = settings.editor == "auto" or EDITORS[settings.editor].serves(record)
    return serves and settings.level in (None, record.level)


def _claim(out: Path, settings: EditSettings) -> None:
    """Write the settings into the folder; from then on it only takes edits made with these settings."""
    mine = json.loads(json.dumps({"package_version": __version__} | asdict(settings)))
    path = out / "settings.json"
    if path.is_file():
        theirs = read_json(path)
        differing = [key for key in mine if not isinstance(theirs, dict) or theirs.get(key) != mine[key]]
        if differing:
            raise HonesError(
                f"{out} contains edits made with another {', '.join(differing)}; "
                "choose another --out, or remove it"
            )
    for folder in (out, *(out / name for name in ("images", "masks", "rows"))):
        clear_dead_files(folder)
    if not path.is_file() and out.exists() and any(file.name != LOCK for file in out.iterdir()):
        raise HonesError(f"{out} contains other files and no settings.json of edits; choose another --out")
    write_json(path, mine)


def _kept(record: Record, images: Path, out: Path, settings: EditSettings) -> dict[str, Any] | None:
    """The row of an earlier run, if the record and its images have not changed since."""
    path = out / "rows" / f"{file_name(record.question_id)}.json"
    if not path.is_file():
        return None
    row: dict[str, Any] = read_json(path)
    whole = all((out / row[key]).is_file() for key in ("clean", "edited", "mask"))
    return row if whole and row.get("made_from") == _made_from(record, images, settings) else None


def _made_from(record: Record, images: Path, settings: EditSettings) -> str:
    """A hash of the record and of the files that its edit is made from."""
    total = hashlib.sha256(repr(record).encode())
    try:
        total.update(photographs.find(images, record.image, record.image_id).read_bytes())
        if settings.editor == "folder":
            total.update(elsewhere(record, images, settings).read_bytes())
    except RecordError as error:
        total.update(str(error).encode())
    return total.hexdigest()


def _results(
    jobs: Sequence[Job], settings: EditSettings, workers: int
) -> Iterator[tuple[Job, Made | Problem]]:
    if settings.editor == "inpaint":
        return _painted(jobs, settings)
    if workers > 0 and settings.mask != "segmenter":
        return _in_parallel(jobs, settings, workers)
    masks = masker(settings.mask, settings.segmenter, settings.device)
    return ((job, guarded(job, partial(make_one, job, masks, settings))) for job in jobs)


def _in_parallel(
    jobs: Sequence[Job], settings: EditSettings, workers: int
) -> Iterator[tuple[Job, Made | Problem]]:  # fmt: skip
    """Results in the order of the jobs, with few of them in memory at a time."""
    waiting: deque[tuple[Job, Future[Made | Problem]]] = deque()
    coming = iter(jobs)
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=start_worker) as pool:
        try:
            for job in islice(coming, 2 * workers):
                waiting.append((job, pool.submit(in_worker, job, settings)))
            while waiting:
                job, future = waiting.popleft()
                yield job, future.result()
                for following in islice(coming, 1):
                    waiting.append((following, pool.submit(in_worker, following, settings)))
        except BrokenProcessPool:
            raise HonesError(
                "a worker process died, most likely because memory ran out: use fewer --workers; "
                "the same command continues where this one stopped"
            ) from None


def _painted(jobs: Sequence[Job], settings: EditSettings) -> Iterator[tuple[Job, Made | Problem]]:
    """Records in chunks of some batches: read, painted, judged."""
    assert settings.inpaint is not None
    if not jobs:
        return
    painter = Inpainter(settings.inpaint)
    masks = masker(settings.mask, settings.segmenter, settings.device)
    size = 4 * settings.inpaint.batch
    for start in range(0, len(jobs), size):
        yield from _chunk(jobs[start : start + size], painter, masks)


def _chunk(jobs: Sequence[Job], painter: Inpainter, masks: Masker) -> Iterator[tuple[Job, Made | Problem]]:
    ready = []
    for job in jobs:
        prepared = guarded(job, partial(_ready, job, masks))
        if isinstance(prepared, Problem):
            yield job, prepared
        else:
            ready.append(prepared)
    ready.sort(key=lambda pair: pair[0].photograph.pixels.shape)
    paintings = [
        Painting(prepared.photograph.pixels, region, prepared.change.prompt, prepared.seed)
        for prepared, region in ready
    ]
    for pair, painted in zip(ready, painter.paint(paintings), strict=True):
        job = pair[0].job
        yield job, guarded(job, partial(_finished, pair, painted))


def _ready(job: Job, masks: Masker) -> tuple[Prepared, Region]:
    prepared = prepare(job)
    return prepared, region_of(prepared, masks)


def _finished(ready: tuple[Prepared, Region], painted: Pixels | RecordError) -> Made:
    if isinstance(painted, RecordError):
        raise painted
    prepared, region = ready
    return finish(prepared, Edited(painted, region.footprint(*prepared.photograph.pixels.shape[:2])))


def _write(made: Made, record: Record, images: Path, out: Path, settings: EditSettings) -> dict[str, Any]:
    """Write the images first, then the row that refers to them."""
    for name, content in made.files.items():
        write_bytes(out / name, content)
    row = made.row | {"made_from": _made_from(record, images, settings)}
    write_json(out / "rows" / f"{file_name(record.question_id)}.json", row)
    return row


def write_tables(report: Report, out: Path, settings: EditSettings) -> None:
    """Write `vseam_pairs.json` (the accepted edits) and `report.json` (the outcome of the rest)."""
    write_json(out / "vseam_pairs.json", report.accepted)
    content = {
        "settings": asdict(settings),
        "by_level": report.by_level(),
        "left_out": report.left_out,
        "rejected": [{key: row[key] for key in ("question_id", "reasons")} for row in report.rejected],
        "not_editable": [problem._asdict() for problem in report.problems],
    }
    write_json(out / "report.json", content)
