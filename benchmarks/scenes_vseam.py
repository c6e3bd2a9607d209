"""V-SEAM on the embedded model: heads that help and hurt, what they share, rescaling, tracing, the lens.

    python benchmarks/scenes_vseam.py --out leaderboards/scenes/vseam --work runs/scenes_vseam

1. `rank --method vseam` on shifted images, since only there the model is wrong often enough for heads that
   hurt: the three semantic levels, and the nine kinds of questions on two halves of the images each.
2. `compare`: heat maps by level (`levels/`); what kinds share within a level and across (`kinds/`), or within
   and across yes/no and open questions (`forms/`); what two halves of the same kind share (`halves/`), which
   is the most that could be expected.
3. `verify`: the heads of every level zeroed on test images, beside random ones (`verify/`).
4. `scale --how signed` and `topk`, strengths chosen on development images; lmms-eval on test images,
   as they are and shifted (`rescaled/`).
5. `trace` (`trace/`) and `lens` (`lens/`) on images as they are.

Rankings, steerings and logs stay in the work folder; a second run goes on from what is there.
"""

import argparse
from pathlib import Path

from scenes_board import CHECKPOINT, evaluate, run_ours
from scenes_study import MODEL, keep

from hones_eval.core.steering import Steering
from hones_eval.toy import checkpoint_path
from hones_eval.toy.questions import KINDS

LEVELS = tuple(f"vqa_{level}" for level in KINDS)
PLAIN = ("--model", "llava_hf", "--model_args", f"pretrained={CHECKPOINT}")
STRENGTHS = {"signed": "[0.5, 1, 2, 4]", "topk": "[0.5, 1]"}  # 0 is tried too
HEADS = 5  # of 48
ROLES = (
    "object=about;other object=circle,square,triangle,cross,star,ring;"
    "attribute=red,green,blue,yellow,purple,white,solid,striped,dotted,large,small;"
    "relation=left of,right of,above,below;place=top left,top right,bottom left,bottom right"
)


def rank(work: Path, task: str, examples: int, half: int = 0) -> str:
    """The heads of a task on the first, or the next, so many shifted images to discover on."""
    folder = work / "rankings" / f"{task.removeprefix('vqa_')}_{half + 1}"
    if not (folder / "ranking.json").is_file():
        flags = ("--tasks", f"scenes_{task}_shifted_discovery", "--heads", str(HEADS), "--out", str(folder))
        some = ("--limit", str(examples), "--offset", str(half * examples))
        run_ours("rank", "--method", "vseam", *MODEL, *flags, *some)
    return str(folder)


def compare(work: Path, out: Path, examples: int) -> None:
    """By level; by kind within and across levels; by form of the answer; by halves of the same kind."""
    kinds = [(level, kind) for level, of_level in KINDS.items() for kind in of_level]
    first, second = ([rank(work, f"vqa_{kind}", examples, half) for _, kind in kinds] for half in (0, 1))
    keep(compared(work, "levels", [rank(work, level, examples) for level in LEVELS]), out / "levels")
    keep(compared(work, "kinds", first, [level for level, _ in kinds]), out / "kinds")
    forms = ["yes-no" if kind.startswith("is_") or kind == "exists" else "open" for _, kind in kinds]
    keep(compared(work, "forms", first, forms), out / "forms", ["levels.csv"])
    halves = [folder for pair in zip(first, second, strict=True) for folder in pair]
    of_halves = compared(work, "halves", halves, [kind for _, kind in kinds for _ in "12"])
    keep(of_halves, out / "halves", ["levels.csv"])


def compared(work: Path, name: str, rankings: list[str], levels: list[str] | None = None) -> Path:
    flags = () if levels is None else ("--levels", ",".join(levels))
    made = work / "compared" / name
    run_ours("compare", *rankings, "--heads", str(HEADS), *flags, "--out", str(made))
    return made


def verify(work: Path, out: Path, examples: int, test: int) -> None:
    for level in LEVELS:
        flags = ("--tasks", f"scenes_{level}_shifted", "--limit", str(test), "--heads", str(HEADS))
        made = ("--trials", "10", "--out", str(out / level.removeprefix("vqa_")))
        run_ours("verify", "--ranking", rank(work, level, examples), *MODEL, *flags, *made)


def rescale(work: Path, out: Path, examples: int, test: int) -> None:
    """All steerings that change something, on their own level, as it is and shifted."""
    tasks = {level: [level, f"{level}_shifted"] for level in LEVELS}
    evaluate(work / "logs" / "baseline", None, test, [task for level in LEVELS for task in tasks[level]])
    for level in LEVELS:
        for how in STRENGTHS:
            name = f"{level.removeprefix('vqa_')}_{how}"
            steered = steering(work / "steerings" / name, rank(work, level, examples), how, level, examples)
            if Steering.load(steered).is_noop:
                print(f"{name} changes nothing, so it is not evaluated")
                continue
            evaluate(work / "logs" / name, steered, test, tasks[level])
    made = work / "rescaled"
    title = "Scenes: heads rescaled by V-SEAM"
    run_ours("leaderboard", str(work / "logs"), "--out", str(made), "--title", title)
    keep(made, out)


def steering(folder: Path, ranking: str, how: str, level: str, examples: int) -> Path:
    """Heads scaled with the strengths that do best on shifted images of the development split."""
    if not (folder / "steering.json").is_file():
        flags = ("--tasks", f"scenes_{level}_shifted_development", "--limit", str(examples))
        chosen = ("--how", how, "--strengths", STRENGTHS[how], "--out", str(folder))
        count = ("--heads", str(HEADS)) if how == "topk" else ()
        run_ours("scale", "--ranking", ranking, *MODEL, *flags, *chosen, *count)
    return folder


def trace(out: Path) -> None:
    clean, edited = (",".join(f"scenes_{level}{twin}" for level in LEVELS) for twin in ("", "_edited"))
    flags = ("--clean", clean, "--edited", edited, "--what", "image,text,last,attention,ffn")
    pairs = ("--roles", ROLES, "--only", "right", "--limit", "60", "--examples", "1")
    run_ours("trace", *PLAIN, *flags, *pairs, "--out", str(out))


def lens(out: Path) -> None:
    flags = ("--tasks", "scenes_vqa_object", "--limit", "40", "--positions", "last", "--top", "10")
    run_ours("lens", *PLAIN, *flags, "--figures_of", "2", "--out", str(out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/scenes/vseam"))
    parser.add_argument("--work", type=Path, default=Path("runs/scenes_vseam"))
    parser.add_argument("--examples", type=int, default=200, help="for a ranking, and for development")
    parser.add_argument(
        "--test",
        type=int,
        default=200,
        help="test examples; half of them for lmms-eval",
    )
    given = parser.parse_args()
    checkpoint_path(CHECKPOINT)  # compares the weights with their hash
    compare(given.work, given.out, given.examples)
    verify(given.work, given.out / "verify", given.examples, given.test)
    rescale(given.work, given.out / "rescaled", given.examples, given.test // 2)
    trace(given.out / "trace")
    lens(given.out / "lens")
