"""The files that lmms-eval and our wrappers leave in an output folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hones_eval.errors import HonesError

RESULTS, SAMPLES, MANIFEST = "_results.json", "_samples_", "hones_manifest_*.json"
SUBMISSIONS = "submissions"  # where some lmms-eval tasks write files for an evaluation server


class Found(NamedTuple):
    """Results, samples and run manifests, each in the order of their paths."""

    results: list[Path]
    samples: list[Path]
    manifests: list[Path]


def find_files(paths: Sequence[Path]) -> Found:
    """Find the files under folders, and those that belong to single results files.

    Raises: HonesError when a path does not exist.
    """
    files: set[Path] = set()
    for given in paths:
        path = given.resolve()
        if not path.exists():
            raise HonesError(f"{given} does not exist: give lmms-eval output folders")
        if path.is_dir():
            files.update(path.rglob("*"))
        else:
            files.update(path.parent.glob(f"{stem(path)}*"))
            files.update((*path.parent.glob(MANIFEST), *path.parent.parent.glob(MANIFEST)))
    return Found(
        sorted(file for file in files if file.name.endswith(RESULTS) and file.parent.name != SUBMISSIONS),
        sorted(file for file in files if SAMPLES in file.name and file.suffix == ".jsonl"),
        sorted(file for file in files if file.match(MANIFEST)),
    )


def stem(path: Path) -> str:
    """The date that starts the names of all files of one lmms-eval run."""
    return path.name.split(SAMPLES)[0].removesuffix(RESULTS)


def samples_path(results: Path, task: str) -> Path:
    """Where lmms-eval writes the samples of one task of a run."""
    return results.parent / f"{stem(results)}{SAMPLES}{task}.jsonl"


def load_results(path: Path) -> tuple[Path, dict[str, Any] | None, str]:
    """The path and content of a results file; if the content is None, also the reason."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        return path, None, f"truncated or not JSON ({error}); run lmms-eval again"
    wanted = {"results": dict, "configs": dict, "config": dict}
    for key, kind in wanted.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            return path, None, f"not lmms-eval results: '{key}' is missing"
    return path, content, ""
