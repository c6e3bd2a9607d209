"""Write the YAML file of every V-SEAM task: `python tasks/vseam/write.py`. A test finds stale ones."""

from pathlib import Path

from hones_eval.tasks.vseam.data import LEVELS, task_name

HERE = Path(__file__).resolve().parent
SPLITS = ("whole", "discovery", "development", "test")
SETS = (
    *((f"gqa-{category}-{shown}", "yes_no") for category in LEVELS for shown in ("clean", "edited", "both")),
    *((f"pope-{split}-clean", "yes_no") for split in ("random", "popular", "adversarial")),
    *((f"cocoqa-{kind}-clean", "") for kind in ("color", "count", "location")),
)


def task_files() -> dict[Path, str]:
    """Path and content of each file, relative to this folder."""
    return dict(_file(name, template, split) for name, template in SETS for split in SPLITS)


def _file(name: str, template: str, split: str) -> tuple[Path, str]:
    kind, _, shown = name.split("-")
    task = task_name(name, split)
    lines = [
        f"include: ../template{'_' + template if template else ''}.yaml",
        f"task: {task}",
        f"dataset_name: {name}",
        f"test_split: {split}",
    ]
    if split == "whole":
        lines.append(f"tag: vseam_{kind}" + ("" if shown == "clean" else f"_{shown}"))
    return Path(kind, f"{task}.yaml"), "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path, content in task_files().items():
        (HERE / path).parent.mkdir(exist_ok=True)
        (HERE / path).write_text(content, encoding="utf-8")
    print(f"wrote {len(task_files())} files under {HERE}")
