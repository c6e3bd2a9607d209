"""`hones-eval demo`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from hones_eval.commands.leaderboard import leaderboard
from hones_eval.commands.rank import rank
from hones_eval.commands.scale import scale
from hones_eval.commands.shared import say
from hones_eval.commands.verify import verify
from hones_eval.errors import HonesError
from hones_eval.toy import checkpoint_path


class _Plan(NamedTuple):
    """Which tasks each step of the demonstration uses: three sets of pictures that share none."""

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
    out: Path = Path("demo"), photos: Path | None = None, examples: int = 48, factor: float = 1.5
) -> None:
    """Run the whole job on the embedded model: rank, verify, scale, evaluate with lmms-eval, leaderboard.

    Args:
        out: the folder for everything that the steps write.
        photos: a folder of photographs with one JSON file of annotations; by default scenes are drawn.
        examples: use at most so many examples to discover and to verify; four times as many to evaluate.
        factor: what the selected neurons are multiplied by.
    """
    plan = SCENES
    if photos is not None:
        if not photos.exists():
            raise HonesError(f"--photos {photos}: there is no such folder")
        os.environ["HONES_EVAL_DATA"] = str(photos.resolve())
        plan = PHOTOS
        say("note: the embedded model has only ever seen drawn scenes; on photographs this shows the path")
    model, model_args = "hones_llava", f"pretrained={checkpoint_path()}"
    say(f"\n1. Which heads and neurons carry {plan.discovery}?")
    rank(
        "hones",
        model,
        plan.discovery,
        out / "ranking",
        model_args=model_args,
        limit=examples,
        heads=8,
    )
    say("\n2. Do they matter on other pictures? Mask them, beside random ones.")
    verify(out / "ranking", model, plan.development, out / "verify", model_args=model_args, limit=examples)
    say(f"\n3. Scale the neurons by {factor}.")
    scale(ranking=out / "ranking", how="fixed", factor=factor, out=out / "steering")
    say("\n4. Evaluate on a third set of pictures with lmms-eval, as it is and steered.")
    for name, steering in (("baseline", ""), ("steered", f",steering={out / 'steering'}")):
        _lmms_eval(model_args + steering, plan.test, out / "logs" / name, 4 * examples)
    say("\n5. Did it help?")
    leaderboard([out / "logs"], out / "board")


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
        raise HonesError(f"lmms-eval failed with exit status {done.returncode}; its last words: {tail}")
