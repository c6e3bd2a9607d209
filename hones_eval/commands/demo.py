"""`hones-eval demo`."""

import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from hones_eval.choices import Category
from hones_eval.commands.answer import Answer, say, show
from hones_eval.commands.leaderboard import leaderboard
from hones_eval.commands.result_page import run_step
from hones_eval.errors import HonesError
from hones_eval.pages.run import PAGE
from hones_eval.pages.story import Step, write_story


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
    with_model = ["--model", model, "--model_args", model_args, "--limit", str(examples)]
    story = _Story(out)
    story.step(
        f"Which heads and neurons carry {plan.discovery}?",
        ["rank", "--method", "hones", *with_model, "--tasks", plan.discovery, "--heads", "8"],
        "ranking",
    )
    story.step(
        "Do they matter on other images? Mask them, and random ones for comparison",
        ["verify", "--ranking", str(out / "ranking"), *with_model, "--tasks", plan.development],
        "verify",
    )
    story.step(
        f"Scale the neurons by {factor}",
        ["scale", "--ranking", str(out / "ranking"), "--how", "fixed", "--factor", str(factor)],
        "steering",
    )
    return story.evaluated(model_args, plan.test, 4 * examples)


def _with_edits(
    questions: Path, photos: Path | None, out: Path, examples: int, model: str, model_args: str
) -> Answer:
    """V-SEAM on image pairs made here: heads are found on one category and tested on the others."""
    from hones_eval.core.artifact import read_json

    story, with_model = _Story(out), ["--model", model, "--model_args", model_args]
    images = [] if photos is None else ["--images", str(photos)]
    story.step(
        "Edit the images so that the answers change",
        ["edit", "--editor", "auto", "--questions", str(questions), *images],
        "edits",
    )
    pairs = read_json(out / "edits" / "vseam_pairs.json")
    categories = get_args(Category)
    edited = [
        name for name, _ in Counter(pair["category"] for pair in pairs).most_common() if name in categories
    ]
    if not edited:
        raise HonesError(f"{questions}: no edit of the categories {', '.join(categories)} was accepted")
    os.environ["HONES_EVAL_DATA"] = str((out / "edits").resolve())
    clean = [f"vseam_{name}" for name in edited]
    twins = [f"{name}_edited" for name in clean]
    story.step(
        "Where does the model see the difference? Put clean activations into edited passes",
        [
            *("trace", "--clean", ",".join(clean), "--edited", ",".join(twins), *with_model),
            *("--what", "image,text,last"),
        ],
        "trace",
    )
    both = f"{clean[0]}_both"
    story.step(
        f"Which heads help and hurt on {clean[0]}, clean and edited?",
        ["rank", "--method", "vseam", *with_model, "--tasks", both, "--limit", str(examples), "--heads", "8"],
        "ranking",
    )
    story.step(
        "Rescale them by their signed scores",
        ["scale", "--ranking", str(out / "ranking"), "--how", "signed"],
        "steering",
    )
    if len(clean) == 1:
        say(
            f"\nnote: there is no other category, so {clean[0]} is tested on the examples that its "
            "heads were found on"
        )
    tests = tuple(f"{name}_both" for name in clean[1:] or clean)
    return story.evaluated(model_args, tests, 4 * examples)


class _Story:
    """The steps of the demo so far; every step is a command with a page of its own."""

    def __init__(self, out: Path) -> None:
        """Begin without a step; `out` is the demo's folder."""
        self.out = out
        self.steps: list[Step] = []

    def step(self, question: str, words: Sequence[str], folder: str) -> None:
        """Run a command that writes to a subfolder, and show its answer."""
        say(f"\n{len(self.steps) + 1}. {question}{'' if question.endswith('?') else '.'}")
        words = [*words, "--out", str(self.out / folder)]
        answer = run_step(words)
        show(answer)
        say(f"see {self.out / folder / PAGE}")
        told = [line.removeprefix(f"wrote {self.out / folder}: ") for line in answer.lines]
        found = answer.headline or told[0]
        figures = sorted((self.out / folder).glob("*.png"))[:1]
        lines = [line for line in told if line != found and not line.startswith("wrote ")]
        self._add(question, found, words, folder, lines=lines, charts=answer.charts, figures=figures)

    def evaluated(self, model_args: str, tasks: tuple[str, ...], limit: int) -> Answer:
        """Run lmms-eval without and with the steering, write the board and the page of the whole story."""
        question = "Evaluate on other images with lmms-eval, without and with the steering. Did it help?"
        say(f"\n{len(self.steps) + 1}. {question}")
        for name, steering in (("baseline", ""), ("steered", f",steering={self.out / 'steering'}")):
            logs = self.out / "logs" / name
            if logs.exists():
                shutil.rmtree(logs)  # of an earlier demo: its tasks are not this one's
            _lmms_eval(model_args + steering, tasks, logs, limit)
        say("\nDid it help?")
        answer = leaderboard([self.out / "logs"], self.out / "board")
        words = ["leaderboard", str(self.out / "logs"), "--out", str(self.out / "board")]
        found, _, power = answer.data["answer"].removesuffix(".").partition("; ")
        drawn = [self.out / "board" / "leaderboard.svg"]
        self._add(question, found, words, "board", lines=[power] if power else [], figures=drawn)
        page = write_story(
            self.out,
            title="hones-eval demo: what was found, step by step",
            answer=found,
            lead=f"On the bundled model, with lmms-eval tasks {', '.join(tasks)}. The steps, with what was "
            "found, and a page each:",
            steps=self.steps,
        )
        return Answer([*answer.lines, f"the whole story: {page}"], answer.data | {"page": str(page)})

    def _add(self, question: str, found: str, words: Sequence[str], folder: str, **shown: Any) -> None:
        page, command = self.out / folder / PAGE, f"hones-eval {shlex.join(words)}"
        self.steps.append(Step(question, found.removesuffix("."), command=command, page=page, **shown))


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
