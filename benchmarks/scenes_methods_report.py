"""Tables and figures of `scenes_methods.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hones_eval.core.artifact import read_json, write_json, write_text
from hones_eval.core.figure import GREY, KINDS
from hones_eval.core.sites import Neuron, top_neurons
from hones_eval.jobs.compare import by_layer
from hones_eval.jobs.verify import Measured
from hones_eval.reports import figures
from hones_eval.reports.comparison import csv_table, markdown_table
from hones_eval.toy.yardstick import agreement

if TYPE_CHECKING:
    from scenes_methods import Task

METHODS = ("hones", "dvp", "write_norm", "activation", "entropy", "random")
SIZES = ("0.25%", "0.50%", "1.00%", "2.00%", "5.00%")
COLUMNS = 4  # of panels
Rows = list[dict[str, Any]]


def task_report(
    task: "Task", banks: Mapping[str, Sequence[Neuron]], measured: Measured, metric_name: str
) -> dict[str, Any]:
    """One task's agreement of every score with the truth, drops of every bank, and paired differences."""
    layers = task.truth.metric.shape[0]
    count = len(banks["hones 1.00%"])
    agreed = []
    for name, scores in task.scores.items():
        row: dict[str, Any] = {"task": task.name, "scores": name}
        for what in ("answer", "metric"):
            truth = getattr(task.truth, what)
            if truth.min() == truth.max():  # masking no single neuron changes the metric
                row |= {f"precision_{what}": None, f"spearman_{what}": None}
                continue
            found = agreement(scores, truth, count)
            row |= {f"precision_{what}": found.precision, f"spearman_{what}": found.rank_correlation}
        agreed.append(row | {"top_by_layer": by_layer(top_neurons(scores, count), layers)})
    masked = [
        {"task": task.name, "bank": name, "neurons": len(bank), "by_layer": by_layer(bank, layers)}
        | flat("drop", measured.drops(name)["metric_drop"])
        for name, bank in banks.items()
    ]
    pairs = [(f"{name} {size}", f"hones {size}") for size in SIZES for name in METHODS[1:]]
    pairs += [("dvp, numbers of hones", "hones 1.00%"), ("dvp 1.00%", "hones, numbers of dvp")]
    pairs += [(f"dvp, {how}", f"hones, {how}") for how in ("no last layer", "alike in all layers")]
    pairs += [(name, "hones 1.00%") for name in banks if name.startswith("hones,") and "layer" not in name]
    metric = measured.values["metric"]
    differing = []
    for other, one in pairs:
        first, second = measured.names.index(one), measured.names.index(other)
        # Masking lowers the metric: the one that lowers it more has found more.
        found = metric.estimate(lambda v, a=first, b=second: measured.sign * (v[..., b] - v[..., a]))
        differing.append({"task": task.name, "bank": one, "minus": other} | flat("drop", found.to_json()))
    about = {"metric": metric_name, "baseline": float(metric.observed[0])}
    parts = {"agreement": agreed, "masking": masked, "differences": differing, "ranks": ranks(task)}
    return {"task": task.name, **about, **parts}


def ranks(task: "Task", count: int = 3) -> Rows:
    """The neurons that cost most when masked alone, and the place, from 1, that each method gives them."""
    width = task.truth.metric.shape[1]
    places = {
        name: task.scores[name].flatten().argsort(descending=True, stable=True).argsort() for name in METHODS
    }
    return [
        {
            "task": task.name,
            "neuron": f"layer {neuron.layer}, {neuron.neuron}",
            "answer lost": float(task.truth.answer[neuron]),
            "metric lost": float(task.truth.metric[neuron]),
        }
        | {name: int(place[neuron.layer * width + neuron.neuron]) + 1 for name, place in places.items()}
        for neuron in top_neurons(task.truth.answer, count)
    ]


def flat(name: str, estimate: Mapping[str, Any]) -> dict[str, Any]:
    return {name: estimate["value"], f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}


def known(out: Path) -> dict[str, dict[str, Any]]:
    """The reports by task that lie in a folder already."""
    path = out / "methods.json"
    return read_json(path) if path.is_file() else {}


