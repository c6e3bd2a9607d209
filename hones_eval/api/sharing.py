"""Share steerings on the Hugging Face hub."""

import csv
import io
from pathlib import Path

from hones_eval import limits
from hones_eval.core.files import read_bounded, write_bytes
from hones_eval.core.hub import CARD, download
from hones_eval.core.lock import writes_to_out
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError


def push(
    steering: Path,
    repo_id: str,
    *,
    public: bool = False,
    board: Path | None = None,
    licence: str | None = None,
) -> str:
    """Upload a steering with a model card.

    Args:
        steering: the folder of the steering.
        repo_id: the hub repository, `org/name`.
        public: whether everybody can read a repository that is created.
        board: a folder that `leaderboard` wrote; its rows with this steering go into the card.
        licence: as the hub names licences, such as apache-2.0.

    Returns: the commit on the hub.
    Raises: HonesError when there is no steering, the board has no row with it, or the hub refuses it.
    """
    if not Path(steering).is_dir():
        raise HonesError(f"{steering} is no folder: give the folder of a steering")
    loaded = Steering.load(steering)
    rows = [] if board is None else board_rows(board, loaded)
    return loaded.push(repo_id, private=not public, rows=rows, licence=licence)


def board_rows(board: Path, steering: Steering) -> list[dict[str, str]]:
    """The rows of a board with a steering, by its digest. Raises: HonesError when there is none."""
    path = Path(board) / "leaderboard.csv"
    try:
        text = read_bounded(path, limits.ARTIFACT_JSON_BYTES).decode()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise HonesError(f"{path} is not a board: {error}") from None
    found = [row for row in rows if row.get("steering_digest") == steering.digest]
    if not found:
        raise HonesError(f"{path} has no row with this steering (digest {steering.digest[:12]})")
    return found


@writes_to_out
def pull(repo_id: str, *, out: Path, revision: str | None = None) -> Steering:
    """Download a steering and check it.

    Args:
        repo_id: the hub repository, `org/name` or `org/name@revision`.
        out: the folder to write it to, with its card.
        revision: a branch, tag or commit.

    Raises: HonesError when there is no such repository, or it holds no steering.
    """
    found = download(repo_id, revision)
    steering = Steering.load(found.repo_id, found.commit)
    steering.save(out)
    if (found.folder / CARD).is_file():
        write_bytes(Path(out) / CARD, (found.folder / CARD).read_bytes())
    return steering
