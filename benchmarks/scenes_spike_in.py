"""Spike-ins on the embedded model: plant a fault, rank and scale with default settings, report the repair.

    python benchmarks/scenes_spike_in.py --out leaderboards/scenes/spike_in --work runs/scenes_spike_in

Per task three kinds of fault: the 21 neurons of the exhaustive ground truth damped to a quarter, the 21
neurons of the `dvp` ranking damped to a quarter, and the 4 heads of the ground truth damped to a half. Each
cell runs `hones_eval.jobs.spike_in` with the default way of scaling (`tuned`), 64 development images and 5
random controls per row. Cells stay in the work folder, and a second run continues from there: the table
holds the cells that are done. One seed takes its own discovery, development and test images.
"""

import argparse
import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hones_eval import api
from hones_eval.core.artifact import read_json, write_json, write_text
from hones_eval.core.ranking import Ranking
from hones_eval.jobs.rank import Discovery, discover, provenance
from hones_eval.jobs.spike_in import SpikeIn, spike_in
from hones_eval.reports import spike_in as spike_in_report
from hones_eval.reports.comparison import markdown_table
from hones_eval.toy import checkpoint_path
from hones_eval.toy.ground_truth import load_ground_truth

TASKS = ("vqa_relation", "ocr", "vqa_attribute", "vqa_object", "caption", "grounding", "retrieval_margin")
KINDS = ("true neurons", "true heads", "dvp neurons")
CANDIDATES = 5  # times as many examples for retrieval: ten candidates make one query


def cell(model: api.Model, task: str, kind: str, seed: int, sizes: Sequence[int], work: Path) -> None:
    """Run one cell, unless its report is there."""
    folder = work / f"{task}-{kind.replace(' ', '-')}-{seed}"
    if (folder / "spike_in.json").is_file():
        return
    began = time.process_time()
    times = CANDIDATES if task.startswith("retrieval") else 1
    choose, test = (times * size for size in sizes)
    name = f"scenes_{task}"
    discovery = model.examples(f"{name}_discovery", limit=choose, offset=seed * choose)
    development = model.examples(f"{name}_development", limit=choose, offset=seed * choose)
    tested = model.examples(name, limit=test, offset=seed * test)
    source = provenance(model.anatomy, discovery, "dvp", {"neurons": 0.01}, seed)
    if kind == "dvp neurons":
        ranking = discover(Discovery(model.replayer, discovery, model.loop, source, 4, 0.01))
    else:
        truth = load_ground_truth().effects[task.removesuffix("_margin")]
        ranking = Ranking(
            source,
            head_scores=truth["heads_by_zero"].log_probability,
            neuron_scores=truth["neurons"].log_probability,
        )
    heads = kind == "true heads"
    report = spike_in(
        SpikeIn(
            ranking,
            model.replayer,
            model.loop,
            discovery,
            development,
            tested,
            plant="heads" if heads else "neurons",
            damp=0.5 if heads else 0.25,
            method="dvp",
            chosen_on_random=False,
            seed=seed,
        )
    )
    report |= {"task": task, "kind": kind, "seed": seed, "cpu_seconds": round(time.process_time() - began)}
    spike_in_report.write(report, folder)


def summary(work: Path) -> list[dict[str, Any]]:
    """One row per cell that is done, in the order of tasks, kinds and seeds."""
    found = [read_json(path) for path in work.glob("*/spike_in.json")]
    found.sort(key=lambda one: (TASKS.index(one["task"]), KINDS.index(one["kind"]), one["seed"]))
    return [_row(report) for report in found]


def _row(report: dict[str, Any]) -> dict[str, Any]:
    tuned = next(row for row in report["rows"] if row["scales"] == "tuned")
    share = tuned["recovered"]
    ends = "" if share["low"] is None else f" [{share['low']:.2f}, {share['high']:.2f}]"
    standing = report["planted_in_rankings"]["damaged"]
    return {
        "task": report["task"],
        "fault": report["kind"],
        "seed": report["seed"],
        "metric": report["metric"],
        "undamaged": f"{report['undamaged']:.3f}",
        "damaged": f"{report['damaged']:.3f}",
        "repairable": "yes" if report["repairable"] else "no",
        "tuned": f"{tuned['value']:.3f}",
        "gain": f"{tuned['gain']:+.3f}",
        "verdict": tuned["verdict"],
        "recovered [95 %]": "undefined" if share["value"] is None else f"{share['value']:.2f}{ends}",
        "random better": f"{report['controls_called_better']} of {len(report['controls'])}",
        "planted found by dvp": "" if standing is None else f"{standing['found']} of {standing['of']}",
        "CPU s": report["cpu_seconds"],
    }


def write(work: Path, out: Path, command: str) -> None:
    """Write the table of all cells that are done."""
    rows = summary(work)
    reports = [read_json(path) for path in sorted(work.glob("*/spike_in.json"))]
    repairable = [report for report in reports if report["repairable"]]
    shares = [
        next(row for row in report["rows"] if row["scales"] == "tuned")["recovered"]["value"]
        for report in repairable
    ]
    better = sum(report["controls_called_better"] for report in reports)
    controls = sum(len(report["controls"]) for report in reports)
    hours = sum(report["cpu_seconds"] for report in reports) / 3600
    lines = [
        "# Spike-ins on the embedded model\n",
        f"Made by `{command}`: {len(rows)} of {len(TASKS) * len(KINDS)} cells per seed are done, in "
        f"{hours:.2f} hours of one core. Default settings everywhere: `--how tuned`, 64 development images, "
        "100 test images (retrieval: 32 and 50 queries of ten candidates).\n",
        f"{len(repairable)} faults cost a clear part of the metric. Of these, "
        f"{sum(share >= 0.8 for share in shares)} are recovered by 80 % or more. The same scales on random "
        f"sites of the same layers are called better in {better} of {controls} controls, each tested alone "
        "at p < 0.05.\n",
        markdown_table(rows),
    ]
    write_text(out / "spike_in.md", "\n".join(lines))
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "spike_in.csv", table.getvalue())
    write_json(out / "spike_in.json", json.loads(json.dumps(reports)))


def main() -> None:
    """Run the cells that are missing, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/scenes/spike_in"))
    parser.add_argument("--work", type=Path, default=Path("runs/scenes_spike_in"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--examples", type=int, default=64, help="for discovery, and for development")
    parser.add_argument("--test", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = api.load("llava_hf", f"pretrained={checkpoint_path()}")
    for seed in range(given.seeds):
        for kind in given.kinds:
            for task in given.tasks:
                cell(model, task, kind, seed, (given.examples, given.test), given.work)
                write(given.work, given.out, "python benchmarks/scenes_spike_in.py")


if __name__ == "__main__":
    main()
