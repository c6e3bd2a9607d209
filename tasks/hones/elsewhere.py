"""Reads GQA, TextVQA and Flickr30k in the files that they are published in, as entries of the unified format.

Each has a variable of its own, so that neurons and scales chosen on one folder are tested on another:
`HONES_EVAL_GQA`, `HONES_EVAL_TEXTVQA`, `HONES_EVAL_FLICKR30K` name a folder, or the annotation file itself.
Images lie beside the file, in one of the folders that the data set unpacks to, or there beside its folder.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hones_eval.errors import TaskError
from hones_eval.tasks.hones.data import Entry, named_by, read_json


class DataSet(NamedTuple):
    """The names of a data set's files, the folders of its images, and the reader of a file."""

    variable: str
    files: Sequence[str]
    folders: Sequence[str]
    read: Callable[[Path], Iterator[tuple[str, str, dict[str, Any]]]]  # name, image's file, annotations


def entries_elsewhere(name: str) -> tuple[Path, list[Entry]]:
    """The annotation file of a data set, and all its entries, in the file's order.

    Raises: TaskError when the data is missing or malformed, or an image is missing.
    """
    source = DATA_SETS[name]
    path = _annotation_file(source)
    found = [
        Entry(f"{called} ({image})", content, _image_path(source, path, called, image))
        for called, image, content in source.read(path)
    ]
    if not found:
        raise TaskError(f"{path} has no entry")
    return path, found


def _annotation_file(source: DataSet) -> Path:
    """The file that the variable names, or the first of the data set's own names in its folder."""
    path = named_by(source.variable, f"a folder with {source.files[0]} and its images, or that file")
    if path.is_file():
        return path
    for name in source.files:
        if (path / name).is_file():
            return path / name
    raise TaskError(
        f"{source.variable}={path}: it has none of {', '.join(source.files)}; name the file itself"
    )


def _image_path(source: DataSet, path: Path, called: str, name: str) -> Path:
    places = [parent / folder for parent in (path.parent, path.parent.parent) for folder in source.folders]
    for folder in (path.parent, *places):
        if (folder / name).is_file():
            return folder / name
    raise TaskError(
        f"{called}: its image {name} is neither beside the file nor in "
        f"{', '.join(source.folders)} in {path.parent} or {path.parent.parent}"
    )


def _gqa(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """`{question id: {"question", "imageId", "answer", ...}}` (Hudson and Manning 2019)."""
    for key, row in _mapping(path).items():
        called = f"{path}, question {key}"
        question, image, answer = _texts(called, row, "question", "imageId", "answer")
        yield called, f"{image}.jpg", {"vqa": {"question": question, "answers": [answer]}}


def _textvqa(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """`{"data": [{"question", "image_id", "answers", ...}]}` (Singh et al. 2019)."""
    for number, row in enumerate(_list(path, "data")):
        called = f"{path}, entry {number}"
        question, image = _texts(called, row, "question", "image_id")
        yield called, f"{image}.jpg", {"vqa": {"question": question, "answers": row.get("answers")}}


def _flickr30k(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The test split of Karpathy's JSON, or all of the token file, `name.jpg#0<tab>caption` per line."""
    if path.suffix != ".json":
        yield from _tokens(path)
        return
    for number, row in enumerate(_list(path, "images")):
        called = f"{path}, image {number}"
        split, name = _texts(called, row, "split", "filename")
        if split == "test":
            yield called, name, {"captions": _sentences(called, row.get("sentences"))}


def _sentences(called: str, sentences: Any) -> list[dict[str, Any]]:
    try:
        return [{"caption": sentence["raw"]} for sentence in sentences]
    except (TypeError, KeyError):
        raise TaskError(f'{called}: its sentences are not of the form [{{"raw": ...}}, ...]') from None


def _tokens(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    captions: dict[str, list[dict[str, str]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        name, tab, caption = line.partition("\t")
        name, sign, _ = name.partition("#")
        if not (name and tab and sign and caption.strip()):
            raise TaskError(f"{path}, line {number}: it is not of the form name.jpg#0<tab>caption")
        captions.setdefault(name, []).append({"caption": caption})
    for name, own in captions.items():
        yield f"{path}, image {name}", name, {"captions": own}


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(row, dict) for row in content.values()):
        raise TaskError(f"{path} is not a mapping of question ids to questions")
    return content


def _list(path: Path, key: str) -> list[dict[str, Any]]:
    content = read_json(path)
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f'{path} is not of the form {{"{key}": [{{...}}, ...]}}')
    return rows


def _texts(called: str, row: dict[str, Any], *keys: str) -> list[str]:
    missing = [key for key in keys if row.get(key) in (None, "")]
    if missing:
        raise TaskError(f"{called}: it has no {missing[0]}")
    return [str(row[key]) for key in keys]


DATA_SETS = {
    "gqa": DataSet(
        "HONES_EVAL_GQA",
        [
            f"{folder}{split}_balanced_questions.json"
            for split in ("testdev", "val")
            for folder in ("", "questions/", "questions1.2/")
        ],
        ("images",),
        _gqa,
    ),
    "textvqa": DataSet(
        "HONES_EVAL_TEXTVQA",
        ("TextVQA_0.5.1_val.json", "textvqa_val.json"),
        ("train_images", "images"),
        _textvqa,
    ),
    "flickr30k": DataSet(
        "HONES_EVAL_FLICKR30K",
        ("dataset_flickr30k.json", "results_20130124.token"),
        ("flickr30k-images", "flickr30k_images", "images"),
        _flickr30k,
    ),
}
