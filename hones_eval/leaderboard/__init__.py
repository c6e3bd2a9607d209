"""Boards from lmms-eval output folders: did steering help, with paired statistics, as tables and pages."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hones_eval.choices import Correction, ImagesShown
from hones_eval.core.files import staged_folder, write_bytes, write_text
from hones_eval.core.lock import writes_to_out
from hones_eval.errors import HonesError
from hones_eval.leaderboard.board import Board, build_board
from hones_eval.leaderboard.example_images import FOLDER, MOST, ExampleImages
from hones_eval.leaderboard.lmms_tasks import TaskImages
from hones_eval.leaderboard.pages import comparison_pages, index_page
from hones_eval.leaderboard.readme_image import readme_image
from hones_eval.leaderboard.rows import Row
from hones_eval.leaderboard.tables import csv_table, markdown_table
from hones_eval.leaderboard.views import row_views, with_pages

__all__ = ["Board", "Row", "build_board", "make_board"]
MADE_BY_US = '<meta name="generator" content="hones-eval'


@writes_to_out
def make_board(
    logs: Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    resamples: int = 9999,
    include_path: Path | None = None,
    images: bool = True,
    title: str = "Steering leaderboard",
    pages: int | None = None,
    correction: Correction = "holm",
    show: ImagesShown = "full",
) -> Board:
    """Read lmms-eval output folders and write a board into `out`.

    Args:
        logs: output folders of lmms-eval, at any depth, or single results files.
        out: where `index.html`, `comparisons/*.html`, `leaderboard.csv`, `.md` and `.svg` go.
        seed: of every random number; the same logs and seed give the same files.
        resamples: of each bootstrap and each randomization test.
        include_path: a folder of lmms-eval tasks, as lmms-eval's `--include_path`; needed to compute corpus
            metrics of such tasks again.
        images: also show images that are not in the samples but in the task's data set, if it is on this
            machine.
        title: of the page.
        pages: how many comparisons get a page, those with the smallest p-values first; None for all.
        correction: of p-values over the board: `holm` bounds the chance of any false verdict,
            `benjamini_hochberg` the share of false verdicts among all verdicts.
        show: thumbnails that open the image itself, a file in `comparisons/images` (full), thumbnails alone
            (small), or no images (none).

    Returns: the board, with `written` and `warnings`.
    Raises: HonesError when a path does not exist, no results are found, or `pages` is negative; nothing is
        written then.
    """
    if pages is not None and pages < 0:
        raise HonesError(
            f"pages={pages} is negative: give the number of comparisons that get a page, 0 for none"
        )
    board = build_board(
        logs, seed=seed, resamples=resamples, include_path=include_path, correction=correction
    )
    views = row_views(board, with_pages(board.rows, pages))
    written: list[Path] = []

    def write(name: str, text: str) -> None:
        write_text(folder / name, text)
        written.append(out / name)

    def save(name: str, content: bytes) -> None:
        write_bytes(folder / "comparisons" / name, content)

    example_images = ExampleImages(
        TaskImages(include_path) if images else None,
        save if show == "full" else None,
        most=0 if show == "none" else MOST,
    )
    with staged_folder(out, last=("index.html",), stale=_old_pages) as folder:
        for name, page in comparison_pages(board, views, example_images):
            write(f"comparisons/{name}", page)
        write("leaderboard.csv", csv_table(board, views))
        write("leaderboard.md", markdown_table(board, views))
        write("leaderboard.svg", readme_image(board, views))
        write("index.html", index_page(board, views, title))
    return replace(board, written=tuple(reversed(written)))


def _old_pages(out: Path) -> Iterator[Path]:
    """Comparison pages and images that an earlier board has made; other files are left alone."""
    for path in sorted((out / "comparisons" / FOLDER).glob("*.jpg")):
        if re.fullmatch(r"[0-9a-f]{20}", path.stem):
            yield path
    for path in sorted((out / "comparisons").glob("*.html")):
        if MADE_BY_US in path.read_text(encoding="utf-8", errors="replace")[:2000]:
            yield path
