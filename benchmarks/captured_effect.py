"""Methods x tasks x seeds: the share of the true effects that each ranking captures, and its time.

    python benchmarks/captured_effect.py --out leaderboards/scenes/methods --work runs/captured_effect

ranks the heads and neurons of the bundled model on discovery examples that the ground truth did not use, each
seed on its own, and scores the best 4 heads and the best 1 % of the neurons in two ways:

- *captured effect*: the sum of the selected sites' true single-site effects over the largest possible sum,
  with the ceiling that one half of the truth's examples reaches on the other half. Tasks whose truth is flat
  are not scored.
- *masking area*: the best 0.25 to 10 % of the neurons are masked together on test examples. The area is the
  mean rise of the gold answer's loss over the logarithm of the share, with a 95 % interval by bootstrap over
  images. It needs no ground truth.

`--faults` plants a fault instead: the truth's best 1 % of the neurons are damped to a quarter, the damaged
model is ranked, and the best 1 % of each ranking are multiplied by one factor, which discovery images choose.
The recovered share of the loss on test images says whether a ranking finds what is broken.

Cells are kept in the work folder, and a second run continues from there. The table holds the cells that are
done. Times are CPU seconds of one thread.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hones_eval import api
from hones_eval.core.artifact import read_json, write_json, write_text
from hones_eval.core.attach import steer
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import neuron_count, top_neurons
from hones_eval.methods.learning import Fold, TargetLosses
from hones_eval.methods.scaling import scaled_neurons
from hones_eval.reports.comparison import csv_table, markdown_table
from hones_eval.toy import checkpoint_path
from hones_eval.toy.ground_truth import TASKS, Effects, GroundTruth, load_ground_truth
from hones_eval.toy.yardstick import agreement, captured_effect, masking_area

METHODS: dict[str, dict[str, Any]] = {
    "hones": {"method": "hones"},
    "vseam": {"method": "vseam"},
    "dvp": {"method": "dvp"},
    "activation": {"method": "activation"},
    "atp": {"method": "atp"},
    "atp, log-probability per example": {
        "method": "atp",
        "objective": "log_probability",
        "absolute": "example",
    },
    "atp, confirm 200": {"method": "atp", "confirm": 200},
    "atp, confirm 200, joint": {"method": "atp", "confirm": 200, "joint": True},
    "random": {"method": "random"},
}
SIGNED = "atp, signed"
GRADIENTS = ("atp",)
SHARES = (0.0025, 0.01, 0.03, 0.1)
DAMP = 0.25
FACTORS = (1.5, 2.0, 4.0)
SMALLEST_FAULT = 0.02
HEADS = 4
CEILING = 0.5
"""A truth whose halves capture less than this share of each other is flat: it cannot score a method."""


def ceiling_of(effects: Effects, k: int) -> float | None:
    """The captured effect of the best k sites of one half of the truth on the other; None without halves."""
    truth = effects.log_probability
    if not effects.halves:
        return None
    if not bool((truth > 0).any()):
        return 0.0
    return captured_effect(truth, truth, k, effects.halves["log_probability"]).ceiling


def scored(scores: Tensor | None, effects: Effects, k: int) -> dict[str, Any]:
    """Captured effect, ceiling and precision of scores [L, S]; empty without scores or with a flat truth."""
    ceiling = ceiling_of(effects, k)
    if scores is None or (ceiling is not None and ceiling < CEILING):
        return {}
    halves = effects.halves.get("log_probability")
    captured = captured_effect(scores, effects.log_probability, k, halves)
    precision = agreement(scores, effects.log_probability, k).precision
    return {"captured": captured.share, "ceiling": captured.ceiling, "precision": precision}


def measured_only(scores: Tensor | None, counts: Tensor | None) -> Tensor | None:
    """Scores with the sites that were not measured last: they are never selected."""
    if scores is None or counts is None:
        return scores
    return scores.masked_fill(counts == 0, float(scores.min()) - 1)


def rankings(
    model: api.Model, task: str, seed: int, given: argparse.Namespace, after: int
) -> dict[str, tuple[Ranking, Tensor | None, Tensor | None, float]]:
    """Per method its ranking, scores of heads and neurons, and CPU seconds."""
    found = {}
    for name in given.methods:
        started = time.process_time()
        ranking = api.rank(
            model,
            f"scenes_{task}_discovery",
            limit=given.examples,
            offset=after + seed * given.examples,
            heads=HEADS,
            seed=seed,
            **METHODS[name],
        )
        seconds = time.process_time() - started
        heads = measured_only(ranking.head_scores, ranking.head_examples)
        neurons = measured_only(ranking.neuron_scores, ranking.neuron_examples)
        found[name] = (ranking, heads, neurons, seconds)
        if name == "atp":
            found[SIGNED] = (ranking, ranking.head_direction, ranking.neuron_direction, seconds)
    return found


def losses(
    model: api.Model,
    task: str,
    seed: int,
    tests: int,
    banks: dict[str, Any],
    *,
    first: int = 0,
    split: str = "",
) -> np.ndarray:
    """The gold answer's loss on examples of a split [examples, 1 + banks], as it is and under each bank."""
    examples = model.examples(f"scenes_{task}{split}", limit=tests, offset=first + seed * tests)
    pass_ = TargetLosses(model.replayer, [Fold(banks, range(tests))])
    with torch.inference_mode():
        rows = [pass_.measure(examples[index]).sums["losses"].numpy() for index in range(len(examples))]
    return np.stack(rows)


