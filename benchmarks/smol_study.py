"""The methods on a small pretrained model: rankings, masking, overlaps, faults, steering and side effects.

    python benchmarks/smol_study.py --out leaderboards/smol --work runs/smol_study

The model is the one that `hones-eval smol build` assembles, in bfloat16 on the CPU. Per task:

- *rankings* by every method on discovery images, with their CPU seconds;
- *heads*: how well `atp` and `vseam` agree with the exact drop of the gold answer's log-probability, which
  `hones` measures for every head on the same images;
- *masking*: the best 0.25 to 10 % of the neurons are masked together on test images, beside random neurons
  of the same layers;
- *spike-in*: the best neurons, or heads, by `atp` are damped, and default settings have to repair them;
- *steering*: `scale --how tuned` on shifted images, and the same scales on random sites, measured by
  lmms-eval on every task, as it is and shifted, and on questions without an image.

Then rankings of tasks are compared, and V-SEAM's heads by kind of question. Every cell is kept
in the work folder with its CPU seconds; a second run continues from there. The report holds what is done.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import captured_effect
import numpy as np
import torch
from scenes_board import control

from hones_eval import api
from hones_eval.__main__ import main as hones_eval
from hones_eval.core.artifact import read_json, write_json, write_text
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import matched_random, neuron_count, top_neurons
from hones_eval.jobs.new_task import task_file
from hones_eval.methods.scaling import scaled_neurons
from hones_eval.reports.comparison import csv_table, markdown_table
from hones_eval.reports.spike_in import share_text
from hones_eval.toy.yardstick import captured_effect as share_of_best

TASKS = ("vqa_relation", "vqa_attribute", "vqa_object", "caption")
KINDS = {
    "exists": "object", "shape_at": "object", "color": "attribute", "texture": "attribute",
    "is_side": "relation", "what_side": "relation",
}  # fmt: skip
METHODS = ("atp", "activation", "dvp", "random", "hones", "vseam")
BY_NEURONS = ("atp", "activation", "dvp", "random", "hones")
MATCHED = ("atp", "hones")
DRAWS = 3  # of random neurons in the layers of a ranking's
SHARES = captured_effect.SHARES
HEADS = 8  # the paper's share, 30 of 1024, of 270
PLANTS = ("neurons", "heads")
TEXT_TASK = "smol_text"
QUESTIONS = {
    "What is the capital of {}?": {
        "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo",
        "Russia": "Moscow", "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna",
        "Portugal": "Lisbon", "Poland": "Warsaw", "Ireland": "Dublin", "Norway": "Oslo", "Cuba": "Havana",
        "Sweden": "Stockholm", "Finland": "Helsinki", "Hungary": "Budapest", "Peru": "Lima",
        "Iraq": "Baghdad",
        "England": "London", "India": "Delhi", "South Korea": "Seoul", "Thailand": "Bangkok",
    },
    "What is the opposite of {}?": {
        "hot": "cold", "big": "small", "up": "down", "left": "right", "black": "white", "day": "night",
        "fast": "slow", "happy": "sad", "open": "closed", "old": "young", "wet": "dry", "hard": "soft",
    },
    "Which animal says {}?": {"moo": "cow", "woof": "dog", "meow": "cat", "quack": "duck"},
    "How many {}?": {
        "days are in a week": "7", "months are in a year": "12", "legs does a spider have": "8",
        "hours are in a day": "24", "minutes are in an hour": "60", "wheels does a bicycle have": "two",
    },
}  # fmt: skip


class Study:
    """The model, the folders and the sizes of one run."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Build the model where it is missing, and load it."""
        self.given, self.work = given, Path(given.work)
        folder = self.work / "model"
        command("smol", "build", "--out", str(folder))
        # Relative, since it is written into the board: the study runs in the repository.
        self.args = f"pretrained={folder},dtype=bfloat16,device=cpu"
        self.model = api.load("llava_hf", self.args)

    def cell(self, name: str, measure: Callable[[Path], dict[str, Any] | None]) -> None:
        """Run a part of the study, unless its receipt is there, and note its CPU seconds."""
        receipt = self.work / "cells" / f"{name}.json"
        if receipt.is_file():
            return
        began = time.process_time(), time.time()
        found = measure(self.work / name) or {}
        seconds = {"cpu_seconds": round(time.process_time() - began[0], 1)}
        write_json(receipt, seconds | {"seconds": round(time.time() - began[1], 1)} | found)
        print(f"{name}: {seconds['cpu_seconds']:.0f} CPU s", flush=True)

    def flags(self) -> list[str]:
        """The flags that name the model."""
        return ["--model", "llava_hf", "--model_args", self.args]

    def ranking(self, task: str, method: str) -> Path:
        """The folder of a ranking."""
        return self.work / "rankings" / task / method


