"""The page of one command's result: its answer as a headline, figures, tables, and how it was made."""

import base64
import csv
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hones_eval.core.files import is_regular, write_text
from hones_eval.limits import IMAGE_BYTES
from hones_eval.pages.drawing import heat_map_svg
from hones_eval.pages.parts import HeatMap, Table
from hones_eval.pages.rendering import render
from hones_eval.pages.text import shown_line

PAGE = "index.html"
TITLES = {
    "verify": "Loss by masking the selected sites, and random ones (a dot per random bank)",
    "layers": "Effect of putting clean activations back, by layer",
    "means": "The answer and the entropy, by layer",
    "gains": "Gain by steering, with 95 % intervals",
    "side_effects": "Gain of each task by scales that were chosen for another one",
    "spike_in": "Gain over the damaged model, with 95 % intervals",
    "neurons_by_layer": "Selected neurons by layer",
    "groups": "Neurons that exactly these rankings share",
    "neuron_overlaps": "Overlap of the selected neurons",
    "head_overlaps": "Overlap of the selected heads",
    "heads": "Scores of all heads",
    "heads_positive": "Positive scores of all heads",
    "heads_negative": "Negative scores of all heads",
    "leaderboard": "Differences from the baseline, with 95 % intervals",
    "cross_task": "Loss of one task by masking the neurons of another",
}
"""Titles of figures and tables by the names of their files; the others are named after their file."""
MOST_ROWS, MOST_FIGURES, MOST_TABLES = 500, 30, 12  # on one page


def write_run_page(
    out: Path,
    *,
    command: str,
    made_by: str,
    lines: Sequence[str],
    headline: str,
    settings: Mapping[str, Any],
    tables: Sequence[Table] = (),
    charts: Sequence[HeatMap] = (),
    parts: Sequence[str] = (),
) -> Path:
    """Write `out/index.html` about the files in `out`.

    Figures (PNG, SVG) and tables (CSV) that the command wrote into the folder are shown, up to the limits of
    this module. The page names neither the folder nor the time, so that the same work gives the same bytes.

    Args:
        out: the folder of the command's result.
        command: the command's name.
        made_by: the command line.
        lines: the answer; those that begin with `warning: ` are marked.
        headline: the answer in one sentence.
        settings: the flags with their values, without those that do not change the result.
        tables: shown before the CSV files.
        charts: shown before the figure files.
        parts: names of subfolders with a page of their own.
    """
    shown = [table for table in tables if table.rows]
    views = [_view(table.title, table.rows, None) for table in shown]
    for path in sorted(out.glob("*.csv"))[:MOST_TABLES]:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if rows:
            views.append(_view(_title(path), rows, path.name))
    drawn = sorted([*out.glob("*"), *out.glob("figures/*")])
    figures = [path for path in drawn if path.suffix in (".png", ".svg")][:MOST_FIGURES]
    page = render(
        "hones_eval.pages",
        "run.html",
        "run.js",
        command=command,
        made_by=shown_line(made_by),
        headline=shown_line(headline[:1].upper() + headline[1:]),
        warnings=[shown_line(line) for line in lines if line.startswith("warning: ")],
        lines=[shown_line(line) for line in lines if not line.startswith("warning: ")],
        charts=[chart_view(chart) for chart in charts],
        figures=figure_views(figures, out),
        tables=views,
        parts=[{"name": shown_line(name), "href": f"{quote(name)}/{PAGE}"} for name in parts],
        inputs=_inputs(settings, out),
        files=sorted(
            path.name
            for path in out.iterdir()
            if path.is_file() and path.name[0] != "." and path.name != PAGE
        ),
        settings=[(name, shown_line(value)) for name, value in settings.items() if value is not None],
    )
    write_text(out / PAGE, page)
    return out / PAGE


def chart_view(chart: HeatMap) -> dict[str, Any]:
    """A heat map with its title, which says what the colors mean."""
    numbers = [value for row in chart.values for value in row if value is not None]
    middle = f"{chart.neutral:g}"
    below = min(numbers, default=chart.neutral) < chart.neutral
    colors = f"blue above {middle}, orange below" if below else f"the darker, the further above {middle}"
    axes = f"{chart.column} across, {chart.row} up; {colors}; {_ends(numbers)}"
    title = shown_line(f"{chart.title} ({axes})")
    drawn = heat_map_svg(
        chart.values,
        row=chart.row,
        column=chart.column,
        name=chart.title,
        label=(lambda value: f"{value:+.4g}") if chart.neutral == 0 else "× {:.4g}".format,
        neutral=chart.neutral,
    )
    return {"title": title, "svg": drawn}


def _ends(numbers: Sequence[float]) -> str:
    return f"from {min(numbers):.3g} to {max(numbers):.3g}" if numbers else "no values"


def figure_views(paths: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Figure files as data URIs, with links to the files; those over the size limit are left out."""
    return [
        {
            "title": _title(path),
            "uri": _uri(path),
            "href": quote(path.relative_to(out).as_posix()),
            "wide": path.suffix == ".svg",
        }
        for path in paths
        if _fits(path)
    ]


def _view(title: str, rows: Sequence[Mapping[str, Any]], file: str | None) -> dict[str, Any]:
    names = list(rows[0])
    numeric = {
        name: any(_number(row.get(name)) is not None for row in rows)
        and all(_number(row.get(name)) is not None for row in rows if row.get(name) not in (None, ""))
        for name in names
    }
    cells = [[_cell(row.get(name), numeric[name]) for name in names] for row in rows[:MOST_ROWS]]
    return {
        "title": shown_line(title),
        "name": "".join(c if c.isalnum() else "_" for c in title.lower()),
        "file": file,
        "left": max(0, len(rows) - MOST_ROWS),
        "columns": [{"name": shown_line(name), "numeric": numeric[name]} for name in names],
        "rows": cells,
    }


def _cell(value: Any, numeric: bool) -> dict[str, Any]:
    number = _number(value) if numeric else None
    if number is None:
        return {"text": shown_line(value), "numeric": False, "value": ""}
    return {"text": _figures(number), "numeric": True, "value": f"{number:.12g}"}


def _figures(number: float) -> str:
    """A number with four figures, and whole numbers, such as those of neurons, with all of them."""
    return str(int(number)) if number.is_integer() and abs(number) < 1e12 else f"{number:.4g}"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _title(path: Path) -> str:
    return TITLES.get(path.stem) or re.sub(r"_|(?<=[a-z])(?=\d)", " ", path.stem).capitalize()


def _fits(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= IMAGE_BYTES


def _uri(path: Path) -> str:
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _inputs(settings: Mapping[str, Any], out: Path) -> list[dict[str, str]]:
    """Links to the pages of the results that this one was made from."""
    found = []
    for value in settings.values():
        for folder in value if isinstance(value, list) else [value]:
            if isinstance(folder, str | Path) and folder and Path(folder) != out:
                page = Path(folder) / PAGE
                if is_regular(page):
                    found.append({"name": shown_line(page.parent.name), "href": relative_link(page, out)})
    return found


def relative_link(page: Path, out: Path) -> str:
    """The address of a page, seen from a page in the folder `out`."""
    return quote(Path(os.path.relpath(page, out)).as_posix())
