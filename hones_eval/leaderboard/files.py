"""The files that lmms-eval and our wrappers leave in an output folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hones_eval import limits
from hones_eval.core.files import is_regular, read_bounded
from hones_eval.errors import HonesError
from hones_eval.leaderboard.schemas import ResultsFile, parsed
from hones_eval.leaderboard.text import path_name

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
    files = {file for file in files if is_regular(file)}
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


def load_results(path: Path) -> ResultsFile:
    """Read a results file. Raises: HonesError that names the file and says what is wrong with it."""
    name = path_name(path)
    try:
        content = json.loads(read_bounded(path, limits.RESULTS_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise HonesError(f"{name}: truncated or not JSON ({error}); run lmms-eval again") from None
    for key in ("results", "configs", "config"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise HonesError(f"{name}: not lmms-eval results: '{key}' is missing")
    return parsed(
        ResultsFile, content, lambda problem: f"{name}: not as lmms-eval writes results ({problem})"
    )
