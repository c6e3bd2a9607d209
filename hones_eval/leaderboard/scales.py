"""The scales of a steering, read without torch for drawing."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from hones_eval import limits
from hones_eval.core.files import is_regular, read_bounded, read_strict_json
from hones_eval.errors import HonesError
from hones_eval.leaderboard.identity import SteeringRef

HEADER_BYTES = 1 << 20  # of the JSON at the start of a safetensors file


@dataclass(frozen=True, eq=False)
class Scales:
    """`heads` `[L, H]` and the number of scaled neurons per layer `[L]`, at the strength of the run.

    `shifted` counts the heads and the neurons that are shifted.
    """

    heads: NDArray[np.float64]
    scaled_neurons: tuple[int, ...]
    shifted: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Entry:
    """How a safetensors header describes a matrix."""

    dtype: Literal["F32"]
    shape: tuple[
        Annotated[int, Field(strict=True, ge=1, le=limits.LAYERS)],
        Annotated[int, Field(strict=True, ge=1, le=limits.WIDTH)],
    ]
    data_offsets: tuple[
        Annotated[int, Field(strict=True, ge=0, le=limits.ARTIFACT_TENSOR_BYTES)],
        Annotated[int, Field(strict=True, ge=0, le=limits.ARTIFACT_TENSOR_BYTES)],
    ]


_ENTRY = TypeAdapter(_Entry)


def read_scales(steering: SteeringRef, logs: Path) -> Scales | str:
    """Read a steering's folder, found from the working directory or above the logs, or say why not."""
    folder = find_folder(steering, logs)
    if folder is None:
        return f"the folder {steering.path} was not found"
    header = read_header(folder)
    if steering.digest is not None and header.get("digest") != steering.digest:
        return f"the folder {steering.path} now holds a different steering from the one that ran"
    path = folder / "steering.safetensors"
    try:
        content = read_bounded(path, limits.ARTIFACT_TENSOR_BYTES)
        heads = _matrix(content, "head_scales").astype(np.float64)
        neurons = _matrix(content, "neuron_scales")
    except (HonesError, ValidationError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"{folder.name}/{path.name} does not hold float32 scales [L, H] and [L, I] ({reason})"
    scaled = 1 + steering.strength * (heads - 1) if math.isfinite(steering.strength) else heads * np.nan
    if not (np.isfinite(scaled).all() and np.isfinite(neurons).all()):
        return f"{folder.name}/{path.name} holds scales that are not finite at strength {steering.strength:g}"
    if scaled.size > limits.CHART_HEADS:
        return f"{scaled.size:,} heads are too many to draw (at most {limits.CHART_HEADS:,})"
    counts = tuple(int(count) for count in (neurons != 1).sum(axis=1))
    heads_shifted, neurons_shifted = (
        count if isinstance(count := header.get(f"shifted_{kind}"), int) else 0
        for kind in ("heads", "neurons")
    )
    return Scales(scaled, counts, (heads_shifted, neurons_shifted))


def _matrix(content: bytes, name: str) -> NDArray[np.float32]:
    """A float32 matrix of a safetensors file. Raises: ValueError or LookupError for anything else."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(HEADER_BYTES, len(content) - 8):
        raise ValueError("not a safetensors file")
    entry = _ENTRY.validate_python(json.loads(content[8 : 8 + size])[name])
    begin, end = entry.data_offsets
    if end - begin != 4 * math.prod(entry.shape) or 8 + size + end > len(content):
        raise ValueError(f"{name} has the wrong size")
    return np.frombuffer(content[8 + size + begin : 8 + size + end], dtype="<f4").reshape(entry.shape)


def find_folder(steering: SteeringRef, logs: Path) -> Path | None:
    """The steering's folder, looked up from the working directory and from each folder above the logs."""
    try:
        given = Path(steering.path).expanduser()
    except (RuntimeError, ValueError):  # a home folder of nobody
        return None
    starts = (Path(), *logs.parents)
    return next((s / given for s in starts if is_regular(s / given / "steering.json")), None)


def read_header(folder: Path) -> dict[str, object]:
    """The content of `steering.json`; empty if it cannot be read."""
    try:
        content = read_strict_json(folder / "steering.json", limits.ARTIFACT_JSON_BYTES)
    except HonesError:
        return {}
    return content if isinstance(content, dict) else {}
