"""The scales of a steering, read without torch for drawing."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hones_eval.leaderboard.identity import SteeringRef


@dataclass(frozen=True, eq=False)
class Scales:
    """`heads` `[L, H]` and the number of scaled neurons per layer `[L]`, at the strength of the run."""

    heads: NDArray[np.float64]
    scaled_neurons: tuple[int, ...]


def read_scales(steering: SteeringRef, logs: Path) -> Scales | str:
    """Read a steering's folder, found from the working directory or above the logs, or say why not."""
    folder = find_folder(steering, logs)
    if folder is None:
        return f"the folder {steering.path} was not found"
    digest = read_header(folder).get("digest")
    if steering.digest is not None and digest != steering.digest:
        return f"the folder {steering.path} now holds a different steering from the one that ran"
    try:
        tensors = load_file(folder / "steering.safetensors")
        heads = np.asarray(tensors["head_scales"], dtype=np.float64)
        neurons = np.asarray(tensors["neuron_scales"], dtype=np.float64)
    except (OSError, SafetensorError, KeyError) as error:
        return f"{folder.name}/steering.safetensors cannot be read ({error})"
    if heads.ndim != 2 or neurons.ndim != 2 or not np.isfinite(heads).all():
        return f"{folder.name}/steering.safetensors does not hold scales [L, H] and [L, I]"
    counts = tuple(int(count) for count in (neurons != 1).sum(axis=1))
    return Scales(1 + steering.strength * (heads - 1), counts)


def find_folder(steering: SteeringRef, logs: Path) -> Path | None:
    """The steering's folder, looked up from the working directory and from each folder above the logs."""
    given = Path(steering.path).expanduser()
    for start in (Path(), *logs.parents):
        if (start / given / "steering.json").is_file():
            return start / given
    return None


def read_header(folder: Path) -> dict[str, object]:
    """The content of `steering.json`; empty if it cannot be read."""
    try:
        content = json.loads((folder / "steering.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
