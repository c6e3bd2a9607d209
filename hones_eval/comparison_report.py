"""What `hones-eval compare` writes: tables, figures, and the shared groups as rankings."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hones_eval import figures
from hones_eval.artefact import write_json, write_text
from hones_eval.comparison import Comparison, Crossing, group_name


def write(comparison: Comparison, crossings: Sequence[Crossing], out: Path) -> dict[str, Any]:
    """Write everything and return what `compare.json` holds."""
    report = comparison.report() | {"cross_task": [one._asdict() for one in crossings]}
    write_json(out / "compare.json", report)
    tables = _tables(report)
    for name, rows in tables.items():
        write_text(out / f"{name}.csv", csv_table(rows))
    titled = [
        f"## {name.replace('_', ' ').capitalize()}\n\n{markdown_table(rows)}" for name, rows in tables.items()
    ]
    write_text(out / "compare.md", "\n".join(titled))
    for names, bank in comparison.groups().items():
        if bank:
            comparison.group_ranking(names, bank).save(out / "groups" / _folder(names))
    _draw(comparison, report, out)
    return report


def _tables(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by table name; empty tables are left out."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for sites in ("neurons", "heads"):
        curves = report[f"{sites}_by_layer"]
        layers = range(len(next(iter(curves.values()), [])))
        tables[f"{sites}_by_layer"] = [
            {"layer": layer} | {name: counts[layer] for name, counts in curves.items()} for layer in layers
        ]
    tables["groups"] = [{"group": name, "neurons": size} for name, size in report["groups"].items()]
    tables["neuron_overlaps"] = list(report["neuron_overlaps"])
    tables["head_overlaps"] = list(report["head_overlaps"])
    tables["cross_task"] = [
        {
            **{key: one[key] for key in ("masked", "measured", "baseline", "metric")},
            **{f"drop_{key}": one["drop"].get(key) for key in ("value", "low", "high")},
            **{f"relative_drop_{key}": one["relative_drop"].get(key) for key in ("value", "low", "high")},
            "random_drop": one["random_drop"],
        }
        for one in report["cross_task"]
    ]
    return {name: rows for name, rows in tables.items() if rows}


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header; at least one row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; at least one row."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _folder(names: Sequence[str]) -> str:
    """A group's name without what a path cannot hold."""
    return group_name(names).replace("/", "_").replace(" ", "_")


def _draw(comparison: Comparison, report: Mapping[str, Any], out: Path) -> None:
    if report["neurons_by_layer"]:
        figures.save(figures.layer_curves(report["neurons_by_layer"]), out / "neurons_by_layer.png")
        figures.save(figures.bars(report["groups"], "neurons in exactly these"), out / "groups.png")
    for sites in ("neuron", "head"):
        found = report[f"{sites}_overlaps"]
        if found:
            names = list(report[f"{sites}s_by_layer"])
            values = _square(names, found)
            title = f"{sites}s: Jaccard index (upper right), by chance in the same layers (lower left)"
            figures.save(
                figures.matrix(values, names, names, title, "Jaccard"), out / f"{sites}_overlaps.png"
            )
    scores = {
        name: one.head_scores.double().numpy()
        for name, one in comparison.rankings.items()
        if one.head_scores is not None
    }
    if scores:
        figures.save(figures.heat_maps(scores, "head score"), out / "heads.png")
    if report["cross_task"]:
        _draw_crossings(report["cross_task"], out)


def _square(names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> figures.Floats:
    values = np.full((len(names), len(names)), np.nan)
    for one in found:
        i, j = names.index(one["first"]), names.index(one["second"])
        values[i, j], values[j, i] = one["jaccard"], one["chance_by_layer"]
    return values


def _draw_crossings(crossings: Sequence[Mapping[str, Any]], out: Path) -> None:
    rows = list(dict.fromkeys(one["masked"] for one in crossings))
    columns = list(dict.fromkeys(one["measured"] for one in crossings))
    values = np.full((len(rows), len(columns)), np.nan)
    for one in crossings:
        relative = one["relative_drop"]["value"]
        values[rows.index(one["masked"]), columns.index(one["measured"])] = (
            np.nan if relative is None else relative
        )
    title = "mask the neurons of (row), measure (column)"
    figures.save(figures.matrix(values, rows, columns, title, "relative drop"), out / "cross_task.png")
