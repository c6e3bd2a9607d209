"""`hones-eval leaderboard`."""

from pathlib import Path

from hones_eval.commands.shared import say
from hones_eval.leaderboard import make_board


def leaderboard(logs: list[Path], out: Path, seed: int = 0, resamples: int = 9999) -> None:
    """Compare steered with baseline runs, from the folders that lmms-eval wrote with --log_samples.

    Args:
        logs: output folders of lmms-eval, baseline and steered, any number of them.
        out: the folder to write leaderboard.csv, leaderboard.md and index.html to.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    board = make_board(logs, out, seed=seed, resamples=resamples)
    for warning in board.warnings:
        say(f"warning: {warning}")
    say(f"wrote {out / 'index.html'}, {out / 'leaderboard.csv'} and {out / 'leaderboard.md'}")
