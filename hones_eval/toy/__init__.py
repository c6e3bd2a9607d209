"""Drawn scenes with known ground truth, and a small vision-language model trained on them."""

import hashlib
from functools import cache
from pathlib import Path

from hones_eval.errors import HonesError

_FOLDER = Path(__file__).resolve().parent / "checkpoint"


class CheckpointError(HonesError):
    """The bundled checkpoint is missing or was modified."""


def checkpoint_path(folder: Path = _FOLDER) -> Path:
    """Return the folder of the toy model, a stock LLaVA checkpoint, after checking the hash of its weights.

    Raises:
        CheckpointError: the weights are missing or their SHA-256 is not the committed one.
    """
    weights, expected = folder / "model.safetensors", folder / "model.safetensors.sha256"
    for file in (weights, expected):
        if not file.is_file():
            raise CheckpointError(f"the bundled toy model has no {file}; reinstall hones-eval")
    wanted, found = (
        expected.read_text(encoding="utf-8").split()[0],
        _sha256(weights, weights.stat().st_mtime_ns),
    )
    if found != wanted:
        raise CheckpointError(
            f"{weights} has SHA-256 {found[:12]}..., not {wanted[:12]}...: it was modified or is incomplete; "
            "reinstall hones-eval, or load your own checkpoint by its path"
        )
    return folder


@cache
def _sha256(file: Path, modified: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