def areas(found: np.ndarray, names: Sequence[str], counts: Sequence[int], scores: Tensor) -> dict[str, Any]:
    """Per method the area under its masking curve, its drops, and a bootstrap interval over images."""
    rise = found[:, 1:] - found[:, :1]
    drawn = np.random.default_rng(0).integers(len(rise), size=(2000, len(rise)))
    result = {}
    for number, name in enumerate(names):
        own = rise[:, number * len(counts) : (number + 1) * len(counts)]
        mean = own.mean(0)
        by_count = dict(zip(counts, mean.tolist(), strict=True))
        area, drops = masking_area(scores, by_count.__getitem__, counts)
        # The area is linear in the drops: its value per image is the area of the image's own curve.
        places = np.log(counts)
        per_image = np.trapezoid(own, places, axis=1) / (places[-1] - places[0])
        low, high = np.quantile(per_image[drawn].mean(1), [0.025, 0.975])
        result[name] = {"area": area, "area_low": float(low), "area_high": float(high), "rises": drops}
    return result


def cell(model: api.Model, task: str, seed: int, given: argparse.Namespace, truth: Any) -> None:
    """Measure one task and seed, unless its file is there."""
    path = given.work / f"{task}-{seed}.json"
    if path.is_file():
        return
    about, effects = truth.report["tasks"][task], truth.effects[task]
    found = rankings(model, task, seed, given, about["examples"])
    k = neuron_count(effects["neurons"].log_probability, 0.01)
    rows = []
    for name, (_, heads, neurons, seconds) in found.items():
        row: dict[str, Any] = {"task": task, "seed": seed, "method": name, "seconds": seconds}
        row["gradients"] = name.startswith(GRADIENTS)
        row["heads"] = scored(heads, effects["heads_by_mean"], HEADS)
        row["neurons"] = scored(neurons, effects["neurons"], k)
        rows.append(row)
    counts = [neuron_count(effects["neurons"].log_probability, share) for share in SHARES]
    orders = {name: scores for name, (_, _, scores, _) in found.items() if scores is not None}
    orders["truth"] = effects["neurons"].log_probability
    some = next(iter(found.values()))[0]
    banks = {
        f"{name} {count}": scaled_neurons(some, top_neurons(scores, count), 0.0, {})
        for name, scores in orders.items()
        for count in counts
    }
    curves = areas(
        losses(model, task, seed, given.test, banks), list(orders), counts, effects["neurons"].metric
    )
    ceilings = {name: ceiling_of(effects[name], n) for name, n in (("neurons", k), ("heads_by_mean", HEADS))}
    write_json(
        path,
        {
            "task": task,
            "seed": seed,
            "examples": given.examples,
            "test": given.test,
            "truth_examples": about["examples"],
            "ceilings": ceilings,
            "rows": rows,
            "masking": curves,
        },
    )
    print(f"{task} seed {seed}: {sum(row['seconds'] for row in rows):.0f} s of ranking", flush=True)


