"""Tables for notebooks: pandas where it is installed, and HTML with everything escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hones_eval.errors import HonesError, printable


def data_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as a pandas.DataFrame. Raises: HonesError where pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise HonesError("to_pandas needs pandas: pip install pandas") from None
    return pandas.DataFrame(list(rows))


def html_table(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """Rows as an HTML table that any notebook shows; every text is escaped and printable."""
    columns = list(rows[0]) if rows else []
    head = "".join(f"<th>{safe(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{safe(_shown(row[name]))}</td>" for name in columns) + "</tr>" for row in rows
    )
    title = f"<caption>{safe(caption)}</caption>"
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def safe(text: Any) -> str:
    """Text as HTML: without markup, and with control and direction marks spelled out."""
    return escape(printable(str(text)))


def heat_map(values: Any, rows: str, columns: str, label: str, title: str) -> Any:
    """A matplotlib.figure.Figure of a matrix, blue above zero and orange below, with zero in white.

    Where nothing is below zero, the scale begins at zero.
    """
    from hones_eval.core.figure import ShownFigure, colors_of

    figure = ShownFigure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, **colors_of(values), origin="lower", aspect="auto")
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def interval_plot(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A matplotlib.figure.Figure of differences with their intervals, by task, metric and steering.

    Args:
        rows: mappings with `task`, `metric`, `steering`, `difference`, `interval` and `gain`, which is the
            difference, positive where it is better, or None where no direction is better.
        title: the finding, in a sentence.
    """
    from textwrap import fill

    from hones_eval.core.figure import BLUE, GREY, ORANGE, ShownFigure

    figure = ShownFigure(figsize=(7, 1.3 + 0.4 * max(len(rows), 1)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        gain = row["gain"] or 0.0
        color = BLUE if gain > 0 else ORANGE if gain < 0 else GREY
        low, high = row["interval"] or (row["difference"], row["difference"])
        axes.plot([low, high], [place, place], color=color)
        axes.plot([row["difference"]], [place], "o", color=color)
    axes.axvline(0, color="#666666", linewidth=0.8)
    axes.set_yticks(
        range(len(rows)),
        [f"{row['task']}, {row['metric']}\n{row['steering'] or 'steered'}" for row in rows],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlabel("steered minus baseline, 95 % interval")
    figure.suptitle(fill(title, 90), fontsize=9)
    return figure


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
