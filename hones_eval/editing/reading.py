"""Read record files of the V-SEAM release: a list of GQA questions, or a mapping by question id."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from hones_eval.choices import Level
from hones_eval.core.artifact import read_json
from hones_eval.editing.locating import SceneGraphs, how_many, locate
from hones_eval.editing.problems import Problem, RecordError
from hones_eval.editing.questions import category_of
from hones_eval.editing.records import LEVELS, Answer, Record, Thing
from hones_eval.errors import HonesError

RELEASED = "vseam_gqa_"


class Reading(NamedTuple):
    """The content of a file: records to edit, and the problems of the others."""

    records: list[Record]
    problems: list[Problem]


def read_records(path: Path, *, scene_graphs: Path | None = None, category: str | None = None) -> Reading:
    """Read a list of V-SEAM records, or a mapping of them by question id.

    Args:
        path: a JSON file.
        scene_graphs: GQA scene graphs, `{imageId: {"objects": {id: {"name", "x", "y", "w", "h"}}}}`; boxes
            that the records lack are taken from them, and other things of the same name are noticed.
        category: of records that do not say theirs; else it is read from a released file's name
            (`vseam_gqa_<category>.json`) or from the question.

    Raises: HonesError when the file is not JSON of this form.
    """
    content = read_json(path)
    rows = list(_rows(content, path))
    graphs: SceneGraphs = read_json(scene_graphs) if scene_graphs else {}
    if not isinstance(graphs, dict):
        raise HonesError(f"{scene_graphs} is not a mapping of image ids to GQA scene graphs")
    stem = path.stem.removeprefix(RELEASED)
    return records_from(rows, scene_graphs=graphs, category=category or (stem if stem in LEVELS else None))


def records_from(
    rows: Sequence[Mapping[str, Any]], *, scene_graphs: SceneGraphs | None = None, category: str | None = None
) -> Reading:
    """Make records of the rows of a file or of a task's documents; see `read_records`."""
    reading = Reading([], [])
    seen: set[str] = set()
    for place, row in enumerate(rows):
        name = str(row.get("question_id", f"row {place}")) if isinstance(row, Mapping) else f"row {place}"
        try:
            record = _record(row, category, scene_graphs or {})
            if record.question_id in seen:
                raise RecordError("an earlier record has the same question_id")
        except RecordError as error:
            reading.problems.append(Problem(name, error.level, str(error)))
        else:
            seen.add(record.question_id)
            reading.records.append(record)
    return reading


def _rows(content: object, path: Path) -> Iterator[Mapping[str, Any]]:
    if isinstance(content, dict) and content and all(isinstance(row, dict) for row in content.values()):
        yield from ({"question_id": name} | row for name, row in content.items())
    elif isinstance(content, list):
        yield from content
    else:
        raise HonesError(f"{path} is neither a list of records nor a mapping of them by question id")


def _record(row: object, category: str | None, graphs: SceneGraphs) -> Record:
    if not isinstance(row, Mapping):
        raise RecordError(f"it is a {type(row).__name__}, not a record")
    question, answer = _text(row, "question"), _answer(row, "answer")
    if answer is None:
        raise RecordError("it has no 'answer'")
    found = row.get("category") or category or category_of(question)
    if found not in LEVELS:
        raise RecordError(f"its category {found!r} is not one of {', '.join(LEVELS)}")
    level = cast(Level, row.get("semantic_level", LEVELS[found]))
    if level != LEVELS[found]:
        raise RecordError(f"its category {found} is of level {LEVELS[found]}, not {level}")
    try:
        things = tuple(Thing(name, box) for name, box in locate(row, question, graphs))
    except RecordError as error:
        raise RecordError(str(error), level) from None
    return Record(
        question_id=_text(row, "question_id"),
        image_id=str(row.get("imageId", row.get("clean", ""))),
        image=_optional(row, "clean"),
        question=question,
        answer=answer,
        level=level,
        category=found,
        things=things,
        repeated=next((thing.name for thing in things if (how_many(thing.name, row, graphs) or 0) > 1), None),
        prompt=_optional(row, "perturb_prompt"),
        edited=_optional(row, "edited"),
        edited_answer=_answer(row, "edited_answer"),
        counterfactual_question=_optional(row, "counterfactual_question"),
        counterfactual_answer=_answer(row, "counterfactual_answer"),
    )


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None or not str(value).strip():
        raise RecordError(f"it has no {key!r}")
    return str(value).strip()


def _optional(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    return str(value).strip() or None if value is not None else None


def _answer(row: Mapping[str, Any], key: str) -> Answer | None:
    value = row.get(key)
    if value is None:
        return None
    word = str(value).strip().capitalize()
    if word not in ("Yes", "No"):
        raise RecordError(f"its {key} is {str(value)!r}; only yes/no questions are supported")
    return cast(Answer, word)
