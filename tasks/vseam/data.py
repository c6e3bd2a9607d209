"""Reads the question files of the V-SEAM release, and finds their images, clean and edited.

`HONES_EVAL_DATA` names the folder that holds them; `FILES` and `FOLDERS` say where in it each is looked for.
Edited images may lie in a folder of their own, which `HONES_EVAL_EDITED` names.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from hones_eval.errors import TaskError
from hones_eval.tasks.hones.data import VARIABLE, named_by, place

EDITED_VARIABLE = "HONES_EVAL_EDITED"
LEVELS = {
    "animal": "object",
    "indoor": "object",
    "vehicle": "object",
    "color": "attribute",
    "material": "attribute",
    "action": "relation",
    "spatial": "relation",
}
PAIRS = "vseam_pairs.json"
OPPOSITE = {"yes": "No", "no": "Yes"}
SUFFIXES = (".jpg", ".png", ".jpeg")
COCO = ("images", "val2014", "train2014", "coco/val2014", "coco/train2014")


def task_name(share: str, split: str) -> str:
    """What the task is called that shows `share`, as `gqa-animal-edited`, of the images of a split."""
    kind, part, shown = share.split("-")
    words = ["vseam", *([] if kind == "gqa" else [kind]), part, *([] if shown == "clean" else [shown])]
    return "_".join([*words, *([] if split == "whole" else [split])])


@lru_cache
def warn_once(line: str) -> None:
    """Say a line that every building of a task would say again; lmms-eval loads `utils` anew for each."""
    logger.warning(line)


class Question(NamedTuple):
    """One question with its images; `edited_picture` is None where there is none."""

    name: str
    id: str
    question: str
    answer: str
    picture: Path | None
    objects: Sequence[str] = ()
    attributes: Sequence[str] = ()
    relations: Sequence[str] = ()
    edited_picture: Path | None = None
    edited_answer: str | None = None


class Source(NamedTuple):
    """A file of questions, and all that it asks, whether or not the images are there."""

    path: Path
    questions: list[Question]
    looked_in: str


def gqa(category: str) -> Source:
    """Questions of one of the seven GQA categories: a list, or a dict by question id, as released.

    Raises: TaskError when the file is missing or malformed.
    """
    level = LEVELS[category]
    title = category.capitalize()
    own = [f"vseam_gqa_{category}.json", f"{title}.json", f"{category}.json", f"{title}/{title}.json"]
    released = f"{level.capitalize()}_Level/{title}/{title}.json"
    names = [*own, f"annotations/vseam_gqa_{category}.json", released, f"GQA/{released}", PAIRS]
    path = _file(names)
    records = [record for record in _gqa_records(path) if record[1].get("category", category) == category]
    if not records:
        raise TaskError(f"{path} has no question of the category {category}")
    clean = [path.parent / "clean", path.parent / "images", _root() / "clean", _root() / "images"]
    return Source(
        path,
        [_gqa_question(path, key, record, level, clean) for key, record in records],
        _places(clean),
    )


def pope(split: str) -> Source:
    """Questions of POPE `random`, `popular` or `adversarial`: a JSON object a line, as released."""
    names = [f"{stem}pope_{split}.{end}" for stem in ("", "coco_", "coco/coco_") for end in ("jsonl", "json")]
    path = _file([*names, *(f"{folder}/{name}" for folder in ("annotations", "pope") for name in names[:4])])
    folders = [_root() / item for item in COCO]
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        name = f"{path}, line {number}"
        record = _object(line, name)
        image, answer = str(_need(record, "image", name)), str(_need(record, "label", name)).capitalize()
        key = str(record.get("question_id", number))
        text = str(_need(record, "text", name))
        questions.append(Question(name, key, text, answer, _first([folder / image for folder in folders])))
    return Source(path, questions, _places(folders))


def cocoqa(kind: str) -> Source:
    """Questions of COCO-QA about `color`, `count` or `location`: a CSV file, as released."""
    path = _file([f"{place}cocoqa_{kind}.csv" for place in ("", "annotations/", "cocoqa/")])
    folders = [_root() / item for item in COCO]
    questions = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            name = f"{path}, row {number}"
            columns = {
                want: next((key for key in row if key and want in key), None)
                for want in ("question", "answer", "image_id")
            }
            missing = [want for want, key in columns.items() if key is None or not row[key]]
            if missing:
                raise TaskError(f"{name}: it has no {missing[0]}; its columns are {', '.join(map(str, row))}")
            text, answer, image = (str(row[str(key)]).strip() for key in columns.values())
            picture = _coco_picture(image, name, folders)
            questions.append(Question(name, str(number), text, answer, picture))
    return Source(path, questions, _places(folders))


def with_pictures(source: Source, wanted: Sequence[str], low: float, high: float) -> Iterator[Question]:
    """Yield the questions that have the `wanted` images, of a share [low, high) of all clean images.

    Questions without are counted and named in a warning; none left is a TaskError.
    """
    found = 0
    for field in wanted:
        missing = [item for item in source.questions if getattr(item, field) is None]
        if not missing:
            continue
        what = "its edited image" if field == "edited_picture" else "its image"
        line = (
            f"{source.path}: {len(missing)} of {len(source.questions)} questions lack {what}, the first is "
            f"question {missing[0].id}; looked in {_looked_in(source, field)}"
        )
        if len(missing) == len(source.questions):
            raise TaskError(line)
        logger.warning(f"{line}; they are left out")
    for question in source.questions:
        if all(getattr(question, field) is not None for field in wanted):
            within = question.picture is None or low <= place(question.picture.name) < high
            found += within
            if within:
                yield question
    if not found:
        raise TaskError(
            f"{source.path}: no question falls into this split ({low:.0%} to {high:.0%} of the images); "
            "use the task without a suffix"
        )


def _gqa_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The released files are lists, but for one that is a dict by question id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} is not valid JSON: {error}") from None
    if isinstance(content, dict):
        records = [(str(key), record) for key, record in content.items()]
    elif isinstance(content, list):
        records = [
            (str(record.get("question_id", number)) if isinstance(record, dict) else str(number), record)
            for number, record in enumerate(content)
        ]
    else:
        records = []
    for key, record in records:
        if not isinstance(record, dict):
            raise TaskError(f"{path}, question {key}: it is not an object")
    if not records:
        raise TaskError(f"{path} is neither a list of questions nor a dict of them by question id")
    return records


def _gqa_question(
    path: Path, key: str, record: dict[str, Any], level: str, clean: Sequence[Path]
) -> Question:
    name = f"{path}, question {key}"
    text, answer = str(_need(record, "question", name)), str(_need(record, "answer", name))
    if "clean" in record:
        picture = _first([path.parent / str(record["clean"])])
    else:
        image = str(_need(record, "imageId", name))
        picture = _first([folder / f"{image}{suffix}" for folder in clean for suffix in SUFFIXES])
    changed = record.get("edited_answer") or OPPOSITE.get(answer.strip().lower())
    return Question(
        name=name,
        id=key,
        question=text,
        answer=answer,
        picture=picture,
        objects=[
            str(item) for key in ("involved_objects", "relevant_objects") for item in record.get(key, [])
        ],
        attributes=[text.rstrip("?. ").split()[-1]] if level == "attribute" else [],
        relations=_relations(record.get("semantic")) if level == "relation" else [],
        edited_picture=_edited(path, key, record),
        edited_answer=str(changed) if changed else None,
    )


def _relations(semantic: Any) -> list[str]:
    """The words between subject and object in GQA's programs: 'holding' in `_,holding,o (1184714)`."""
    steps = semantic if isinstance(semantic, list) else []
    arguments = [str(step.get("argument", "")) for step in steps if step.get("operation") == "relate"]
    return [words[1] for argument in arguments if len(words := argument.split(",")) == 3]


