"""Every command that writes, with inputs that are made here."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import edited
import families
import own_answers
import torch
from datasets import Dataset, Image, Value
from lmms_runs import parquet
from make_logs import Questions, Steered, save_steering, shape, write_run

from hones_eval.api import model as loading
from hones_eval.commands import demo as demo_command
from hones_eval.core.artifact import ExampleSet, Provenance
from hones_eval.core.ranking import Ranking
from hones_eval.core.steering import Steering
from hones_eval.lmms.examples import load_lmm

QUESTIONS = Questions.drawn(count=30)
ANSWERS = QUESTIONS.answers(0.4, 1), QUESTIONS.answers(0.9, 2)
PARTS = {"": (0, 4), "_discovery": (4, 7), "_development": (7, 9), "_test": (9, 12)}


@dataclass(frozen=True)
class Command:
    """A command line without `--out`; `processes` run it together."""

    line: str
    processes: int = 1
    seconds: float = 30
    """Of processor time per process."""
    kills: int = 8
    """At random times, and as many at renames."""

    def second(self) -> "Command":
        """The command that continues after a kill."""
        if self.continued is None:
            return self
        line = self.line.replace(f"--devices {self.processes}", f"--devices {self.continued}")
        return replace(self, line=line, processes=self.continued)

    @property
    def arguments(self) -> list[str]:
        """The words of the line."""
        lists = {"HONES": '["hones"]', "FIXED": '["fixed"]', "none": ""}
        return [lists.get(word, word) for word in self.line.split()]

    continued: int | None = None
    """The number of processes of the second run, if another than that of the first."""
    compared: Callable[[Path], bool] = lambda path: True
    """Which files have to be the same to the byte; of the others the names."""


def write_pair(folder: Path, base: str = "tiny/llava") -> None:
    """Logs of a baseline and of a steered run."""
    write_run(folder, QUESTIONS, ANSWERS[0], base=base, date="20260102_030405")
    write_run(folder, QUESTIONS, ANSWERS[1], base=base, steered=Steered(), date="20260102_030505")


def load_once() -> None:
    """Load every checkpoint once and hand it to all forks, which get copies of it."""
    loaded: dict[tuple[Any, ...], Any] = {}

    def load(model: str, arguments: str, **more: Any) -> Any:
        key = (model, arguments, *more.items())
        if key not in loaded:
            loaded[key] = load_lmm(model, arguments, **more)
        return loaded[key]

    loading.load_lmm = load


def make_rankings(model: Path, folder: Path) -> None:
    """Two rankings and a steering that fit a checkpoint, with random scores."""
    lmm: Any = loading.load_lmm("llava_hf", f"pretrained={model}")
    size = loading.Model.wrap(lmm, "llava_hf", "").anatomy.shape
    draw = torch.Generator().manual_seed(0)
    examples = [ExampleSet("vqa", "val", 2, 0, "f00d", [0, 1], ["aa", "bb"])]
    source = Provenance(str(model), None, size, "hones", {"neurons": 0.05}, examples)
    for name in ("first", "second"):
        scores = torch.rand(size.layers, size.heads, generator=draw)
        neurons = torch.rand(size.layers, size.neurons, generator=draw)
        Ranking(source, head_scores=scores, neuron_scores=neurons, report={"x": 1}).save(folder / name)
    ones = torch.ones(size.layers, size.heads)
    Steering(ones * 1.5, torch.ones(size.layers, size.neurons), source).save(folder / "steering")


def make_edited(whole: Path, tasks: Path) -> None:
    """The task `own_edited`: the questions of `own_a` about other images, with other answers."""
    rows = Dataset.from_parquet(str(whole / "own_a_second.parquet")).select(range(*PARTS[""]))
    edited = [
        {"image": image, "question": question, "answer": f"not {answer}"}
        for image, question, answer in zip(rows["image"][::-1], rows["question"], rows["answer"], strict=True)
    ]
    kinds = {"image": Image(), "question": Value("string"), "answer": Value("string")}
    (tasks / "own_edited.parquet").write_bytes(parquet(edited, **kinds))
    text = (tasks / "own_a.yaml").read_text()
    (tasks / "own_edited.yaml").write_text(text.replace("own_a", "own_edited"))


def make_table(folder: Path) -> Path:
    """A table of questions about four images."""
    folder.mkdir(parents=True)
    rows = ["image,question,answer"]
    for number, color in enumerate(("red", "green", "blue", "yellow")):
        shape(color, number).save(folder / f"{number}.png")
        rows.append(f"{number}.png,What color is it?,{color}")
    table = folder / "table.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def commands(folder: Path) -> dict[str, Command]:
    """The commands by name; their inputs are written into `folder`."""
    load_once()
    model = families.save_checkpoint("llava", folder / "model")
    whole = own_answers.write_tasks(folder / "whole", "llava_hf", f"pretrained={model}", 12)
    own_answers.write_splits(whole, folder / "tasks", PARTS)
    make_edited(whole, folder / "tasks")
    make_rankings(model, folder)
    write_pair(folder / "logs")
    save_steering(folder / "scales")
    table = make_table(folder / "photos")
    questions = edited.write(
        folder / "questions",
        [edited.record(question_id=f"q{i}", question=f"Is ball {i} red?") for i in range(2)],
    )
    first, second, steering = (folder / name for name in ("first", "second", "steering"))
    model_of = f"--model llava_hf --model_args pretrained={model} --include_path {folder / 'tasks'}"
    few = "--heads 3 --neurons 0.05 --trials 2"
    rank = f"rank --method hones {model_of} --tasks own_a --heads 3 --neurons 0.05 --resume"
    study = f"study {model_of} --tasks own_a --shifted none --methods HONES --epochs 1 {few}"
    traced = f"--clean own_a --edited own_edited {model_of} --limit 2 --examples 1 --what image,ffn"
    learned = f"--how learned {model_of} --tasks own_a_development --epochs 1 --learning_rate 0.05 --resume"
    return {
        "rank": Command(rank, kills=7),
        "scale": Command(f"scale --ranking {first} --how fixed --factor 2", kills=16),
        "verify": Command(f"verify --ranking {first} {model_of} --tasks own_a_test --trials 2", kills=4),
        "compare": Command(f"compare {first} {second}", kills=4),
        "lens": Command(f"lens {model_of} --tasks own_a --limit 2 --figures_of 1", kills=2),
        "trace": Command(f"trace {traced}", kills=3),
        "export ia3": Command(f"export --steering {steering} --to ia3", kills=12),
        "export checkpoint": Command(f"export --steering {steering} --to checkpoint", kills=12),
        "leaderboard": Command(f"leaderboard {folder / 'logs'} --resamples 99", kills=9),
        "edit": Command(f"edit --questions {questions} --editor recolor", kills=12),
        "task new": Command(f"task new --csv {table} --images {table.parent}", kills=16),
        "scale learned": Command(f"scale --ranking {first} {learned}", kills=4),
        "rank, two processes": Command(f"{rank} --devices 2", processes=2, kills=5),
        "rank, two processes and then three": Command(
            f"{rank} --devices 2", processes=2, continued=3, kills=3
        ),
        "rank, two processes and then one": Command(f"{rank} --devices 2", processes=2, continued=1, kills=3),
        "spike-in": Command(
            f"spike-in --ranking {first} {model_of} --tasks own_a --how FIXED {few}", kills=2
        ),
        "study": Command(study, seconds=120, kills=2),
    }


def demo_without_programs() -> Command:
    """The demo, whose two runs of lmms-eval are forks of this process instead of new programs.

    The logs and what is made from them hold the time of the run; the other files are compared.
    """
    demo_command.subprocess = SimpleNamespace(run=lmms_eval_in_a_fork)  # type: ignore[assignment]
    made = ("ranking", "verify", "steering")
    return Command("demo --examples 2", seconds=300, compared=lambda path: path.parts[0] in made, kills=1)


def lmms_eval_in_a_fork(command: list[str], **options: Any) -> Any:
    """Run `python -m lmms_eval ...` in a fork."""
    from subprocess import CompletedProcess

    from lmms_eval.__main__ import cli_evaluate

    process = os.fork()
    if process == 0:
        sys.argv = ["lmms-eval", *command[3:]]
        cli_evaluate()
        os._exit(0)
    return CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), "", "")


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
