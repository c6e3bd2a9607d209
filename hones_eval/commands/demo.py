"""`hones-eval demo`."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple, get_args

from hones_eval.choices import Category
from hones_eval.commands.answer import Answer, say, show
from hones_eval.commands.edit import edit
from hones_eval.commands.leaderboard import leaderboard
from hones_eval.commands.rank import rank
from hones_eval.commands.scale import scale
from hones_eval.commands.trace import trace
from hones_eval.commands.verify import verify
from hones_eval.errors import HonesError


class _Plan(NamedTuple):
    """The tasks of each step: three sets of images that have none in common."""

    discovery: str
    development: str
    test: tuple[str, ...]


SCENES = _Plan(
    "scenes_vqa_relation_discovery",
    "scenes_vqa_relation_development",
    ("scenes_vqa_relation", "scenes_vqa_relation_shifted", "scenes_vqa_object", "scenes_ocr"),
)
PHOTOS = _Plan("hones_vqa_discovery", "hones_vqa_development", ("hones_vqa_test",))


def demo(
    out: Path = Path("demo"),
    photos: Path | None = None,
    questions: Path | None = None,
    examples: int = 48,
    factor: float = 1.5,
) -> Answer:
    """Run the whole job on the bundled model: rank, verify, scale, evaluate with lmms-eval, leaderboard.

    Args:
        out: the folder for everything that the steps write.
        photos: a folder of photographs with one JSON file of annotations; by default scenes are drawn.
        questions: a file of yes/no questions with boxes, as the V-SEAM release has them; the job is then
            V-SEAM's: edit, trace, rank heads, rescale, evaluate. The images are next to it or in --photos.
        examples: use at most this many examples to discover and to verify; four times as many to evaluate.
        factor: what the selected neurons are multiplied by.

    Example:
        hones-eval demo --out demo
        hones-eval demo --photos my_photos --out demo
    """
    from hones_eval.toy import checkpoint_path

    if photos is not None and not photos.exists():
        raise HonesError(f"--photos {photos}: there is no such folder")
    model, model_args = "hones_llava", f"pretrained={checkpoint_path()}"
    if photos is not None or questions is not None:
        say(
            "note: the bundled model was trained on drawn scenes only; on photographs this shows the "
            "path, not a result"
        )
    if questions is not None:
        return _with_edits(questions, photos, out, examples, model, model_args)
    plan = SCENES
    if photos is not None:
        os.environ["HONES_EVAL_DATA"] = str(photos.resolve())
        plan = PHOTOS
    say(f"\n1. Which heads and neurons carry {plan.discovery}?")
    show(
        rank(
            "hones",
            model,
            plan.discovery,
            out / "ranking",
            model_args=model_args,
            limit=examples,
            heads=8,
        )
    )
    say("\n2. Do they matter on other images? Mask them, and random ones for comparison.")
    held_out = {"model_args": model_args, "limit": examples}
    show(verify(out / "ranking", model, plan.development, out / "verify", **held_out))  # type: ignore[arg-type]
    say(f"\n3. Scale the neurons by {factor}.")
    show(scale(ranking=out / "ranking", how="fixed", factor=factor, out=out / "steering"))
    say("\n4. Evaluate on a third set of images with lmms-eval, without and with the steering.")
    return _evaluate(model_args, plan.test, out, 4 * examples)


def _with_edits(
    questions: Path, photos: Path | None, out: Path, examples: int, model: str, model_args: str
) -> Answer:
    """V-SEAM on image pairs made here: heads are found on one category and tested on the others."""
    from hones_eval.core.artifact import read_json

    say("\n1. Edit the images so that the answers change.")
    show(edit(out / "edits", "auto", questions=questions, images=photos))
    pairs = read_json(out / "edits" / "vseam_pairs.json")
    categories = get_args(Category)
    edited = [
        name for name, _ in Counter(pair["category"] for pair in pairs).most_common() if name in categories
    ]
    if not edited:
        raise HonesError(f"{questions}: no edit of the categories {', '.join(categories)} was accepted")
    os.environ["HONES_EVAL_DATA"] = str((out / "edits").resolve())
    say("\n2. Where does the model see the difference? Put clean activations into edited passes.")
    clean = [f"vseam_{name}" for name in edited]
    twins = [f"{name}_edited" for name in clean]
    pairs_of_tasks = (",".join(clean), ",".join(twins))
    show(trace(*pairs_of_tasks, model, out / "trace", "image,text,last", model_args=model_args))
    say(f"\n3. Which heads help and hurt on {clean[0]}, clean and edited?")
    both = f"{clean[0]}_both"
    show(rank("vseam", model, both, out / "ranking", model_args=model_args, limit=examples, heads=8))
    say("\n4. Rescale them by their signed scores.")
    show(scale(ranking=out / "ranking", how="signed", out=out / "steering"))
    if len(clean) == 1:
        say(
            f"\nnote: there is no other category, so {clean[0]} is tested on the examples that its "
            "heads were found on"
        )
    tests = tuple(f"{name}_both" for name in clean[1:] or clean)
    say("\n5. Evaluate with lmms-eval, without and with the steering.")
    return _evaluate(model_args, tests, out, 4 * examples)


def _evaluate(model_args: str, tasks: tuple[str, ...], out: Path, limit: int) -> Answer:
    """Run lmms-eval without and with the steering in `out`, and write the page that compares them."""
    for name, steering in (("baseline", ""), ("steered", f",steering={out / 'steering'}")):
        _lmms_eval(model_args + steering, tasks, out / "logs" / name, limit)
    say("\nDid it help?")
    return leaderboard([out / "logs"], out / "board")


def _lmms_eval(model_args: str, tasks: tuple[str, ...], logs: Path, limit: int) -> None:
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "hones_llava", "--model_args", model_args),
        *("--tasks", ",".join(tasks), "--limit", str(limit), "--batch_size", "1"),
        *("--log_samples", "--output_path", str(logs)),
    ]
    say("$ lmms-eval " + " ".join(command[3:]))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not list(logs.rglob("*results.json")):
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise HonesError(f"lmms-eval failed with exit status {done.returncode}; its last lines: {tail}")