def _edited(path: Path, key: str, record: Mapping[str, Any]) -> Path | None:
    """Where the release, a list of pairs, or a folder of the user's has the edited image of a question."""
    given = os.environ.get(EDITED_VARIABLE)
    if given is None and "edited" in record:
        return _first([path.parent / str(record["edited"])])
    names = [f"{key}/{key}", key, f"{key}/{key}_corrupt", f"{key}_corrupt", f"{key}_edit"]
    folders = _edited_folders(path, given)
    return _first([folder / f"{name}{end}" for folder in folders for name in names for end in SUFFIXES])


def _edited_folders(path: Path, given: str | None) -> list[Path]:
    if given is not None:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise TaskError(f"{EDITED_VARIABLE}={given}: there is no such folder")
        return [folder, folder / "edited", folder / "pictures"]
    return [base / name for base in (path.parent, _root()) for name in ("corrupt", "edited")]


def _looked_in(source: Source, field: str) -> str:
    if field == "picture":
        return source.looked_in
    return _places(_edited_folders(source.path, os.environ.get(EDITED_VARIABLE)))


def _coco_picture(image: str, name: str, folders: Sequence[Path]) -> Path | None:
    if not image.isdigit():
        raise TaskError(f"{name}: {image!r} is not the number of a COCO image")
    number = f"{int(image):012d}"
    files = [f"COCO_train2014_{number}.jpg", f"COCO_val2014_{number}.jpg", f"{number}.jpg"]
    return _first([folder / file for folder in folders for file in files])


def _root() -> Path:
    path = named_by(VARIABLE, "the folder that holds V-SEAM's question files and their images")
    return path if path.is_dir() else path.parent


def _file(names: Sequence[str]) -> Path:
    root = _root()
    found = _first([root / name for name in names])
    if found is None:
        raise TaskError(f"{VARIABLE}={root}: it holds none of {', '.join(names)}")
    return found


def _first(paths: Sequence[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _places(folders: Sequence[Path]) -> str:
    return ", ".join(dict.fromkeys(map(str, folders)))


def _object(line: str, name: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise TaskError(f"{name}: it is not an object")
    return record


def _need(record: Mapping[str, Any], key: str, name: str) -> Any:
    if record.get(key) in (None, ""):
        raise TaskError(f"{name}: it has no {key}")
    return record[key]