def write(reports: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write `methods.json`, four CSV tables, `methods.md` and two figures."""
    write_json(out / "methods.json", {report["task"]: report for report in reports})
    for name in ("agreement", "masking", "differences", "ranks"):
        write_text(out / f"{name}.csv", csv_table([row for report in reports for row in report[name]]))
    write_text(out / "methods.md", page(reports))
    figures.save(curves(reports), out / "bank_sizes.png")
    figures.save(layers_figure(reports), out / "layers.png")


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    base = ", ".join(f"{report['task']} {report['metric']} {report['baseline']:.3f}" for report in reports)
    parts = [
        "# Rankings of neurons beside the ground truth\n",
        f"Unedited: {base}. Intervals are 95 %, paired, over images.\n",
        "## Agreement with masking every neuron alone\n",
        "Share of a ranking's top 1 % that is in the top 1 % of the truth (0.01 by chance) / Spearman's "
        "correlation over all neurons. The truth is what the answer loses: the target's log-probability, for "
        "retrieval the right candidate's lead, its margin minus the mean of the others'. `agreement.csv` has "
        "the same by the task's metric, which most single neurons leave as it is.\n",
        markdown_table(agreement_table(reports)),
        "## What masking the top 1 % costs\n",
        markdown_table(drop_table(reports, [f"{name} 1.00%" for name in (*METHODS, "truth")])),
        markdown_table(random_table(reports)),
        "## HONES minus another ranking: difference of those drops\n",
        markdown_table(difference_table(reports, [(f"{m} 1.00%", "hones 1.00%") for m in METHODS[1:]])),
        "## Bank sizes: HONES minus projection without heads (dvp)\n",
        markdown_table(difference_table(reports, [(f"dvp {size}", f"hones {size}") for size in SIZES])),
        "## Layers, with as many neurons\n",
        markdown_table(drop_table(reports, layer_banks())),
        "## Heads: what HONES conditions on\n",
        markdown_table(drop_table(reports, ["hones 1.00%", *head_banks(reports[0])])),
        "## The neurons that cost most alone, and their place in each ranking of 2,064\n",
        markdown_table([row for report in reports for row in report["ranks"]]),
        "## Where each ranking's top 1 % is: neurons in layers 0 to 5\n",
        markdown_table(where_table(reports)),
    ]
    return "\n".join(parts)


def layer_banks() -> list[str]:
    names = [
        f"{m}, {how}" for how in ("no last layer", "alike in all layers") for m in ("hones", "dvp", "truth")
    ]
    return [*names, "hones, numbers of dvp", "dvp, numbers of hones", "truth, numbers of hones"]


def head_banks(report: Mapping[str, Any]) -> list[str]:
    return [
        row["bank"] for row in report["masking"] if row["bank"].startswith("hones,") and "head" in row["bank"]
    ]


def agreement_table(reports: Sequence[Mapping[str, Any]]) -> Rows:
    names = [row["scores"] for row in reports[0]["agreement"] if row["scores"] != "truth"]
    cell = "{precision_answer:.2f} / {spearman_answer:+.2f}"
    return table(reports, "agreement", "scores", names, lambda row: cell.format(**row))


def drop_table(reports: Sequence[Mapping[str, Any]], banks: Sequence[str]) -> Rows:
    return table(reports, "masking", "bank", banks, with_interval)


def where_table(reports: Sequence[Mapping[str, Any]]) -> Rows:
    names = [row["scores"] for row in reports[0]["agreement"]]
    return table(
        reports, "agreement", "scores", names, lambda row: " ".join(str(n) for n in row["top_by_layer"])
    )


def table(reports: Sequence[Mapping[str, Any]], part: str, key: str, names: Sequence[str], cell: Any) -> Rows:
    rows: Rows = []
    for name in names:
        found = {report["task"]: row for report in reports for row in report[part] if row[key] == name}
        rows.append({key: name.replace(" 1.00%", "")} | {task: cell(row) for task, row in found.items()})
    return rows


def random_table(reports: Sequence[Mapping[str, Any]]) -> Rows:
    """Random banks with as many neurons in each layer: mean, and the largest."""
    rows: Rows = []
    for like in ("hones", "dvp"):
        row: dict[str, Any] = {"random banks, mean (largest)": f"layers as {like}"}
        for report in reports:
            drops = [r["drop"] for r in report["masking"] if r["bank"].startswith(f"random like {like}")]
            row[report["task"]] = f"{np.mean(drops):.3f} ({max(drops):.3f})"
        rows.append(row)
    return rows


def difference_table(reports: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> Rows:
    rows: Rows = []
    for other, one in pairs:
        row: dict[str, Any] = {"difference": f"{one} - {other}"}
        for report in reports:
            (found,) = (d for d in report["differences"] if (d["bank"], d["minus"]) == (one, other))
            row[report["task"]] = with_interval(found)
        rows.append(row)
    return rows


def with_interval(row: Mapping[str, Any]) -> str:
    if row["drop_low"] is None:
        return f"{row['drop']:.3f}"
    return f"{row['drop']:.3f} [{row['drop_low']:.3f}, {row['drop_high']:.3f}]"


def panels(figure: Figure, count: int, **shared: bool) -> list[Axes]:
    """`count` panels in two rows; places that are left over stay empty."""
    every = figure.subplots(2, COLUMNS, **shared).flatten()
    for axes in every[count:]:
        axes.set_axis_off()
    for axes in every[count - COLUMNS : count]:
        axes.tick_params(labelbottom=True)
    return list(every[:count])


def curves(reports: Sequence[Mapping[str, Any]]) -> Figure:
    """Drop by share of neurons masked, a panel a task and a line a ranking, with intervals."""
    figure = Figure(figsize=(13.0, 5.6), layout="constrained")
    every = panels(figure, len(reports), sharex=True)
    sizes = [float(size.rstrip("%")) for size in SIZES]
    colours = dict(zip(("truth", *METHODS), ("black", *KINDS[1:6], GREY), strict=True))
    for axes, report in zip(every, reports, strict=True):
        known = {row["bank"]: row for row in report["masking"]}
        for number, (name, colour) in enumerate(colours.items()):
            rows = [known[f"{name} {size}"] for size in SIZES]
            places = [size * 1.03 ** (number - 3) for size in sizes]
            style = "--" if name == "truth" else "-"
            drawn = {"color": colour, "linewidth": 1.1, "marker": "o", "markersize": 3}
            axes.plot(places, [row["drop"] for row in rows], style, label=name, **drawn)
            for place, row in zip(places, rows, strict=True):
                if row["drop_low"] is not None:
                    axes.plot([place] * 2, [row["drop_low"], row["drop_high"]], color=colour, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_title(
            f"{report['task']} ({report['metric']}, unedited {report['baseline']:.2f})", fontsize=9
        )
    for axes in every[-COLUMNS:]:
        axes.set_xlabel("neurons masked, % of all")
    for axes in every[::COLUMNS]:
        axes.set_ylabel("drop")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def layers_figure(reports: Sequence[Mapping[str, Any]]) -> Figure:
    """Where the top 1 % of HONES, of projection without heads and of the truth are, a panel a task."""
    figure = Figure(figsize=(12.0, 4.8), layout="constrained")
    every = panels(figure, len(reports), sharex=True, sharey=True)
    shown = {"truth": "black", "hones": KINDS[1], "dvp": KINDS[2]}
    for axes, report in zip(every, reports, strict=True):
        known = {row["scores"]: row["top_by_layer"] for row in report["agreement"]}
        for number, (name, colour) in enumerate(shown.items()):
            total = sum(known[name])
            places = np.arange(len(known[name])) + 0.27 * (number - 1)
            axes.bar(places, [n / total for n in known[name]], 0.26, color=colour, label=name)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(report["task"], fontsize=9)
    for axes in every[-COLUMNS:]:
        axes.set_xlabel("layer")
    for axes in every[::COLUMNS]:
        axes.set_ylabel("of the top 1 %")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure
