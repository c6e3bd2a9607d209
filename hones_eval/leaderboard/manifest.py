"""The run manifest that our lmms-eval wrappers write beside the results: what lmms-eval does not record."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from hones_eval.errors import HonesError
from hones_eval.leaderboard.identity import SteeringRef
from hones_eval.leaderboard.text import path_name

FORMAT = "hones-eval run manifest"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Shown:
    """What one example put before the model: a hash of prompt and pictures, and the hash of each picture."""

    content: int
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """One process's record of one run of lmms-eval; `results` names the results file, if one was written."""

    path: Path
    base_name: str
    base_revision: str | None
    wrapper: str
    base_wrapper: str
    steering: SteeringRef | None
    requests: Mapping[str, Mapping[int, Shown]]
    errors: tuple[tuple[str, str], ...]
    versions: Mapping[str, str]
    created: datetime
    rank: int
    results: str | None

    def errors_of(self, task: str) -> list[str]:
        """What generation raised for a task; errors without a task count for all."""
        return [text for name, text in self.errors if name in (task, "")]


def read_manifest(path: Path) -> Manifest:
    """Read one `hones_manifest_*.json`.

    Raises: HonesError when the file is not JSON, not a manifest, of another version, or misses a field.
    """
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise HonesError(f"{path_name(path)} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise HonesError(f"{path_name(path)} is not a run manifest: its 'format' is not {FORMAT!r}")
    if content.get("format_version") != FORMAT_VERSION:
        raise HonesError(
            f"{path_name(path)} has manifest format {content.get('format_version')}, not {FORMAT_VERSION}"
        )
    try:
        return _manifest(path, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HonesError(
            f"{path_name(path)} misses or misnames a field of a run manifest: {error!r}"
        ) from None


def _manifest(path: Path, content: Mapping[str, Any]) -> Manifest:
    steering = content["steering"]
    versions = ("package_version", "lmms_eval_version", "torch_version", "transformers_version")
    created = datetime.fromisoformat(content["created"])
    return Manifest(
        path=path,
        base_name=str(content["base_model"]["id"]),
        base_revision=content["base_model"].get("revision"),
        wrapper=str(content["wrapper"]),
        base_wrapper=str(content["base_wrapper"]),
        steering=None if steering is None else _steering(steering),
        requests={str(task): _requests(listed) for task, listed in content["requests"].items()},
        errors=tuple((str(one.get("task") or ""), _error_text(one)) for one in content["errors"]),
        versions={name: str(content[name]) for name in versions if name in content},
        created=created if created.tzinfo else created.replace(tzinfo=UTC),
        rank=int(content.get("rank", 0)),
        results=content.get("results"),
    )


def _steering(content: Mapping[str, Any]) -> SteeringRef:
    return SteeringRef(
        path=str(content["path"]),
        digest=str(content["digest"]),
        strength=float(content["strength"]),
        attach=str(content["attach"]),
        provenance=dict(content.get("provenance") or {}),
    )


def _requests(listed: Mapping[str, Mapping[str, Any]]) -> dict[int, Shown]:
    return {
        int(doc_id): _shown(str(one["prompt_sha256"]), tuple(map(str, one["image_sha256"])))
        for doc_id, one in listed.items()
    }


@lru_cache(maxsize=1 << 17)  # a thousand runs of one task share their examples: keep each once
def _shown(prompt: str, pictures: tuple[str, ...]) -> Shown:
    return Shown(hash((prompt, pictures)), pictures)


def _error_text(one: Mapping[str, Any]) -> str:
    return f"doc_id {one.get('doc_id')}: {one.get('error')}"
