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
        logs: output folders of lmms-eval, baseline and steered, any number of them.
        out: the folder to write index.html, comparisons/, leaderboard.csv, .md and .svg to.
        include_path: a folder with more task YAML files, to compute their corpus metrics again.
        title: of the page.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        pages: how many comparisons get a page of their own, the clearest first; all by default.
    """
    board = make_board(
        logs, out, seed=seed, resamples=resamples, include_path=include_path, title=title, pages=pages
    )
    for warning in board.warnings:
        say(f"warning: {warning}")
    say(f"wrote {out / 'index.html'}, with leaderboard.csv, .md and .svg beside it")
