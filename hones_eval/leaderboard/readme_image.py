"""The board as one SVG image for a README."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

from hones_eval.leaderboard.board import Board
from hones_eval.leaderboard.rows import Row
from hones_eval.leaderboard.text import number, one_line, probability
from hones_eval.leaderboard.views import clearest_first

MOST = 24  # rows shown
STYLE = """
text { font: 13px system-ui, 'DejaVu Sans', sans-serif; fill: #1c1e21 }
.ci text { font-size: 9px; fill: #60656d }
.soft { fill: #60656d; font-size: 12px } .page { fill: #fff }
.zero { stroke: #9da3ab; stroke-dasharray: 2 2 } .span { stroke: #60656d; stroke-width: 2 }
.dot { fill: #60656d }
.better .span { stroke: #0b6e99 } .better .dot { fill: #0b6e99 }
.worse .span { stroke: #a8580a } .worse .dot { fill: #a8580a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e7e9 } .soft, .ci text { fill: #9da3ab } .page { fill: #15171a }
  .better .span { stroke: #5cb8dd } .better .dot { fill: #5cb8dd }
  .worse .span { stroke: #e0a05a } .worse .dot { fill: #e0a05a }
}
"""


def readme_image(board: Board, views: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the rows with the smallest p-values: names, differences and intervals, for light and dark."""
    chosen = [(board.rows[place], views[place]) for place in clearest_first(board.rows)[:MOST]]
    height = 34 * len(chosen) + 76
    parts = [_line(row, view, 34 * k + 44) for k, (row, view) in enumerate(chosen)]
    rest = len(board.rows) - len(chosen)
    last = "95 % intervals, each on the scale of its metric; dashed line: no change, to the right: better"
    last += f"; {rest} more rows on the board" if rest > 0 else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" width="860" height="{height}" '
        f'role="img"><title>Leaderboard</title><style>{STYLE}</style>'
        f'<rect class="page" width="860" height="{height}" rx="10"/>'
        '<text class="soft" x="24" y="26">Steering, task and metric</text>'
        '<text class="soft" x="836" y="26" text-anchor="end">Difference from the baseline</text>'
        f"{''.join(parts)}"
        f'<text class="soft" x="24" y="{height - 12}">{escape(last)}</text></svg>\n'
    )


def _line(row: Row, view: Mapping[str, Any], top: int) -> str:
    svg = (
        str(view["svg"])
        .replace("<circle ", '<circle class="dot" ')
        .replace("<svg ", f'<svg x="520" y="{top}" ')
    )
    p = probability(row.p_adjusted).removeprefix("0").replace("<0", "<")
    name = escape(one_line(view["steering"], 44) + (" (control)" if view["control"] else ""))
    where = escape(one_line(f"{view['task']} · {view['metric']}", 56))
    return (
        f'<text x="24" y="{top + 8}">{name}</text>'
        f'<text class="soft" x="24" y="{top + 23}">{where}</text>{svg}'
        f'<text x="836" y="{top + 16}" text-anchor="end">{number(row.comparison.difference, sign=True)}'
        f"{escape(f', p {p}' if p else '')}</text>"
    )