def fault_cell(model: api.Model, task: str, seed: int, given: argparse.Namespace, truth: Any) -> None:
    """Plant a fault in one task, rank the damaged model, and repair it by each ranking's best 1 %."""
    path = given.work / f"fault-{task}-{seed}.json"
    if path.is_file():
        return
    after, effects = truth.report["tasks"][task]["examples"], truth.effects[task]["neurons"].log_probability
    planted = top_neurons(effects, neuron_count(effects, 0.01))
    discovery = {"seed": seed, "tests": given.examples, "first": after, "split": "_discovery"}
    some = api.rank(model, f"scenes_{task}_discovery", method="random", limit=1)
    undamaged = losses(model, task, seed, given.test, {})[:, 0].mean()
    with steer(model.model, scaled_neurons(some, planted, DAMP, {}), "fold"):
        found = rankings(model, task, seed, given, after)
        best = {name: top_neurons(scores, len(planted)) for name, (_, _, scores, _) in found.items()
                if scores is not None}  # fmt: skip
        best["the planted neurons"] = planted
        scaled = {
            (name, factor): scaled_neurons(some, bank, factor, {})
            for name, bank in best.items()
            for factor in FACTORS
        }
        chosen = losses(
            model, task, banks={str(key): steering for key, steering in scaled.items()}, **discovery
        ).mean(0)
        by_factor = dict(zip(scaled, chosen[1:], strict=True))
        factors = {name: min((by_factor[name, factor], factor) for factor in FACTORS)[1] for name in best}
        repaired = losses(
            model, task, seed, given.test, {name: scaled[name, factors[name]] for name in best}
        ).mean(0)
    lost = repaired[0] - undamaged
    rows = [
        {
            "method": name,
            "factor": factors[name],
            "recovered": float((repaired[0] - after_repair) / lost),
            "planted_found": len({*map(tuple, bank)} & {*map(tuple, planted)}),
        }
        for (name, bank), after_repair in zip(best.items(), repaired[1:], strict=True)
    ]
    about = {"task": task, "seed": seed, "planted": len(planted), "damp": DAMP}
    write_json(path, about | {"undamaged": undamaged, "damaged": repaired[0], "rows": rows})
    print(f"{task} seed {seed}: a fault that costs {lost:.3f} nats per token", flush=True)


