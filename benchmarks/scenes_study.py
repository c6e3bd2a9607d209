"""Find, scale, mask and compare the embedded model's neurons, task by task.

    python benchmarks/scenes_study.py --out leaderboards/scenes/study --work runs

1. `study`: seven tasks; scales are chosen on normal images and tested on other images, normal and shifted.
2. `study` on shifted images alone, with scales chosen on shifted images and a learning rate a hundred times
   higher. This is the most favourable case, because only there the model has room to improve.
3. `compare`: neurons by layer, groups that tasks share, the cross-task matrix.
4. `verify` of every task's bank, and of the neurons that the three kinds of questions share.
5. `lens` of one example, baseline against its task's neurons masked.

Rankings, steerings and groups stay in the work folder, and a second run reuses them.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from scenes_board import CHECKPOINT, run_ours

from hones_eval.jobs.compare import group_name
from hones_eval.toy import checkpoint_path

TASKS = ("vqa_object", "vqa_attribute", "vqa_relation", "ocr", "caption", "grounding", "retrieval_margin")
SHIFTED = ("vqa_object", "vqa_attribute", "vqa_relation", "ocr", "retrieval_margin")
CANDIDATES = {
    "limit": 5,
    "test_limit": 2.5,
}  # times as many for retrieval, where ten candidates make one query
MODEL = ("--model", "hones_llava", "--model_args", f"pretrained={CHECKPOINT},device_map=cpu,device=cpu")
KEPT = ("*.md", "*.json", "*.csv", "*.png", "*.svg")


def study(work: Path, out: Path, examples: int, test: int) -> Path:
    """Run both studies and return the folder of the first one's rankings."""
    plain, shifted = work / "scenes_study", work / "scenes_study_shifted"
    names = [f"scenes_{task}" for task in TASKS]
    run_ours("study", *MODEL, *sizes(names, limit=examples, test_limit=test), "--out", str(plain))
    names = [f"scenes_{task}_shifted" for task in SHIFTED]
    fast = ("--shifted=", "--methods", '["hones"]', "--learning_rate", "0.05")
    run_ours("study", *MODEL, *sizes(names, limit=examples, test_limit=test), *fast, "--out", str(shifted))
    keep(plain, out)
    keep(shifted, out / "shifted")
    return plain / "rankings"


def sizes(names: list[str], **limits: int) -> tuple[str, ...]:
    """Flags for the tasks and their limits; retrieval needs several candidates per query."""
    retrieval = [name for name in names if "retrieval" in name]
    flags = ["--tasks", ",".join(names), "--heads", "8"]
    for name, limit in limits.items():
        more = dict.fromkeys(retrieval, int(CANDIDATES[name] * limit))
        flags += [f"--{name}", str(limit), f"--{name}s", json.dumps(more)]
    return tuple(flags)


def ranking(rankings: Path, task: str) -> Path:
    return rankings / f"scenes_{task}" / "hones"


def compare(work: Path, out: Path, rankings: Path, test: int) -> None:
    folders = [str(ranking(rankings, task)) for task in TASKS]
    made = work / "scenes_compare"
    flags = sizes([f"scenes_{task}" for task in TASKS], limit=test)
    run_ours("compare", *folders, *MODEL, *flags, "--out", str(made))
    keep(made, out / "compare")


def verify(work: Path, out: Path, rankings: Path, test: int) -> None:
    """Verify every task's bank, and the neurons shared by exactly the three kinds of questions."""
    for task in TASKS:
        verified(ranking(rankings, task), task, out / "verify" / task, test)
    names = [f"scenes_{task}_discovery" for task in TASKS[:3]]
    for task in TASKS[:3]:
        shared = work / "scenes_compare" / "groups" / group_name(names)
        verified(shared, task, out / "verify" / f"shared_on_{task}", test)


def verified(bank: Path, task: str, out: Path, test: int) -> None:
    limit = int(CANDIDATES["limit"] * test) if "retrieval" in task else test
    flags = ("--tasks", f"scenes_{task}", "--limit", str(limit), "--out", str(out))
    run_ours("verify", "--ranking", str(bank), *MODEL, *flags)


def lens(work: Path, out: Path, rankings: Path) -> None:
    """Show the lens difference of one attribute question that masking turns wrong."""
    masked = work / "scenes_masked"
    how = ("--how", "fixed", "--factor", "0")
    run_ours("scale", "--ranking", str(ranking(rankings, "vqa_attribute")), *how, "--out", str(masked))
    flags = ("--tasks", "scenes_vqa_attribute", "--offset", "11", "--limit", "1", "--positions", "text")
    run_ours("lens", *MODEL, *flags, "--against", f"steering={masked}", "--out", str(out / "lens"))


def keep(made: Path, out: Path, kept: Sequence[str] = KEPT) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for pattern in kept:
        for path in made.glob(pattern):
            shutil.copyfile(path, out / path.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/scenes/study"))
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--examples", type=int, default=96, help="for discovery, and for development")
    parser.add_argument("--test", type=int, default=200, help="test examples of each task")
    given = parser.parse_args()
    checkpoint_path(CHECKPOINT)  # compares the weights with their hash
    found = study(given.work, given.out, given.examples, given.test)
    compare(given.work, given.out, found, given.test // 2)
    verify(given.work, given.out, found, given.test // 2)
    lens(given.work, given.out, found)
