"""`hones-eval leaderboard`."""

from pathlib import Path
from typing import TYPE_CHECKING

from hones_eval.choices import Correction, ImagesShown
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
    correction: Correction = "holm",
    images: ImagesShown = "full",
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
        correction: of p-values over the rows of the board: holm, or benjamini_hochberg for the false
            discovery rate.
        images: full shows thumbnails that open the image itself, small thumbnails alone, none no images. Only
            images in the logs, or that a run's manifest recorded, are ever shown.

    Example:
        hones-eval leaderboard runs/vqa/logs --out runs/vqa/board
    """
    from hones_eval.leaderboard import make_board

    board = make_board(
        logs,
        out,
        seed=seed,
        resamples=resamples,
        include_path=include_path,
        images=images != "none",
        title=title,
        pages=pages,
        correction=correction,
        show=images,
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
    lines.append(board.answer)
    lines.append(f"wrote {out / 'index.html'} and leaderboard.csv, .md and .svg")
    pooled = [row.record() for row in board.pooled]
    data = {"out": str(out), "answer": board.answer, "rows": board.records(), "pooled": pooled}
    return Answer(lines, data)


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
