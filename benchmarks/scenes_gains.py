"""Does steering help on the toy model, with the ranking and the scales that repair planted faults?

    python benchmarks/scenes_gains.py --out leaderboards/scenes/gains --work runs/scenes_gains

For each of seven tasks, on images as they are and on shifted images: `rank --method atp` on discovery images,
`scale --how tuned` with default settings on development images, and as a control the same scales on random
heads and neurons of the same layers. lmms-eval measures them on test images that no earlier study used (from
the 200th on). Three boards:

own    each steering and its control on its own task, as it is and shifted
side   each steering on the other tasks: its side effects
again  OCR, the one task that gains, with scales chosen on two other sets of discovery and development images

Rankings, steerings and logs stay in the work folder, and a second run continues from there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scenes_board import CHECKPOINT, TASKS, TESTED, control, evaluate, made, model_flags, run_ours

from hones_eval.toy import checkpoint_path
from hones_eval.toy.documents import CANDIDATES

IMAGES = ("", "_shifted")
FIRST = 200
"""The first test image: the studies and spike-ins by which the defaults were chosen used those before it."""
FIRST_QUERY = 50
"""The same for retrieval, whose queries have an image each and `CANDIDATES` examples."""


def steering(work: Path, task: str, images: str, count: int, part: int = 0) -> Path:
    """Rank and tune for one task, on the `part`-th `count` images of each split; kept in the work folder."""
    limit = count - count % CANDIDATES if task == "retrieval" else count  # whole queries
    rank, scale = (
        (*model_flags(), "--tasks", f"scenes_{task}{images}_{split}", "--limit", str(limit),
         "--offset", str(part * limit))
        for split in ("discovery", "development")
    )  # fmt: skip
    folder = work / (f"{task}{images}-{part}" if part else f"{task}{images}")
    return made(folder, ("--method", "atp", *rank), ("--how", "tuned", *scale))


def measure(logs: Path, steered: Path | None, tasks: Sequence[str], images: int) -> None:
    """Measure a steering on fresh test images; retrieval starts at another example, in a run of its own."""
    retrieval = [task for task in tasks if task.startswith("retrieval")]
    others = [task for task in tasks if task not in retrieval]
    if others:
        evaluate(logs / "others", steered, images, others, FIRST)
    if retrieval:
        queries = min(images, 50) * CANDIDATES
        evaluate(logs / "retrieval", steered, queries, retrieval, FIRST_QUERY * CANDIDATES)


def boards(given: argparse.Namespace) -> None:
    """Make every steering and control, measure them, and write the boards."""
    checkpoint_path(CHECKPOINT)  # compares the weights with their hash
    own, side = given.work / "own", given.work / "side"
    measure(side / "baseline", None, TESTED, given.side)
    for task in TASKS:
        pair = (task, f"{task}_shifted")
        measure(own / f"{task}-baseline", None, pair, given.test)
        for images in IMAGES:
            name = f"{task}{images}"
            steered = steering(given.work, task, images, given.examples)
            measure(own / name, steered, pair, given.test)
            drawn = control(steered, given.work / name / "control")
            measure(own / f"{name}-random", drawn, pair, given.test)
            measure(side / name, steered, [other for other in TESTED if other not in pair], given.side)
    again, pair = given.work / "again", ("ocr", "ocr_shifted")
    measure(again / "ocr-baseline", None, pair, given.test)
    for part in (1, 2):
        steered = steering(given.work, "ocr", "", given.examples, part)
        measure(again / f"ocr-{part}", steered, pair, given.test)
        measure(again / f"ocr-{part}-random", control(steered, given.work / f"ocr-{part}" / "control"), pair,
                given.test)  # fmt: skip
    for logs, title in (
        (own, "Scenes: tuned steerings on their own tasks"),
        (side, "Scenes: side effects"),
        (again, "Scenes: OCR tuned on other images"),
    ):
        run_ours("leaderboard", str(logs), "--out", str(given.out / logs.name), "--pages", "4",
                 "--title", title)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/scenes/gains"))
    parser.add_argument("--work", type=Path, default=Path("runs/scenes_gains"))
    parser.add_argument("--examples", type=int, default=166, help="to discover on, and to choose scales on")
    parser.add_argument("--test", type=int, default=300, help="test images of a steering's own task")
    parser.add_argument("--side", type=int, default=50, help="test images of each other task")
    boards(parser.parse_args())
