"""Boards of a good pair of runs and a damaged one: the good row stays, and no private image is published."""

import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from commands import remove, write_pair
from hostile import HOSTILE, media, random_change
from make_logs import shape
from sandbox import child

from hones_eval.leaderboard import make_board


def boards(count: int, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The cases: every named damage, then random ones."""
    private = folder / "private.png"
    folder.mkdir(parents=True, exist_ok=True)
    shape("red", 1).save(private)
    names = list(HOSTILE)

    def case(k: int) -> str:
        place = folder / f"logs-{k}"
        remove(place)
        write_pair(place / "logs" / "good")
        write_pair(place / "logs" / "bad", "tiny/other")
        bad = place / "logs" / "bad"
        media([str(private)])(bad)
        kept = list(bad.rglob("*030405*"))
        for path in kept:
            path.rename(path.with_name(path.name.replace(".json", ".kept")))  # the baseline stays whole
        if k % 7:  # the others try to publish a private image and nothing else
            (HOSTILE[names[k]] if k < len(names) else random_change(k))(bad)
        for path in kept:
            path.with_name(path.name.replace(".json", ".kept")).rename(path)
        board = make_board([place / "logs"], place / "board", resamples=99)
        good = [row for row in board.rows if row.pair.steered.base.name == "tiny/llava"]
        pages = "".join(
            p.read_text() for p in (place / "board").rglob("*") if p.suffix in (".html", ".md", ".csv")
        )
        files = list((place / "board").rglob("*.jpg"))
        remove(place)
        if len(good) != 1:
            return "wrong: the good row is missing"
        return (
            "wrong: a private image in a page"
            if "data:image/jpeg" in pages or files
            else "the good row was there"
        )

    for k in range(count):
        yield f"logs {k}", lambda k=k: child(lambda: quiet_errors(lambda: case(k))).result


def quiet_errors(work: Callable[[], str]) -> str:
    """The result of `work`; damage that the harness itself cannot apply twice counts as not applicable."""
    try:
        return work()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        inside = traceback.extract_tb(error.__traceback__)
        if all("hones_eval" not in frame.filename or "torture" in frame.filename for frame in inside):
            return "not applicable"
        raise
