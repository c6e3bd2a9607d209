"""`hones-eval leaderboard`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_eval.commands.answer import Answer, show
from hones_eval.errors import HonesError

if TYPE_CHECKING:
    from hones_eval.leaderboard import Board, Row


def leaderboard(
    logs: list[Path],
    out: Path,
    include_path: Path | None = None,
    title: str = "Steering leaderboard",
    seed: int = 0,
    resamples: int = 9999,
    pages: int | None = None,
) -> Answer:
    """Compare steered with baseline runs, from the folders that lmms-eval wrote with --log_samples.

    Args:
        logs: any number of output folders of lmms-eval, baseline and steered.
        out: the folder to write index.html, comparisons/, leaderboard.csv, .md and .svg to.
        include_path: a folder with more task YAML files, needed to recompute their corpus metrics.
        title: title of the page.
        seed: random seed of the bootstrap and the tests.
        resamples: number of resamples of the bootstrap and of the tests.
        pages: how many comparisons get a page of their own, smallest p-value first; by default all.

    Example:
        hones-eval leaderboard runs/vqa/logs --out runs/vqa/board
    """
    from hones_eval.leaderboard import make_board

    board = make_board(
        logs, out, seed=seed, resamples=resamples, include_path=include_path, title=title, pages=pages
    )
    answer = answer_of(board, out)
    if not board.rows:
        show(answer)
        reason = next(iter(board.warnings), "no steered run was found")
        raise HonesError(f"no steered run could be compared with a baseline: {reason}")
    return answer


def answer_of(board: "Board", out: Path) -> Answer:
    """A table of the rows, and whether steering helped in one sentence."""
    lines = [f"warning: {warning}" for warning in board.warnings]
    lines += _table([_cells(row) for row in board.rows])
    lines.append(summary(board))
    lines.append(f"wrote {out / 'index.html'} and leaderboard.csv, .md and .svg")
    return Answer(
        lines, {"out": str(out), "answer": summary(board), "rows": [_data(row) for row in board.rows]}
    )


def summary(board: "Board") -> str:
    """Whether steering helped: counts of verdicts, and how small a difference could have been missed."""
    counts = dict.fromkeys(("better", "worse", "no clear difference", "not judged"), 0)
    for row in board.rows:
        counts[row.verdict] += 1
    if not board.rows:
        return "There is nothing to compare."
    helped = "Yes" if counts["better"] and not counts["worse"] else "In part" if counts["better"] else "No"
    text = f"Did it help? {helped}: {counts['better']} better, {counts['worse']} worse, "
    text += f"{counts['no clear difference']} unclear, {counts['not judged']} not judged"
    missed = [found for row in board.rows if (found := detectable(row)) is not None]
    if missed and not counts["better"]:
        low, high = min(missed), max(missed)
        size = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
        text += (
            f"; differences below about {size} would mostly have been missed (80 % power, before correction)"
        )
    return f"{text}."


def detectable(row: "Row") -> float | None:
    """The difference that a test of this size finds in 4 of 5 cases, from the width of the 95 % interval.

    A 95 % interval is 2 * 1.96 standard errors wide; 80 % power needs a difference of 1.96 + 0.84 of them.
    """
    interval = row.comparison.interval
    if interval is None or interval.low is None or interval.high is None or interval.high <= interval.low:
        return None
    return (interval.high - interval.low) / (2 * 1.96) * (1.96 + 0.84)


def _cells(row: "Row") -> list[str]:
    steering = row.pair.steered.steering
    label = steering.label if steering else "steered"
    interval = row.comparison.interval
    ends = "" if interval is None else f"[{interval.low:+.3f}, {interval.high:+.3f}]"
    values = (f"{row.baseline:.4g}", f"{row.steered:.4g}", f"{row.comparison.difference:+.3f}", ends)
    return [row.pair.steered.task, row.metric.name, label, *values, row.verdict]


HEADER = ["task", "metric", "steering", "baseline", "steered", "difference", "95 % interval", "verdict"]


def _table(rows: list[list[str]]) -> list[str]:
    """Rows as text columns of equal width."""
    if not rows:
        return []
    printable = [["".join(c if c.isprintable() else "?" for c in cell)[:48] for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(HEADER, *printable, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (HEADER, *printable)
    ]


def _data(row: "Row") -> dict[str, Any]:
    interval = row.comparison.interval
    return {
        "task": row.pair.steered.task,
        "metric": row.metric.name,
        "steering": row.pair.steered.steering.label if row.pair.steered.steering else None,
        "baseline": row.baseline,
        "steered": row.steered,
        "difference": row.comparison.difference,
        "interval": None if interval is None else [interval.low, interval.high],
        "p_holm": row.p_holm,
        "verdict": row.verdict,
    }
