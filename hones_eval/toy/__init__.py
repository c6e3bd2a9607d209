"""Scenes on which every claim can be checked, and a small VLM that really sees them."""

import hashlib
from functools import cache
from pathlib import Path

from hones_eval.errors import HonesError

_FOLDER = Path(__file__).resolve().parent / "checkpoint"


class CheckpointError(HonesError):
    """The shipped checkpoint is missing or is not the one that was committed."""


def checkpoint_path(folder: Path = _FOLDER) -> Path:
    """The folder of the small VLM, a stock LLaVA checkpoint, after comparing its weights with their hash.

    Raises:
        CheckpointError: the weights are missing or their SHA-256 is not the committed one.
    """
    weights, expected = folder / "model.safetensors", folder / "model.safetensors.sha256"
    for file in (weights, expected):
        if not file.is_file():
            raise CheckpointError(f"the small VLM lacks {file}; install hones-eval again")
    wanted, found = (
        expected.read_text(encoding="utf-8").split()[0],
        _sha256(weights, weights.stat().st_mtime_ns),
    )
    if found != wanted:
        raise CheckpointError(
            f"{weights} has SHA-256 {found[:12]}..., not {wanted[:12]}...: it was changed or cut; "
            "install hones-eval again, or load your own checkpoint by its path"
        )
    return folder


@cache
def _sha256(file: Path, modified: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
