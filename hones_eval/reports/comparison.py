"""The files of `hones-eval compare`: tables, figures, and the shared groups as rankings."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hones_eval.core.artifact import write_json, write_text
from hones_eval.core.files import matching, staged_folder
from hones_eval.jobs.compare import Comparison, Crossing, group_name
from hones_eval.jobs.compare_levels import Sharing
from hones_eval.reports import figures

OWN = (
    *("*_by_layer.csv", "*_by_layer.png", "*_overlaps.csv", "*_overlaps.png", "groups.csv", "groups.png"),
    *("levels.csv", "cross_task.csv", "cross_task.png", "heads.png", "heads_positive.png"),
    *("heads_negative.png", "groups/*/ranking.json", "groups/*/ranking.safetensors"),
)
"""Patterns of the files of a comparison; those of an earlier one in the same folder are deleted."""


def write(
    comparison: Comparison, crossings: Sequence[Crossing], levels: Sequence[Sharing], out: Path
) -> dict[str, Any]:
    """Write everything, whole or not at all, and return what `compare.json` holds."""
    with staged_folder(out, last=("compare.json",), stale=matching(*OWN)) as folder:
        return _write(comparison, crossings, levels, folder)


def _write(
    comparison: Comparison, crossings: Sequence[Crossing], levels: Sequence[Sharing], out: Path
) -> dict[str, Any]:
    report = comparison.report() | {
        "levels": [level._asdict() for level in levels],
        "cross_task": [crossing._asdict() for crossing in crossings],
    }
    write_json(out / "compare.json", report)
    tables = _tables(report)
    for name, rows in tables.items():
        write_text(out / f"{name}.csv", csv_table(rows))
    titled = [
        f"## {name.replace('_', ' ').capitalize()}\n\n{markdown_table(rows)}"
        for name, rows in _shown(tables).items()
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
    tables["not_measured"] = list(report["not_measured"])
    tables["levels"] = list(report["levels"])
    tables["cross_task"] = [
        {
            **{key: crossing[key] for key in ("masked", "measured", "baseline", "metric")},
            **{f"drop_{key}": crossing["drop"].get(key) for key in ("value", "low", "high")},
            **{
                f"relative_drop_{key}": crossing["relative_drop"].get(key) for key in ("value", "low", "high")
            },
            "random_drop": crossing["random_drop"],
        }
        for crossing in report["cross_task"]
    ]
    return {name: rows for name, rows in tables.items() if rows}


def _shown(tables: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The tables for people: of the groups, which double with every ranking, those that have members."""
    groups = tables.get("groups", [])
    members = [row for row in groups if row["neurons"]]
    empty = {"group": f"({len(groups) - len(members)} other combinations)", "neurons": 0}
    return {**tables, "groups": [*members, empty]} if groups else dict(tables)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the words, between underscores, that all of them begin or end with."""
    parts = [name.split("_") for name in names]
    first, last = _common(parts), _common([part[::-1] for part in parts])
    if any(first + last >= len(part) for part in parts):
        last = 0
    return {name: "_".join(part[first : len(part) - last]) for name, part in zip(names, parts, strict=True)}


def _common(parts: Sequence[Sequence[str]]) -> int:
    """The number of first words that all names share, leaving each at least one word."""
    count = 0
    while len({*map(tuple, parts)}) > 1 and all(part[count + 1 :] for part in parts):
        if len({part[count] for part in parts}) > 1:
            break
        count += 1
    return count


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
    if isinstance(value, float):
        return f"{0.0 if abs(value) < 1e-12 else value:.3g}"  # what rounding leaves of a zero
    return str(value).replace("|", "\\|")


def _folder(names: Sequence[str]) -> str:
    """A group's name without what a path cannot hold."""
    return group_name(names).replace("/", "_").replace(" ", "_")


def _draw(comparison: Comparison, report: Mapping[str, Any], out: Path) -> None:
    short = short_names(list(comparison.rankings))
    if report["neurons_by_layer"]:
        curves = {_short(name, short): counts for name, counts in report["neurons_by_layer"].items()}
        figures.save(figures.layer_curves(curves), out / "neurons_by_layer.png")
        members = {names: len(bank) for names, bank in comparison.groups().items() if bank}
        sizes = {group_name([_short(name, short) for name in names]): size for names, size in members.items()}
        figures.save(figures.bars(sizes, "neurons in exactly these"), out / "groups.png")
    for sites in ("neuron", "head"):
        found = report[f"{sites}_overlaps"]
        if found:
            names = list(report[f"{sites}s_by_layer"])
            values = _square(names, found)
            title = f"Overlap of {sites}s: upper right measured, lower left by chance in the same layers"
            labels = [_short(name, short) for name in names]
            drawn = figures.matrix(values, labels, labels, title, "Jaccard index, 0 to 1")
            figures.save(drawn, out / f"{sites}_overlaps.png")
    for field, label in (
        ("head_scores", "head score"),
        ("head_positive", "positive score"),
        ("head_negative", "negative score"),
    ):
        every = {short[name]: getattr(ranking, field) for name, ranking in comparison.rankings.items()}
        scores = {name: score.double().numpy() for name, score in every.items() if score is not None}
        if scores:
            name = "heads" if field == "head_scores" else field.replace("head_", "heads_")
            figures.save(figures.heat_maps(scores, label), out / f"{name}.png")
    if report["cross_task"]:
        _draw_crossings(report["cross_task"], short, out)


def _short(name: str, short: Mapping[str, str]) -> str:
    """A bank's short name; heads that help and heads that hurt have a sign after their ranking's."""
    ranking = name if name in short else name[:-2]
    return short[ranking] + name[len(ranking) :]


def _square(names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> figures.Floats:
    values = np.full((len(names), len(names)), np.nan)
    for overlap in found:
        i, j = names.index(overlap["first"]), names.index(overlap["second"])
        values[i, j], values[j, i] = overlap["jaccard"], overlap["chance_by_layer"]
    return values


def _draw_crossings(crossings: Sequence[Mapping[str, Any]], short: Mapping[str, str], out: Path) -> None:
    rows = list(dict.fromkeys(crossing["masked"] for crossing in crossings))
    columns = list(dict.fromkeys(crossing["measured"] for crossing in crossings))
    values = np.full((len(rows), len(columns)), np.nan)
    for crossing in crossings:
        relative = crossing["relative_drop"]["value"]
        values[rows.index(crossing["masked"]), columns.index(crossing["measured"])] = (
            np.nan if relative is None else relative
        )
    title = "Relative loss of the column's task by masking the neurons of the row's"
    labels = [_short(name, short) for name in rows], list(short_names(columns).values())
    drawn = figures.matrix(values, *labels, title, "relative loss of the metric", loss=True)
    figures.save(drawn, out / "cross_task.png")