def rank(study: Study, task: str, method: str, limit: int, folder: Path) -> dict[str, Any]:
    """Rank on discovery images; captions by the gold answer's log-probability, one pass per head."""
    api.rank(
        study.model,
        f"scenes_{task}_discovery",
        method=method,
        limit=limit,
        heads=HEADS,
        metric="log_probability" if task == "caption" and method == "hones" else None,
        out=folder,
        resume=True,
    )
    return {"examples": limit}


def heads(study: Study, task: str, folder: Path) -> dict[str, Any]:
    """How much of the best heads' exact effects each estimate captures, on the same images (no folder)."""
    exact = Ranking.load(study.ranking(task, "hones")).head_log_probability
    assert exact is not None
    found = {}
    for method in ("atp", "vseam"):
        scores = Ranking.load(study.ranking(task, method)).head_scores
        assert scores is not None
        ranks = [tensor.flatten().argsort().argsort().double() for tensor in (scores, exact)]
        found[method] = {
            "captured": share_of_best(scores, exact, HEADS).share,
            "spearman": float(torch.corrcoef(torch.stack(ranks))[0, 1]),
        }
    return {"heads": found}


def masking(study: Study, task: str, tests: int, folder: Path) -> dict[str, Any]:
    """The areas under the masking curves, beside random neurons of the same layers."""
    rankings = {method: Ranking.load(study.ranking(task, method)) for method in BY_NEURONS}
    some = rankings["hones"]
    assert some.neuron_scores is not None
    counts = [neuron_count(some.neuron_scores, share) for share in SHARES]
    chosen: dict[str, list[Any]] = {}
    for method, ranking in rankings.items():
        assert ranking.neuron_scores is not None
        chosen[method] = [top_neurons(ranking.neuron_scores, count) for count in counts]
    for method in MATCHED:
        for draw in range(DRAWS):
            chosen[f"{method}, matched random {draw}"] = [
                matched_random(bank, some.neuron_scores.shape[1], draw) for bank in chosen[method]
            ]
    banks = {
        f"{name} {count}": scaled_neurons(some, bank, 0.0, {})
        for name, own in chosen.items()
        for count, bank in zip(counts, own, strict=True)
    }
    found = captured_effect.losses(study.model, task, 0, tests, banks)
    areas = captured_effect.areas(found, list(chosen), counts, some.neuron_scores)
    return {"masking": areas, "tests": tests, "shares": list(SHARES)}


def spike_in(study: Study, task: str, plant: str, sizes: Sequence[int], folder: Path) -> None:
    """Damp the best sites by `atp`, then rank by `atp` and scale with default settings."""
    command(
        "spike-in", "--ranking", str(study.ranking(task, "atp")), *study.flags(), "--tasks", f"scenes_{task}",
        "--plant", plant, "--heads", str(HEADS), "--method", "atp", "--limit", str(sizes[0]),
        "--test_limit", str(sizes[1]), "--out", str(folder), "--overwrite",
    )  # fmt: skip


def tune(study: Study, task: str, limit: int, folder: Path) -> dict[str, Any]:
    """Scales that `--how tuned` finds on shifted development images, and the same on random sites.

    On images as they are the model is hardly ever wrong, and no scales lower its loss. Nothing is written
    where none do on shifted images either.
    """
    failed = hones_eval([
        "scale", "--ranking", str(study.ranking(task, "atp")), "--how", "tuned", *study.flags(),
        "--tasks", f"scenes_{task}_shifted_development", "--limit", str(limit), "--out", str(folder),
        "--overwrite",
    ])  # fmt: skip
    if failed:
        return {"helped": False}
    control(folder, folder.with_name(f"{folder.name}-random"))
    return {"helped": True}


