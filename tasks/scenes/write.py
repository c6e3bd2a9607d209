"""Write the YAML file of every scenes task: `python tasks/scenes/write.py`. A test guards them."""

from pathlib import Path
from typing import get_args

from hones_eval.toy.documents import KIND_TASKS, Task
from hones_eval.toy.questions import KINDS
from hones_eval.toy.shifts import Shift

HERE = Path(__file__).resolve().parent
SPLITS = ("test", "discovery", "development")
VARIANTS = ("plain", "edited", "shifted", *get_args(Shift))
# Ten candidates an image; and not every image has a question of every kind.
COUNT = {"retrieval": 1000} | dict.fromkeys(KIND_TASKS, 400)
TEMPLATES = dict.fromkeys([*(f"vqa_{level}" for level in KINDS), *KIND_TASKS], "vqa")


def task_files() -> dict[Path, str]:
    """Path and content of each file, relative to this folder."""
    files = [
        _file(task, variant, split) for task in get_args(Task) for variant in VARIANTS for split in SPLITS
    ]
    files += [
        _file(task, variant, split, "vqa_kinds")
        for task in KIND_TASKS
        for variant in ("plain", "shifted")
        for split in SPLITS
    ]
    by_margin = [
        _file("retrieval_margin", variant, split) for variant in ("plain", "shifted") for split in SPLITS
    ]
    return dict([*files, *by_margin])


def _file(task: str, variant: str, split: str, folder: str | None = None) -> tuple[Path, str]:
    name = "_".join(["scenes", task, *_suffixes(variant, split)])
    documents = task.removesuffix("_margin")  # the same candidates, answered by a margin
    lines = [
        f"include: ../template_{TEMPLATES.get(task, task)}.yaml",
        f"task: {name}",
        f"dataset_name: {documents}-{variant}-{COUNT.get(documents, 500)}",
        f"test_split: {split}",
    ]
    if name == f"scenes_{task}":
        lines.append("tag: scenes" if folder is None else f"tag: scenes_{folder}")
    return Path(folder or task, f"{name}.yaml"), "\n".join(lines) + "\n"


def _suffixes(variant: str, split: str) -> list[str]:
    shifted = ["shifted"] if variant in get_args(Shift) else []
    return [*shifted, *([] if variant == "plain" else [variant]), *([] if split == "test" else [split])]


if __name__ == "__main__":
    for path, content in task_files().items():
        (HERE / path).parent.mkdir(exist_ok=True)
        (HERE / path).write_text(content, encoding="utf-8")
    print(f"wrote {len(task_files())} files under {HERE}")
