"""The files of `hones-eval study`: the paper's table, side effects, and a comparison of the methods."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hones_eval.choices import Correction
from hones_eval.core.artifact import write_json, write_text
from hones_eval.core.files import staged_folder
from hones_eval.jobs.study import WAYS
from hones_eval.reports import figures
from hones_eval.reports.comparison import csv_table, markdown_table, short_names
from hones_eval.stats.verdicts import CORRECTIONS

Row = Mapping[str, Any]
VERDICTS = ("better", "worse", "no clear difference", "too few")


def write(report: Mapping[str, Any], out: Path) -> None:
    """Write `study.json`, `steering.csv`, `attribution.csv`, `study.md`, and figures of the gains.

    `study.json` appears last. Rankings and steerings that the folder holds stay.
    """
    with staged_folder(out, last=("study.json",)) as folder:
        write_json(folder / "study.json", report)
        write_text(folder / "steering.csv", csv_table(report["steering"]))
        write_text(folder / "attribution.csv", csv_table(report["attribution"]))
        write_text(folder / "study.md", _page(report))
        _draw(report, folder)


def _page(report: Mapping[str, Any]) -> str:
    steering, tasks = report["steering"], list(report["examples"])
    own = [row for row in steering if row["chosen_for"] == row["measured_on"]]
    others = [row for row in steering if row["chosen_for"] != row["measured_on"]]
    sizes = ", ".join(f"{name} {size['test']}" for name, size in report["examples"].items())
    parts = [
        "# Does scaling the neurons of a task help it?\n",
        f"Neurons chosen on discovery, scales on development, measured on test ({sizes} examples); intervals "
        "are 95 %, paired, over images. A gain is positive where steering helped.\n",
    ]
    parts += [f"- {note}\n" for note in report.get("notes", [])]
    has_shifted = any(row["split"] == "shifted" for row in own)
    for split, title in (("test", "In distribution" if has_shifted else "Test"), ("shifted", "Shifted")):
        rows = [row for row in own if row["split"] == split]
        if rows:
            parts += [
                f"## {title}\n",
                markdown_table(_by_way(rows, tasks)),
                _conclusion(rows, report.get("correction", "holm")),
            ]
    parts += ["## How far the scales are from 1\n", markdown_table(_moves(own, tasks))]
    if others:
        parts += [
            "## Side effects: chosen for one task, measured on the others\n",
            markdown_table(_side_effects(others)),
        ]
    parts += [
        "## Methods: what masking each one's top neurons costs\n",
        markdown_table(_masking(report["attribution"])),
    ]
    return "\n".join(parts)


def _by_way(rows: Sequence[Row], tasks: Sequence[str]) -> list[dict[str, str]]:
    """The paper's table: a row for the model as it is and for every way, a column per task."""
    base = {row["measured_on"]: row for row in rows}
    found = [{"scales": "base"} | {task: f"{base[task]['baseline']:.3f}" for task in tasks if task in base}]
    for how in WAYS:
        cells = {row["measured_on"]: _gain(row) for row in rows if row["how"] == how}
        found.append({"scales": how} | {task: cells[task] for task in tasks if task in cells})
    return found


def _gain(row: Row) -> str:
    interval = "" if row["gain_low"] is None else f" [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
    return f"{row['steered']:.3f} ({row['gain']:+.3f}{interval})"


def _conclusion(rows: Sequence[Row], correction: Correction) -> str:
    lines = []
    for how in WAYS:
        verdicts = [row["verdict"] for row in rows if row["how"] == how]
        counts = ", ".join(f"{kind} on {verdicts.count(kind)}" for kind in VERDICTS if kind in verdicts)
        lines.append(f"- {how}: {counts} of {len(verdicts)} tasks")
    least = [row["detectable"] for row in rows if row["detectable"] is not None]
    if least:
        lines.append(
            f"- Power: the smallest gain found with probability 0.8 is {min(least):.3f} to {max(least):.3f}, "
            "depending on the row."
        )
    else:
        lines.append("- Power: with so few examples no gain would be found with probability 0.8.")
    title = f"Verdicts, corrected over the whole table ({CORRECTIONS[correction]}):\n\n"
    return title + "\n".join(lines) + "\n"


def _moves(rows: Sequence[Row], tasks: Sequence[str]) -> list[dict[str, str]]:
    """The largest change of a scale from 1: a way that changes nothing cannot help."""
    largest = {(row["how"], row["chosen_for"]): row["largest_change_of_a_scale"] for row in rows}
    return [{"scales": how} | {task: f"{largest[how, task]:.2g}" for task in tasks} for how in WAYS]


def _side_effects(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = []
    for how in WAYS:
        mine = [row for row in rows if row["how"] == how]
        worst = min(mine, key=lambda row: row["gain"])
        verdicts = [row["verdict"] for row in mine]
        found.append(
            {
                "scales": how,
                "pairs": len(mine),
                "better": verdicts.count("better"),
                "worse": verdicts.count("worse"),
                "mean gain": sum(row["gain"] for row in mine) / len(mine),
                "worst": f"{worst['chosen_for']} on {worst['measured_on']}: {worst['gain']:+.3f}",
            }
        )
    return found


def _masking(rows: Sequence[Row]) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        interval = "" if row["drop_low"] is None else f" [{row['drop_low']:.3f}, {row['drop_high']:.3f}]"
        cell = f"{row['drop']:.3f}{interval}; {row['in_last_layer']}/{row['neurons']} in the last layer"
        found.setdefault(row["method"], {"method": row["method"]})[row["task"]] = cell
    return list(found.values())


def _draw(report: Mapping[str, Any], out: Path) -> None:
    tasks = short_names(list(report["examples"]))
    panels: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    effects = {how: np.full((len(tasks), len(tasks)), np.nan) for how in WAYS}
    for row in report["steering"]:
        source, measured = list(tasks).index(row["chosen_for"]), list(tasks).index(row["measured_on"])
        if row["split"] == "test":
            effects[row["how"]][source, measured] = row["gain"]
        if source == measured:
            title = row["split"]
            dot = {"value": row["gain"], "low": row["gain_low"], "high": row["gain_high"]}
            panels.setdefault(title, {}).setdefault(tasks[row["measured_on"]], {})[row["how"]] = dot
    figures.save(figures.gains(panels, "gain by steering"), out / "gains.png")
    names = list(tasks.values())
    drawn = figures.matrices(effects, names, names, "gain of the column by scales chosen for the row")
    figures.save(drawn, out / "side_effects.png")