def evaluate(study: Study, steering: Path | None, limit: int, logs: Path) -> dict[str, Any]:
    """One lmms-eval run over all tasks, as they are, shifted, and without an image."""
    args = study.args if steering is None else f"{study.args},steering={steering}"
    tasks = [f"scenes_{task}{shift}" for task in TASKS for shift in ("", "_shifted")]
    line = [sys.executable, "-m", "lmms_eval", "--model", "hones_hf", "--model_args", args]
    line += ["--tasks", ",".join([*tasks, TEXT_TASK]), "--include_path", str(study.work / "tasks")]
    line += ["--limit", str(limit), "--batch_size", "8", "--log_samples", "--output_path", str(logs)]
    began = time.monotonic()
    subprocess.run(line, check=True)
    return {"seconds_of_lmms_eval": round(time.monotonic() - began)}


def write_text_task(folder: Path) -> None:
    """The task of questions without an image; an answer is right when it holds the expected word."""
    table = (folder / f"{TEXT_TASK}.jsonl").resolve()
    rows = [
        {"prompt": question.format(name), "answer": answer}
        for question, known in QUESTIONS.items()
        for name, answer in known.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(table, "".join(json.dumps(row) + "\n" for row in rows))
    yaml = task_file(TEXT_TASK, "question", table)
    write_text(folder / f"{TEXT_TASK}.yaml", yaml)
    write_text(
        folder / "utils.py",
        '"""Functions of the task of questions without an image."""\n\n\n'
        "def images(doc):\n    return []\n\n\n"
        "def question_results(doc, results):\n"
        '    return {"exact_match": float(doc["answer"].lower() in results[0].lower())}\n',
    )


def command(*arguments: str) -> None:
    """Run `hones-eval`; stop where it fails."""
    if hones_eval(list(arguments)):
        sys.exit(1)


def run(study: Study) -> None:
    """All cells, cheap ones first; the report is written again after every task."""
    given = study.given
    write_text_task(study.work / "tasks")
    costly = {"hones": given.exact_examples, "vseam": given.exact_examples}
    for method in METHODS:
        for task in TASKS:
            limit = costly.get(method, given.examples)
            study.cell(f"rankings/{task}/{method}", partial(rank, study, task, method, limit))
    for task in TASKS:
        study.cell(f"heads/{task}", partial(heads, study, task))
        study.cell(f"masking/{task}", partial(masking, study, task, given.tests))
        report(study)
    study.cell("logs/baseline", partial(evaluate, study, None, given.board))
    for task in TASKS:
        folder = study.work / "steerings" / task
        study.cell(f"steerings/{task}", partial(tune, study, task, given.development))
        for steering in (folder, folder.with_name(f"{task}-random")):
            if not steering.is_dir():
                continue
            study.cell(f"logs/{steering.name}", partial(evaluate, study, steering, given.board))
        for plant in PLANTS:
            sizes = (given.development, given.board)
            study.cell(f"spike_in/{task}-{plant}", partial(spike_in, study, task, plant, sizes))
        report(study)
    for kind in KINDS:
        study.cell(f"kinds/{kind}", partial(rank, study, f"vqa_{kind}", "vseam", given.kind_examples))
    report(study)


def report(study: Study) -> None:
    """Write the tables, figures and boards of the cells that are done."""
    out, work = Path(study.given.out), study.work
    cells = {
        str(path.relative_to(work / "cells").with_suffix("")): read_json(path)
        for path in sorted((work / "cells").rglob("*.json"))
    }
    hours = sum(cell["cpu_seconds"] + cell.get("seconds_of_lmms_eval", 0) for cell in cells.values()) / 3600
    parts = [
        "# A small pretrained model: tables\n",
        f"Made by `{study.given.command}`: {len(cells)} of {all_cells()} cells are done, in {hours:.1f} "
        "hours of one core. [README.md](README.md) says what they show.\n",
    ]
    parts += ["## Rankings: CPU seconds per example\n", markdown_table(costs(cells))]
    tables = {
        "Heads: agreement with the exact drop of the gold answer's log-probability": head_rows(cells),
        "Neurons: masking area": area_rows(cells),
        "Planted faults": fault_rows(work),
    }
    for title, rows in tables.items():
        if rows:
            parts += [f"## {title}\n", markdown_table(rows)]
            name = title.split(":")[0].lower().replace(" ", "_")
            write_text(out / f"{name}.csv", csv_table(rows))
    write_text(out / "study.md", "\n".join(parts))
    write_json(out / "study.json", {"cells": cells})
    comparisons(study, out)
    logs = [path for path in sorted((work / "logs").glob("*")) if list(path.rglob("*results.json"))]
    if len(logs) > 1:
        command("leaderboard", *map(str, logs), "--include_path", str(work / "tasks"), "--out",
                str(out / "board"), "--pages", "12",
                "--title", "A small pretrained model: steering and side effects")  # fmt: skip


def comparisons(study: Study, out: Path) -> None:
    """Overlaps between tasks, and between kinds of question of one semantic level."""
    for method in MATCHED:
        folders = [study.ranking(task, method) for task in TASKS]
        done = [str(folder) for folder in folders if (folder / "ranking.json").is_file()]
        if len(done) > 1:
            command("compare", *done, "--out", str(out / f"overlap_{method}"), "--overwrite")
    kinds = {kind: study.work / "kinds" / kind for kind in KINDS}
    if all((folder / "ranking.json").is_file() for folder in kinds.values()):
        command("compare", *map(str, kinds.values()), "--levels", ",".join(KINDS.values()), "--heads",
                str(HEADS), "--out", str(out / "kinds"), "--overwrite")  # fmt: skip


def all_cells() -> int:
    """How many cells the whole study has."""
    return len(TASKS) * (len(METHODS) + 2 + 1 + 2 + len(PLANTS)) + 1 + len(KINDS)


def costs(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """CPU seconds per example of each method and task."""
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"method": method}
        for task in TASKS:
            cell = cells.get(f"rankings/{task}/{method}")
            row[task] = "" if cell is None else f"{cell['cpu_seconds'] / cell['examples']:.2f}"
            row.setdefault("examples", cell and cell["examples"])
        rows.append(row)
    return rows


def head_rows(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Agreement of two estimates with the exact effects of heads."""
    return [
        {
            "task": task,
            "method": method,
            f"captured by the best {HEADS}": f"{one['captured']:.2f}",
            "Spearman": f"{one['spearman']:.2f}",
        }
        for task in TASKS
        for method, one in cells.get(f"heads/{task}", {}).get("heads", {}).items()
    ]


def area_rows(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Masking areas with intervals; the random draws of one ranking are one row."""
    done = {task: cells[f"masking/{task}"]["masking"] for task in TASKS if f"masking/{task}" in cells}
    rows = []
    for name in (*BY_NEURONS, *(f"{method}, matched random" for method in MATCHED)):
        row: dict[str, Any] = {"neurons": name}
        for task, areas in done.items():
            own = [area for key, area in areas.items() if key == name or key.startswith(f"{name} ")]
            mean = [float(np.mean([area[end] for area in own])) for end in ("area", "area_low", "area_high")]
            row[task] = f"{mean[0]:.3f} [{mean[1]:.3f}, {mean[2]:.3f}]"
        rows.append(row)
    return rows if done else []


def fault_rows(work: Path) -> list[dict[str, Any]]:
    """What default settings recover of each planted fault."""
    rows = []
    for task in TASKS:
        for plant in PLANTS:
            path = work / "spike_in" / f"{task}-{plant}" / "spike_in.json"
            if not path.is_file():
                continue
            found = read_json(path)
            tuned = next(row for row in found["rows"] if row["scales"] == "tuned")
            rows.append(
                {
                    "task": task,
                    "fault": f"{len(found['planted'])} {plant} to {found['damp']:g}",
                    "undamaged": f"{found['undamaged']:.3f}",
                    "damaged": f"{found['damaged']:.3f}",
                    "tuned": f"{tuned['value']:.3f}",
                    "verdict": tuned["verdict"],
                    "recovered": share_text(tuned),
                    "random better": f"{found['controls_called_better']} of {len(found['controls'])}",
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/smol"))
    parser.add_argument("--work", type=Path, default=Path("runs/smol_study"))
    parser.add_argument("--examples", type=int, default=100, help="to rank on by cheap methods")
    parser.add_argument("--exact_examples", type=int, default=100, help="to rank on by hones and vseam")
    parser.add_argument("--kind_examples", type=int, default=48, help="to rank each kind of question on")
    parser.add_argument("--tests", type=int, default=64, help="to mask on")
    parser.add_argument("--development", type=int, default=64, help="to choose scales on")
    parser.add_argument("--board", type=int, default=100, help="test examples of each task on the board")
    parser.add_argument("--report", action="store_true", help="only write the report of what is done")
    given = parser.parse_args()
    given.command = " ".join(["python", "benchmarks/smol_study.py", *sys.argv[1:]])
    torch.set_num_threads(1)
    study = Study(given)
    (report if given.report else run)(study)


if __name__ == "__main__":
    main()
