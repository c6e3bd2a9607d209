"""The page of one command's result: its answer as a headline, figures, tables, and how it was made."""

import base64
import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hones_eval.core.files import write_text
from hones_eval.errors import printable
from hones_eval.limits import IMAGE_BYTES
from hones_eval.pages.parts import HeatMap, Table
from hones_eval.pages.rendering import render

PAGE = "index.html"
MOST_ROWS, MOST_FIGURES, MOST_TABLES = 500, 30, 12  # on one page
LONGEST = 2000  # characters of a text


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
        made_by=_text(made_by),
        headline=_text(headline),
        warnings=[_text(line) for line in lines if line.startswith("warning: ")],
        lines=[_text(line) for line in lines if not line.startswith("warning: ")],
        charts=[_chart(chart) for chart in charts],
        figures=[{"title": _title(path), "uri": _uri(path)} for path in figures if _fits(path)],
        tables=views,
        inputs=_inputs(settings, out),
        files=sorted(
            path.name
            for path in out.iterdir()
            if path.is_file() and path.name[0] != "." and path.name != PAGE
        ),
        settings=[(name, _text(value)) for name, value in settings.items() if value is not None],
    )
    write_text(out / PAGE, page)
    return out / PAGE


def _chart(chart: HeatMap) -> dict[str, Any]:
    numbers = [abs(value) for row in chart.values for value in row if value is not None]
    largest = max(numbers, default=0.0)
    axes = f"{chart.column} across, {chart.row} up; blue above zero, orange below; largest {largest:.3g}"
    return {"title": _text(f"{chart.title} ({axes})"), "svg": heat_map(chart)}


def heat_map(chart: HeatMap) -> Markup:
    """A matrix as inline SVG, last row on top: blue above zero, orange below, zero faint.

    Only numbers and the escaped names of the axes enter the markup.
    """
    rows, columns = len(chart.values), max((len(row) for row in chart.values), default=0)
    size = max(6, min(26, 900 // max(columns, 1)))
    numbers = [value for row in chart.values for value in row if value is not None]
    reach = max((abs(value) for value in numbers), default=0.0) or 1.0
    cells = []
    for place, row in enumerate(chart.values):
        y = (rows - 1 - place) * size
        for column, value in enumerate(row):
            if value is None:
                continue
            color = "var(--accent)" if value > 0 else "var(--warn)"
            opacity = 0.08 + 0.92 * abs(value) / reach
            name = _text(f"{chart.row} {place}, {chart.column} {column}: {value:+.4g}")
            cells.append(
                Markup(
                    '<rect x="{}" y="{}" width="{}" height="{}" style="fill:{};opacity:{:.3f}">'
                    "<title>{}</title></rect>"
                ).format(column * size + 46, y, size - 1, size - 1, color, opacity, name)
            )
    step = max(1, rows // 16)
    labels = [
        Markup('<text x="40" y="{}" text-anchor="end">{}</text>').format(
            (rows - 1 - place) * size + size * 0.75, place
        )
        for place in range(0, rows, step)
    ]
    labels += [
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            column * size + 46 + size / 2, rows * size + 14, column
        )
        for column in range(0, columns, max(1, columns // 16))
    ]
    width, height = columns * size + 60, rows * size + 20
    return Markup(
        '<svg class="chart" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" '
        'aria-label="{2}">{3}</svg>'
    ).format(width, height, _text(chart.title), Markup("").join([*cells, *labels]))


def _view(title: str, rows: Sequence[Mapping[str, Any]], file: str | None) -> dict[str, Any]:
    names = list(rows[0])
    numeric = {
        name: any(_number(row.get(name)) is not None for row in rows)
        and all(_number(row.get(name)) is not None for row in rows if row.get(name) not in (None, ""))
        for name in names
    }
    cells = [[_cell(row.get(name), numeric[name]) for name in names] for row in rows[:MOST_ROWS]]
    return {
        "title": _text(title),
        "name": "".join(c if c.isalnum() else "_" for c in title.lower()),
        "file": file,
        "left": max(0, len(rows) - MOST_ROWS),
        "columns": [{"name": _text(name), "numeric": numeric[name]} for name in names],
        "rows": cells,
    }


def _cell(value: Any, numeric: bool) -> dict[str, Any]:
    number = _number(value) if numeric else None
    if number is None:
        return {"text": _text(value), "numeric": False, "value": ""}
    return {"text": f"{number:.4g}", "numeric": True, "value": f"{number:.9g}"}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]} …")


def _title(path: Path) -> str:
    return path.stem.replace("_", " ").capitalize()


def _fits(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= IMAGE_BYTES


def _uri(path: Path) -> str:
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _inputs(settings: Mapping[str, Any], out: Path) -> list[dict[str, str]]:
    """Links to the pages of the results that this one was made from."""
    found = []
    for value in settings.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str | Path) and one and (Path(one) / PAGE).is_file() and Path(one) != out:
                page = Path(os.path.relpath(Path(one) / PAGE, out))
                found.append({"name": Path(one).name, "href": page.as_posix()})
    return found
