"""Heat maps as inline SVG, with one meaning of the colors: blue is more than neutral, orange is less."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from hones_eval.pages.text import shown_line

LEFT = 46  # left margin, for the axis and its name
WIDEST = 780  # of the cells, in pixels


def heat_map_svg(
    values: Sequence[Sequence[float | None]],
    *,
    row: str,
    column: str,
    name: str,
    label: Callable[[float], str],
    neutral: float = 0.0,
    largest: int = 26,
) -> Markup:
    """A matrix as inline SVG, last row on top: blue above `neutral`, orange below, faint at it.

    Args:
        values: `[rows][columns]`; None leaves a cell empty.
        row: the name of a row, such as `layer`.
        column: the name of a column, such as `head`.
        name: of the chart, for screen readers.
        label: a value as text, for the title of its cell.
        neutral: the value without a meaning.
        largest: the side of a cell in pixels where there are few columns.
    """
    rows, columns = len(values), max((len(line) for line in values), default=0)
    size = max(6, min(largest, WIDEST // max(columns, 1)))
    known = [abs(value - neutral) for line in values for value in line if value is not None]
    reach = max(known, default=0.0) or 1.0
    cells = []
    for place, line in enumerate(values):
        for at, value in enumerate(line):
            if value is None:
                continue
            side = "up" if value > neutral else "down" if value < neutral else "same"
            opacity = 1.0 if side == "same" else 0.2 + 0.8 * abs(value - neutral) / reach
            title = shown_line(f"{row} {place}, {column} {at}: {label(value)}")
            x, y = at * size + LEFT, (rows - 1 - place) * size
            cells.append(
                Markup(
                    '<rect class="{}" x="{}" y="{}" width="{}" height="{}" style="opacity:{:.2f}">'
                    "<title>{}</title></rect>"
                ).format(side, x, y, size - 1, size - 1, opacity, title)
            )
    width, height = columns * size + LEFT, rows * size
    parts = [*_ticks(rows, columns, size), *axis_names(column, row, width, height, height + 28), *cells]
    return svg("heads", name, width + 2, height + 32, parts)


def _ticks(rows: int, columns: int, size: int) -> list[Markup]:
    up, across = "{:.1f}", '<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
    beside = Markup(f'<text x="{LEFT - 6}" y="{up}" text-anchor="end">{{}}</text>')
    return [
        *(beside.format((rows - 1 - k) * size + size * 0.75, k) for k in ticks(rows)),
        *(Markup(across).format(k * size + LEFT + size / 2, rows * size + 13, k) for k in ticks(columns)),
    ]


def ticks(count: int) -> range:
    """At most 16 positions to label, from 0."""
    return range(0, count, max(1, -(-count // 16)))


def axis_names(across: str, up: str, right: int, height: int, bottom: int) -> list[Markup]:
    """The names of both axes of a chart."""
    middle = height / 2
    return [
        Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + right) / 2, bottom, shown_line(across)
        ),
        Markup(
            '<text class="axis" x="12" y="{0:.1f}" text-anchor="middle" transform="rotate(-90 12 {0:.1f})">'
            "{1}</text>"
        ).format(middle, shown_line(up)),
    ]


def svg(css: str, name: str, width: int, height: int, parts: Sequence[Markup]) -> Markup:
    """An SVG element with a name for screen readers."""
    return Markup(
        '<svg class="{0}" viewBox="0 0 {1} {2}" width="{1}" height="{2}" role="img" aria-label="{3}">'
        "{4}</svg>"
    ).format(css, width, height, shown_line(name), Markup("").join(parts))