def over_seeds(values: Sequence[float | None]) -> str:
    """The mean over seeds, with the smallest and the largest where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    ends = "" if len(known) == 1 else f" ({min(known):.2f}-{max(known):.2f})"
    return f"{sum(known) / len(known):.2f}{ends}"


def table(cells: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Captured effect of one kind of site: a row per method and the ceiling, a column per scored task."""
    rows = [row for found in cells for row in found["rows"] if row[kind]]
    names = list(dict.fromkeys(row["method"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    result = []
    for name in names:
        own = {task: [r for r in rows if (r["method"], r["task"]) == (name, task)] for task in tasks}
        line: dict[str, Any] = {"method": name}
        for task, some in own.items():
            line[task] = over_seeds([r[kind]["captured"] for r in some])
        line["mean"] = over_seeds(
            [np.mean([r[kind]["captured"] for r in some]) for some in own.values() if some]
        )
        line["precision, mean"] = f"{np.mean([r[kind]['precision'] for s in own.values() for r in s]):.2f}"
        line["gradients"] = "yes" if name.startswith(GRADIENTS) else "no"
        line["CPU s"] = f"{np.mean([r['seconds'] for s in own.values() for r in s]):.1f}"
        result.append(line)
    if result:
        tops = {task: [r[kind]["ceiling"] for r in rows if r["task"] == task][:1] for task in tasks}
        result.append(
            {"method": "ceiling (half of the truth)", **{t: over_seeds(v) for t, v in tops.items()}}
        )
    return [{key: line.get(key, "") for key in result[0]} for line in result]


def fault_table(faults: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The share of planted faults' losses that each ranking's best 1 % recover, per task, over all seeds."""
    lost: dict[str, list[float]] = {}
    for found in faults:
        lost.setdefault(found["task"], []).append(found["damaged"] - found["undamaged"])
    tasks = [task for task in TASKS if task in lost and np.mean(lost[task]) >= SMALLEST_FAULT]
    names = list(dict.fromkeys(row["method"] for found in faults for row in found["rows"]))
    rows = []
    for name in names:
        own = [(found, row) for found in faults for row in found["rows"] if row["method"] == name]
        line: dict[str, Any] = {"method": name}
        shares = []
        for task in tasks:
            parts = [
                (row["recovered"] * loss, loss)
                for found, row in own
                if found["task"] == task
                for loss in [found["damaged"] - found["undamaged"]]
            ]
            if parts:
                regained, whole = np.array(parts).sum(0)
                shares.append(regained / whole)
                line[task] = f"{shares[-1]:.2f}"
        line["mean"] = f"{np.mean(shares):.2f}"
        planted = np.mean([row["planted_found"] for _, row in own])
        line["planted among the best"] = f"{planted:.1f} of {faults[0]['planted']}"
        rows.append(line)
    rows.append({"method": "loss, nats per token", **{task: f"{np.mean(lost[task]):.3f}" for task in tasks}})
    return [{key: row.get(key, "") for key in rows[0]} for row in rows]


def area_table(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Masking areas: a row per method and a column per task, with an interval over all seeds' images."""
    names = list(dict.fromkeys(name for found in cells for name in found["masking"]))
    tasks = list(dict.fromkeys(found["task"] for found in cells))
    rows = []
    for name in names:
        line: dict[str, Any] = {"method": name}
        for task in tasks:
            own = [found["masking"][name] for found in cells
                   if found["task"] == task and name in found["masking"]]  # fmt: skip
            if not own:
                continue
            value = np.mean([one["area"] for one in own])
            # Seeds have images of their own, so the variances of their areas add up.
            half = np.sqrt(sum(((one["area_high"] - one["area_low"]) / 2) ** 2 for one in own)) / len(own)
            line[task] = f"{value:.2f} [{value - half:.2f}, {value + half:.2f}]"
        rows.append(line)
    return [{column: row.get(column, "") for column in ("method", *tasks)} for row in rows]


def task_rows(cells: Sequence[dict[str, Any]], truth: GroundTruth) -> list[dict[str, Any]]:
    """Per task the examples of its truth, and how well its halves agree about single sites."""

    def words(ceiling: float | None) -> str:
        if ceiling is None:
            return "unknown: measured without halves"
        return f"{ceiling:.2f}" + (": flat, not scored" if ceiling < CEILING else "")

    rows = []
    for task in TASKS:
        effects, about = truth.effects[task], truth.report["tasks"][task]
        k = neuron_count(effects["neurons"].log_probability, 0.01)
        rows.append(
            {
                "task": task,
                "images of the truth": about["examples"],
                "ceiling of neurons": words(ceiling_of(effects["neurons"], k)),
                "ceiling of heads": words(ceiling_of(effects["heads_by_mean"], HEADS)),
                "seeds done": sum(cell["task"] == task for cell in cells),
            }
        )
    return rows


def write(given: argparse.Namespace, truth: GroundTruth) -> None:
    """Write `captured.json`, `captured.csv` and `captured.md` of all cells that are done."""
    cells = [read_json(path) for path in given.work.glob("*.json") if not path.name.startswith("fault-")]
    faults = [read_json(path) for path in sorted(given.work.glob("fault-*.json"))]
    cells.sort(key=lambda found: (TASKS.index(found["task"]), found["seed"]))
    if not cells:
        return
    hours = sum(row["seconds"] for found in cells for row in found["rows"]) / 3600
    write_json(given.out / "captured.json", {"cells": cells, "faults": faults})
    lines = [
        {
            **{key: row[key] for key in ("task", "seed", "method", "seconds", "gradients")},
            **{
                f"{kind}_{name}": row[kind].get(name, "")
                for kind in ("heads", "neurons")
                for name in ("captured", "ceiling", "precision")
            },
            **{
                key: found["masking"].get(row["method"], {}).get(key, "")
                for key in ("area", "area_low", "area_high")
            },
        }
        for found in cells
        for row in found["rows"]
    ]
    write_text(given.out / "captured.csv", csv_table(lines))
    first = cells[0]
    parts = [
        "# How much of the true effects each ranking captures\n",
        "Made by `python benchmarks/captured_effect.py --out leaderboards/scenes/methods --work "
        f"runs/captured_effect`: {len(cells)} cells of task and seed, {hours:.2f} CPU hours of ranking. Each "
        f"seed ranks on its own {first['examples']} discovery images, which the truth did not use, and masks "
        f"on its own {first['test']} test images. Cells show the mean over seeds and the range.\n",
        "## The tasks\n",
        markdown_table(task_rows(cells, truth)),
        "## Neurons: captured effect of the best 1 %\n",
        markdown_table(table(cells, "neurons")),
        f"## Heads: captured effect of the best {HEADS}\n",
        markdown_table(table(cells, "heads")),
        "## Neurons: masking curve, 0.25 % to 10 % masked together\n",
        "The mean rise of the gold answer's loss (nats per token) over the curve, with a 95 % interval over "
        "images. `truth` masks the neurons with the largest single effects. Single effects do not add up, so "
        "a ranking may exceed it.\n",
        markdown_table(area_table(cells)),
    ]
    if faults:
        parts += [
            "## Neurons: what is recovered of a planted fault\n",
            f"`--faults`: the truth's best 1 % of the neurons are damped to {DAMP:g}, the damaged model is "
            "ranked, and the best 1 % of each ranking are multiplied by one factor "
            f"({', '.join(f'{factor:g}' for factor in FACTORS)}), which discovery images choose. The share "
            "of the loss that is recovered on the test images of all seeds; 1 is all of it. Tasks whose "
            f"fault costs less than {SMALLEST_FAULT:g} nats per token are left out.\n",
            markdown_table(fault_table(faults)),
        ]
    write_text(given.out / "captured.md", "\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/scenes/methods"))
    parser.add_argument("--work", type=Path, default=Path("runs/captured_effect"))
    parser.add_argument("--examples", type=int, default=32, help="to rank on, per seed")
    parser.add_argument("--test", type=int, default=40, help="to mask on, per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--faults", action="store_true", help="plant faults and rank the damaged model")
    parser.add_argument(
        "--truth", type=Path, default=None, help="a folder of toy.ground_truth; default: the stored"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    truth = load_ground_truth() if given.truth is None else load_ground_truth(given.truth)
    model = api.load("llava_hf", f"pretrained={checkpoint_path()}")
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for task in given.tasks:
            (fault_cell if given.faults else cell)(model, task, seed, given, truth)
            write(given, truth)


if __name__ == "__main__":
    main()
