"""The scenes board: steerings chosen for one task each, measured on all of them by lmms-eval.

    python benchmarks/scenes_board.py --out leaderboards/scenes/board --work runs/scenes_board

HONES: one percent of the neurons times 2, for each task. V-SEAM: heads by their signed scores, for each kind
of question. Controls: the same scales on other neurons, or other heads, of the same layers, drawn at random.
Every one is measured on every task, on images as they are and shifted. Rankings, steerings and logs stay in
the work folder, and a second run goes on from what is there: from the same logs it writes the same bytes.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hones_eval.__main__ import main as hones_eval
from hones_eval.core.steering import Steering
from hones_eval.jobs.spike_in import shuffled
from hones_eval.toy import checkpoint_path

QUESTIONS = ("vqa_object", "vqa_attribute", "vqa_relation")
TASKS = (*QUESTIONS, "ocr", "caption", "grounding", "retrieval")
TESTED = (*TASKS, *(f"{task}_shifted" for task in TASKS))
CONTROLLED = (("hones", "vqa_relation"), ("hones", "caption"), ("vseam", "vqa_relation"))
PAGES = 24  # of 182 comparisons: a repository needs no page for every steering that changes nothing
# Relative, since it is written into the board: run this in the repository.
CHECKPOINT = Path("hones_eval/toy/checkpoint")
MODEL = f"pretrained={CHECKPOINT}"


def steering(work: Path, method: str, task: str, examples: int) -> Path:
    """Rank on the task's discovery split and scale; kept in the work folder."""
    rank = ("--method", method, *model_flags(), "--tasks", f"scenes_{task}_discovery", "--limit",
            str(examples), "--heads", "8")  # fmt: skip
    how = ("signed", "--strength", "4") if method == "vseam" else ("fixed", "--factor", "2")
    return made(work / f"{method}-{task}", rank, ("--how", *how))


def made(folder: Path, rank: Sequence[str], scale: Sequence[str]) -> Path:
    """The steering that `rank` and `scale` make with these flags, unless both are there."""
    ranking, steering = folder / "ranking", folder / "steering"
    if not (ranking / "ranking.json").is_file():
        run_ours("rank", *rank, "--out", str(ranking))
    if not (steering / "steering.json").is_file():
        run_ours("scale", "--ranking", str(ranking), *scale, "--out", str(steering))
    return steering


def control(original: Path, folder: Path, seed: int = 0) -> Path:
    """The scales of a steering on other heads and neurons of the same layers, drawn at random."""
    steered = Steering.load(original)
    settings = steered.provenance.settings | {"how": "random", "control_for": steered.digest, "seed": seed}
    drawn = shuffled(steered, seed)
    replace(drawn, provenance=replace(drawn.provenance, settings=settings)).save(folder)
    return folder


def model_flags() -> tuple[str, ...]:
    return "--model", "hones_llava", "--model_args", MODEL


def run_ours(*arguments: str) -> None:
    if hones_eval(list(arguments)):
        sys.exit(1)


def evaluate(
    logs: Path, steered: Path | None, limit: int, tasks: Sequence[str] = TESTED, offset: int = 0
) -> None:
    """One lmms-eval run over all of some tasks, unless its results are there."""
    if list(logs.rglob("*results.json")):
        return
    args = MODEL if steered is None else f"{MODEL},steering={steered}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "hones_llava", "--model_args", args]
    command += ["--tasks", ",".join(f"scenes_{task}" for task in tasks), "--limit", str(limit)]
    command += ["--offset", str(offset), "--batch_size", "1", "--log_samples", "--output_path", str(logs)]
    subprocess.run(command, check=True)


def board(out: Path, work: Path, examples: int, limit: int) -> None:
    checkpoint_path(CHECKPOINT)  # compares the weights with their hash
    evaluate(work / "logs" / "baseline", None, limit)
    for method, tasks in (("hones", TASKS), ("vseam", QUESTIONS)):
        for task in tasks:
            steered = steering(work, method, task, examples)
            evaluate(work / "logs" / f"{method}-{task}", steered, limit)
    for method, task in CONTROLLED:
        name = f"{method}-{task}-random"
        drawn = control(steering(work, method, task, examples), work / name)
        evaluate(work / "logs" / name, drawn, limit)
    run_ours("leaderboard", str(work / "logs"), "--out", str(out), "--pages", str(PAGES),
             "--title", "Scenes: steering and side effects")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/scenes/board"))
    parser.add_argument("--work", type=Path, default=Path("runs/scenes_board"))
    parser.add_argument("--examples", type=int, default=48, help="to discover on, for each steering")
    parser.add_argument("--limit", type=int, default=100, help="test examples of each task")
    given = parser.parse_args()
    board(given.out, given.work, given.examples, given.limit)
