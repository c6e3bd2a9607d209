"""The files of `hones-eval spike-in`: a report, a table and a figure of the recovered shares."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hones_eval.core.artifact import write_json, write_text
from hones_eval.core.figure import BLUE, GREY, ORANGE
from hones_eval.core.files import staged_folder
from hones_eval.reports import figures
from hones_eval.reports.comparison import markdown_table
from hones_eval.stats.verdicts import CORRECTIONS

Row = Mapping[str, Any]


def write(report: Mapping[str, Any], out: Path) -> None:
    """Write `spike_in.json`, `spike_in.md` and `spike_in.png`, whole or not at all."""
    with staged_folder(out, last=("spike_in.json",)) as folder:
        write_json(folder / "spike_in.json", report)
        write_text(folder / "spike_in.md", page(report))
        figures.save(figure(report), folder / "spike_in.png")


def lines(report: Mapping[str, Any]) -> list[str]:
    """The result in a few lines: the loss, each row's recovered share, the random controls."""
    found = [_loss(report)]
    for row in report["rows"]:
        found.append(f"{row['scales']}: recovered {share_text(row)}; gain {_gain(row)}, {row['verdict']}")
    found.append(_controls(report))
    return found


def headline(report: Mapping[str, Any]) -> str:
    """The largest recovered share, that of the exact repair aside, or that there is nothing to recover."""
    chosen = [row for row in report["rows"] if row["scales"] != "exact repair"]
    known = [row for row in chosen if row["recovered"]["value"] is not None]
    if not report["repairable"] or not known:
        return _loss(report)
    best = max(known, key=lambda row: row["recovered"]["value"])
    return (
        f"{best['scales']} recovers {best['recovered']['value']:.0%} of the planted loss: {best['verdict']}"
    )


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    tests = report["examples"]["test"]
    table = [
        {
            "scales": row["scales"],
            report["metric"]: f"{row['value']:.3f}",
            "gain over the damaged model [95 %]": _gain(row),
            "recovered share of the loss [95 %]": share_text(row),
            "verdict": _verdict(row),
            "smallest gain found with probability 0.8": _number(row["detectable"]),
            "scaled sites": row["scaled_sites"],
        }
        for row in report["rows"]
    ]
    parts = [
        "# Would this pipeline find a gain here, if there was one?\n",
        f"{len(report['planted'])} sites ({report['plant']}) of the model were multiplied by "
        f"{report['damp']:g}. {_loss(report)} Measured on {tests['count']} examples of {tests['task']}.\n",
        markdown_table(table),
        f"{_controls(report)} Verdicts of the table are corrected over its rows "
        f"({CORRECTIONS[report['settings'].get('correction', 'holm')]}).\n",
        "## Where the planted sites are in the rankings\n",
        markdown_table(_standings(report)),
    ]
    return "\n".join(parts)


def figure(report: Mapping[str, Any]) -> Figure:
    """The gain of every row with its interval, compared with the loss and with the random controls."""
    drawn = Figure(figsize=(7, 1.2 + 0.4 * len(report["rows"])), layout="constrained")
    axes = drawn.subplots()
    for place, row in enumerate(report["rows"]):
        color = BLUE if row["gain"] > 0 else ORANGE if row["gain"] < 0 else GREY
        axes.plot(row["gain"], place, "o", color=color)
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=1.5)
    controls = [row["gain"] for row in report["controls"]]
    axes.plot(controls, [-1] * len(controls), "|", color=GREY, markersize=10)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(report["undamaged"] - report["damaged"], color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(
        range(-1, len(report["rows"])), ["random sites", *(row["scales"] for row in report["rows"])]
    )
    axes.set_xlabel(f"gain of {report['metric']} over the damaged model (dashed: the undamaged one)")
    count = report["examples"]["test"]["count"]
    axes.set_title(f"Repair of a planted damage, {count} examples, 95 % intervals", fontsize=9)
    return drawn


def _loss(report: Mapping[str, Any]) -> str:
    values = f"{report['metric']} falls from {report['undamaged']:.3f} to {report['damaged']:.3f}"
    if report["repairable"]:
        return f"The damage is clear: {values}."
    return f"The damage is not clear ({values}), so there is nothing to recover: damp more, or other sites."


def _controls(report: Mapping[str, Any]) -> str:
    count, better = len(report["controls"]), report["controls_called_better"]
    text = (
        f"The same scales on random sites of the same layers: {better} of {count} are called better, each "
        "tested alone at p < 0.05."
    )
    # Reports of older versions have no pooled controls.
    pooled = [f"{row['scales']} {_gain(row)}, {row['verdict']}" for row in report.get("controls_pooled", [])]
    return f"{text} Pooled over their seeds: {'; '.join(pooled)}." if pooled else text


def _gain(row: Row) -> str:
    return f"{row['gain']:+.3f}{_interval(row)}"


def share_text(row: Row) -> str:
    """The recovered share of a row, with its interval where there is one."""
    share = row["recovered"]
    return "undefined" if share["value"] is None else f"{share['value']:.2f}{_interval(share, 2)}"


def _interval(ends: Mapping[str, Any], digits: int = 3) -> str:
    return "" if ends["low"] is None else f" [{ends['low']:.{digits}f}, {ends['high']:.{digits}f}]"


def _verdict(row: Row) -> str:
    return row["verdict"] if row["p_adjusted"] is None else f"{row['verdict']} (p = {row['p_adjusted']:.2g})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _standings(report: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    return [
        {
            "ranking of the model": name,
            "planted sites among the top as many": f"{found['found']} of {found['of']}",
            "median rank": f"{found['median_rank']} of {found['sites']}",
        }
        for name, found in report["planted_in_rankings"].items()
        if found is not None
    ]
