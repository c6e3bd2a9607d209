"""`hones-eval leaderboard`."""

from pathlib import Path

from hones_eval.commands.shared import say
from hones_eval.leaderboard import make_board


def leaderboard(
    logs: list[Path],
    out: Path,
    include_path: Path | None = None,
    title: str = "Steering leaderboard",
    seed: int = 0,
    resamples: int = 9999,
    pages: int | None = None,
) -> None:
    """Compare steered with baseline runs, from the folders that lmms-eval wrote with --log_samples.

    Args:
        logs: any number of output folders of lmms-eval, baseline and steered.
        out: the folder to write index.html, comparisons/, leaderboard.csv, .md and .svg to.
        include_path: a folder with more task YAML files, needed to recompute their corpus metrics.
        title: title of the page.
        seed: random seed of the bootstrap and the tests.
        resamples: number of resamples of the bootstrap and of the tests.
        pages: how many comparisons get a page of their own, smallest p-value first; default: all.
    """
    board = make_board(
        logs, out, seed=seed, resamples=resamples, include_path=include_path, title=title, pages=pages
    )
    for warning in board.warnings:
        say(f"warning: {warning}")
    say(f"wrote {out / 'index.html'} and leaderboard.csv, .md and .svg")
