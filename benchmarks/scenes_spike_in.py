"""Spike-ins on the embedded model: plant a fault, rank and scale with default settings, report the repair.

    python benchmarks/scenes_spike_in.py --out leaderboards/scenes/spike_in --work runs/scenes_spike_in

Per task three kinds of fault: the best neurons of the exhaustive ground truth, the best neurons of the `dvp`
ranking, or the best heads of the ground truth are damped. The strength is the weakest of `FAULTS` that costs
a tenth of the metric on the development images, since a fault that costs nothing cannot be repaired. Each
cell runs `hones_eval.jobs.spike_in` with the default way of scaling (`tuned`, among all heads and neurons)
and 5 random controls per row. Cells stay in the work folder, and a second run continues from there: the table
holds the cells that are done. One seed takes its own discovery, development and test images.

The first kind can be repaired once more with scales that are tuned on all 500 development images, which all
seeds then share: `--kinds "true neurons, 500 images"`.
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
from hones_eval.choices import Plant
from hones_eval.core.artifact import read_json, write_json, write_text
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import top_heads
from hones_eval.core.steering import Steering
from hones_eval.jobs.rank import Discovery, discover, provenance
from hones_eval.jobs.spike_in import SpikeIn, spike_in
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods import scaling
from hones_eval.methods.answers import BASELINE, AnswersUnder, answered
from hones_eval.reports import spike_in as spike_in_report
from hones_eval.reports.comparison import markdown_table
from hones_eval.toy import checkpoint_path
from hones_eval.toy.ground_truth import load_ground_truth

TASKS = ("vqa_relation", "ocr", "vqa_attribute", "vqa_object", "caption", "grounding", "retrieval")
KINDS = ("true neurons", "true heads", "dvp neurons", "true neurons, 500 images")
FAULTS: dict[str, tuple[tuple[float, float], ...]] = {
    "neurons": ((0.01, 0.25), (0.01, 0.1), (0.03, 0.1), (0.05, 0.05)),
    "heads": ((4, 0.5), (4, 0.25), (8, 0.25), (8, 0.1)),
}
"""Faults from weak to strong: the share of the neurons or the number of heads, and their scale."""
LOSS = 0.1
"""The loss of the metric on the development images from which a fault is strong enough."""
GOALS = {"neurons": 0.8, "heads": 0.9}
"""The share of a fault that should be recovered."""


def cell(model: api.Model, task: str, kind: str, seed: int, sizes: Sequence[int], work: Path) -> None:
    """Run one cell, unless its report is there."""
    folder = work / f"{task}-{kind.replace(',', '').replace(' ', '-')}-{seed}"
    if (folder / "spike_in.json").is_file():
        return
    began = time.process_time()
    choose, test = sizes
    name = f"scenes_{task}"
    discovery = model.examples(f"{name}_discovery", limit=choose, offset=seed * choose)
    development = model.examples(f"{name}_development", limit=choose, offset=seed * choose)
    tested = model.examples(name, limit=test, offset=seed * test)
    source = provenance(model.anatomy, discovery, "dvp", {"neurons": 0.01}, seed)
    if kind == "dvp neurons":
        ranking = discover(Discovery(model.replayer, discovery, model.loop, source, 4, 0.01))
    else:
        truth = load_ground_truth().effects[task]
        ranking = Ranking(
            source,
            head_scores=truth["heads_by_zero"].log_probability,
            neuron_scores=truth["neurons"].log_probability,
        )
    plant: Plant = "heads" if kind == "true heads" else "neurons"
    amount, damp = fault(model, development, ranking, plant)
    if kind.endswith("500 images"):
        development = model.examples(f"{name}_development")
    report = spike_in(
        SpikeIn(
            ranking,
            model.replayer,
            model.loop,
            discovery,
            development,
            tested,
            plant=plant,
            heads=int(amount) if plant == "heads" else 4,
            neurons=amount if plant == "neurons" else 0.01,
            damp=damp,
            method="dvp",
            chosen_on_random=False,
            seed=seed,
        )
    )
    report |= {"task": task, "kind": kind, "seed": seed, "cpu_seconds": round(time.process_time() - began)}
    spike_in_report.write(report, folder)


def fault(model: api.Model, development: TaskExamples, ranking: Ranking, plant: Plant) -> tuple[float, float]:
    """The weakest fault that costs `LOSS` of the metric on the development images, else the strongest."""
    steerings: dict[str, Steering] = {}
    for amount, damp in FAULTS[plant]:
        if plant == "heads":
            assert ranking.head_scores is not None
            bank = top_heads(ranking.head_scores, int(amount))
            steering = scaling.scaled_heads(ranking, bank, damp, {})
        else:
            steering = scaling.scaled_neurons(ranking, ranking.neurons(amount), damp, {})
        steerings[f"{amount:g}, {damp:g}"] = steering
    totals = model.loop.run(development, AnswersUnder(model.replayer, development, steerings), "faults")
    records = answered(totals)
    values = [
        development.aggregate([record.answers[name].result for record in records])
        for name in (BASELINE, *steerings)
    ]
    sign = 1 if development.higher_is_better else -1
    enough = [k for k, value in enumerate(values[1:]) if sign * (values[0] - value) >= LOSS]
    return FAULTS[plant][enough[0] if enough else -1]


def summary(work: Path) -> list[dict[str, Any]]:
    """One row per cell that is done, in the order of tasks, kinds and seeds."""
    found = [read_json(path) for path in work.glob("*/spike_in.json")]
    found.sort(key=lambda cell: (KINDS.index(cell["kind"]), TASKS.index(cell["task"]), cell["seed"]))
    return [_row(report) for report in found]


def _row(report: dict[str, Any]) -> dict[str, Any]:
    tuned = _tuned(report)
    standing = report["planted_in_rankings"]["damaged"]
    return {
        "task": report["task"],
        "fault": report["kind"],
        "seed": report["seed"],
        "development / test": f"{report['examples']['development']['count']} / "
        f"{report['examples']['test']['count']}",
        "damped": f"{len(report['planted'])} to {report['damp']:g}",
        "metric": report["metric"],
        "undamaged": f"{report['undamaged']:.3f}",
        "damaged": f"{report['damaged']:.3f}",
        "repairable": "yes" if report["repairable"] else "no",
        "tuned": f"{tuned['value']:.3f}",
        "gain": f"{tuned['gain']:+.3f}",
        "verdict": tuned["verdict"],
        "recovered [95 %]": spike_in_report.share_text(tuned),
        "random better": f"{report['controls_called_better']} of {len(report['controls'])}",
        "planted found by dvp": "" if standing is None else f"{standing['found']} of {standing['of']}",
        "CPU s": report["cpu_seconds"],
    }


def write(work: Path, out: Path, command: str) -> None:
    """Write the table of all cells that are done."""
    rows = summary(work)
    reports = [read_json(path) for path in sorted(work.glob("*/spike_in.json"))]
    hours = sum(report["cpu_seconds"] for report in reports) / 3600
    lines = [
        "# Spike-ins on the embedded model\n",
        f"Made by `{command}`: {len(rows)} cells of task, kind of fault and seed are done, in {hours:.2f} "
        "hours of one core. Default settings everywhere: `--how tuned`, among all heads and neurons. "
        "Controls are the same scales on random sites of the same layers, none of them planted, each tested "
        "alone at p < 0.05.\n",
        markdown_table([_kind_row(kind, reports) for kind in KINDS if _of(kind, reports)]),
        "## By task\n",
        "The recovered share of all seeds together: the sum of the gains over the sum of the losses, and in "
        "brackets the smallest and the largest share of a seed. Seeds have images of their own, but share "
        "the 500 development images of the last column.\n",
        markdown_table(_by_task(reports)),
        "## Every fault\n",
        markdown_table(rows),
    ]
    write_text(out / "spike_in.md", "\n".join(lines))
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "spike_in.csv", table.getvalue())
    write_json(out / "spike_in.json", json.loads(json.dumps(reports)))


def _of(kind: str, reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [report for report in reports if report["kind"] == kind]


def _by_task(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The share of the loss that `tuned` recovers, over all seeds of a task and a kind of fault."""
    rows = []
    for task in TASKS:
        row: dict[str, Any] = {"task": task}
        for kind in KINDS:
            own = [report for report in _of(kind, reports) if report["task"] == task]
            if not own:
                continue
            losses = [report["undamaged"] - report["damaged"] for report in own]
            gains = [_tuned(report)["gain"] for report in own]
            shares = [gain / loss for gain, loss in zip(gains, losses, strict=True) if loss]
            ends = f" ({min(shares):.2f} to {max(shares):.2f})" if len(shares) > 1 else ""
            row[kind] = f"{sum(gains) / sum(losses):.2f}{ends}" if sum(losses) else "no loss"
        rows.append(row)
    return [{column: row.get(column, "") for column in ("task", *KINDS)} for row in rows]


def _tuned(report: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in report["rows"] if row["scales"] == "tuned")


def _kind_row(kind: str, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often faults of one kind are recovered, and random sites are called better."""
    own = _of(kind, reports)
    repairable = [report for report in own if report["repairable"]]
    goal = GOALS["heads" if kind.endswith("heads") else "neurons"]
    shares = [_tuned(report)["recovered"]["value"] for report in repairable]
    enough = sum(share >= goal - 1e-9 for share in shares)
    return {
        "fault": kind,
        "cells": len(own),
        "that cost a clear part of the metric": len(repairable),
        "recovered, mean": f"{sum(shares) / len(shares):.2f}" if shares else "",
        "recovered enough": f"{enough} of {len(shares)} (at least {goal:.0%})",
        "random sites called better": f"{sum(report['controls_called_better'] for report in own)} of "
        f"{sum(len(report['controls']) for report in own)}",
    }


def main() -> None:
    """Run the cells that are missing, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/scenes/spike_in"))
    parser.add_argument("--work", type=Path, default=Path("runs/scenes_spike_in"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS[:3]), choices=KINDS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--examples", type=int, default=166, help="for discovery, and for development")
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
