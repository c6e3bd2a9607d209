"""Runs from lmms-eval output folders: one run is one task of one results file."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from hones_eval.core.files import is_regular
from hones_eval.errors import HonesError
from hones_eval.leaderboard.files import RESULTS, find_files, load_results, samples_path, stem
from hones_eval.leaderboard.identity import (
    BaseModel,
    SteeringRef,
    base_from_arguments,
    parse_arguments,
    steering_from_arguments,
)
from hones_eval.leaderboard.manifest import Manifest, Requests, SharedRequests, read_manifest
from hones_eval.leaderboard.samples import Samples, read_samples
from hones_eval.leaderboard.schemas import ResultsFile
from hones_eval.leaderboard.text import path_name

COMPARED_SETTINGS = (
    "dataset_path",
    "dataset_name",
    "test_split",
    "generation_kwargs",
    "num_fewshot",
    "repeats",
)


@dataclass(frozen=True)
class Metric:
    """One metric as lmms-eval reports it; `value` is None if it is not a finite number."""

    name: str
    filter: str
    value: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, eq=False)
class Run:
    """One task of one lmms-eval run. `problems` exclude it from the board, `notes` do not."""

    results_path: Path
    date: str
    wrapper: str
    base: BaseModel
    task: str
    steering: SteeringRef | None
    settings: Mapping[str, str]
    seeds: tuple[Any, ...]
    metrics: tuple[Metric, ...]
    samples: Mapping[str, Samples]
    expected: int | None
    split: str
    versions: Mapping[str, str] = field(default_factory=dict)
    has_manifest: bool = False
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of this run in messages."""
        return f"{self.results_path.parent.name}/{self.date} {self.task}"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two runs with the same base model, task, steering, settings and seeds."""
        steering = None if self.steering is None else self.steering.identity
        return (self.base, self.task, steering, tuple(sorted(self.settings.items())), self.seeds)


@dataclass(frozen=True)
class Logs:
    """Every run found, and a line for every file that could not be read."""

    runs: tuple[Run, ...]
    unreadable: tuple[str, ...]


def read_logs(paths: Sequence[Path]) -> Logs:
    """Read lmms-eval output folders (or single results files), at any depth.

    Raises: HonesError when a path does not exist or no results file is found under any of them.
    """
    results, samples, manifests = find_files(paths)
    if not results and not samples:
        raise HonesError(
            f"no lmms-eval results (*{RESULTS}) under {', '.join(map(str, paths))}: "
            "run lmms-eval with --log_samples --output_path DIR and give DIR"
        )
    known, unreadable = _read_manifests(manifests)
    runs: list[Run] = []
    used: set[Path] = set()
    for path in results:
        near = [manifest for manifest in known if manifest.path.parent in (path.parent, path.parent.parent)]
        try:
            content = load_results(path)
            runs += _runs(path, content, near)
        except HonesError as error:
            unreadable.append(str(error))
            used.update(file for file in samples if stem(file) == stem(path) and file.parent == path.parent)
            continue
        used.update(samples_path(path, task) for task in content.configs)
    unreadable += _failed(known, results)
    lost = [path_name(file) for file in samples if file not in used]
    unreadable += [f"{name}: samples without a results file: the run did not finish" for name in lost]
    return Logs(tuple(runs), tuple(unreadable))


def _read_manifests(paths: Sequence[Path]) -> tuple[list[Manifest], list[str]]:
    known, unreadable = [], []
    shared = SharedRequests()
    for path in paths:
        try:
            known.append(read_manifest(path, shared))
        except HonesError as error:
            unreadable.append(str(error))
    return known, unreadable


def _failed(manifests: Sequence[Manifest], results: Sequence[Path]) -> list[str]:
    """Runs that failed and left no results file."""
    names = {path.name for path in results}
    return [
        f"{path_name(manifest.path)}: the run failed ({manifest.errors[0][1]})"
        for manifest in manifests
        if manifest.errors and manifest.results not in names and manifest.rank == 0
    ]


def _runs(path: Path, content: ResultsFile, manifests: Sequence[Manifest]) -> list[Run]:
    wrapper = content.config.model
    arguments = parse_arguments(content.config.model_args)
    base = base_from_arguments(wrapper, arguments)
    steering = steering_from_arguments(arguments)
    mine = _matching(manifests, path, content, base, steering)
    if mine:
        base = replace(
            base,
            revision=mine[0].base_revision,
            wrapper=mine[0].base_wrapper,
            weights=mine[0].base_weights,
        )
        steering = _of_all_ranks(mine)
    return [_run(path, content, task, base, steering, mine) for task in content.configs]


def _of_all_ranks(manifests: Sequence[Manifest]) -> SteeringRef | None:
    """The steering of a run, with the prompts that all of its processes have counted."""
    first = manifests[0].steering
    if first is None:
        return None
    acted: dict[str, list[list[int]]] = {}
    for steering in (manifest.steering for manifest in manifests):
        for task, counts in (steering.acted if steering is not None else {}).items():
            known = acted.setdefault(task, [[0, 0] for _ in counts])
            acted[task] = [
                [a + b for a, b in zip(*pair, strict=True)] for pair in zip(known, counts, strict=False)
            ]
    return replace(first, acted=acted)


def _matching(
    manifests: Sequence[Manifest],
    path: Path,
    content: ResultsFile,
    base: BaseModel,
    steering: SteeringRef | None,
) -> list[Manifest]:
    """A run's manifests, one per process: those that name its results, else the first after its start."""
    start = _started(content)
    fitting = [
        manifest
        for manifest in manifests
        if manifest.results in (None, path.name)
        and manifest.base_name == base.name
        and _same_steering(manifest.steering, steering)
        and (manifest.results is not None or manifest.created >= start)
    ]
    ranks: dict[int, Manifest] = {}
    for manifest in sorted(fitting, key=lambda manifest: (manifest.results is None, manifest.created)):
        ranks.setdefault(manifest.rank, manifest)
    return [ranks[rank] for rank in sorted(ranks)]


def _started(content: ResultsFile) -> datetime:
    options = content.config.resolved_cli_args or {}
    try:
        zone = ZoneInfo(str(options.get("timezone") or "Asia/Singapore"))
        return datetime.strptime(str(content.date), "%Y%m%d_%H%M%S").replace(tzinfo=zone)
    except (ValueError, OSError, ZoneInfoNotFoundError):
        return datetime.min.replace(tzinfo=ZoneInfo("UTC"))


def _same_steering(recorded: SteeringRef | None, named: SteeringRef | None) -> bool:
    if recorded is None or named is None:
        return recorded is named
    same = recorded.path == named.path and recorded.scope == named.scope
    same = same and recorded.condition == named.condition
    return same and recorded.strength == named.strength


def _run(
    path: Path,
    content: ResultsFile,
    task: str,
    base: BaseModel,
    steering: SteeringRef | None,
    manifests: Sequence[Manifest],
) -> Run:
    config, options = content.config, content.configs[task]
    metrics, problems = _metrics(content, task)
    filters = list(dict.fromkeys(metric.filter for metric in metrics))
    expected = _expected(content, task)
    samples, more = _samples(samples_path(path, task), metrics, filters, expected)
    shown = [m.requests[task] for m in manifests if task in m.requests]
    problems += more + [f"generation raised: {text}" for m in manifests for text in m.errors_of(task)[:3]]
    if content.usage is not None and content.usage.budget_exceeded:
        problems.append("the run stopped early at its token budget (--max_tokens)")
    settings = {name: json.dumps(options.get(name), sort_keys=True) for name in COMPARED_SETTINGS}
    settings["gen_kwargs"] = json.dumps(config.gen_kwargs or "", sort_keys=True)
    return Run(
        results_path=path,
        date=stem(path),
        wrapper=config.model,
        base=base,
        task=task,
        steering=steering,
        settings=settings,
        seeds=tuple(
            map(_plain, (config.random_seed, config.numpy_seed, config.torch_seed, config.fewshot_seed))
        ),
        metrics=metrics,
        samples={
            name: _with_shown(block, Requests.joined(shown)) if shown else block
            for name, block in samples.items()
        },
        expected=expected,
        split=str(options.get("test_split") or options.get("validation_split") or ""),
        versions=manifests[0].versions if manifests else {},
        has_manifest=bool(manifests),
        problems=tuple(problems),
        notes=(*_notes(samples), *_ignored_until(task, manifests[:1])),
    )


def _ignored_until(task: str, manifests: Sequence[Manifest]) -> Iterator[str]:
    """A note where the wrapper did not end answers at the task's `until`, as other wrappers do."""
    for manifest in manifests:
        if stops := manifest.ignored_until.get(task):
            yield (
                f"{manifest.base_wrapper} ignores the task's until={list(stops)}: answers are not comparable "
                "with those of wrappers that end them there"
            )


def _plain(value: object) -> object:
    """A seed as it is, or the text of anything that is not a number."""
    return value if value is None or isinstance(value, int) else repr(value)


def _metrics(content: ResultsFile, task: str) -> tuple[tuple[Metric, ...], list[str]]:
    reported = content.results.get(task)
    better = (content.higher_is_better or {}).get(task) or {}
    problems: list[str] = []
    metrics = []
    for key, value in (reported or {}).items():
        name, comma, filter_name = key.rpartition(",")
        if not comma or "_stderr" in name:
            continue
        metrics.append(Metric(name, filter_name, value, better.get(name)))
    if not metrics:
        problems.append("the results file holds no metric for this task")
    return tuple(metrics), problems


def _expected(content: ResultsFile, task: str) -> int | None:
    """How many examples the run should have answered, given the task's size, --offset and --limit."""
    counts = (content.n_samples or {}).get(task)
    size, limit = None if counts is None else counts.original, content.config.limit
    if not isinstance(size, int):
        return None
    left = max(0, size - (content.config.offset or 0))
    if limit is None or limit < 0:
        return left
    return min(left, math.ceil(size * limit) if 0 < limit < 1 else int(limit))


def _samples(
    path: Path, metrics: Sequence[Metric], filters: Sequence[str], expected: int | None
) -> tuple[dict[str, Samples], list[str]]:
    if not is_regular(path):
        return {}, [f"{path.name} is missing: run lmms-eval with --log_samples"]
    names = list(dict.fromkeys(metric.name for metric in metrics))
    try:
        blocks, problems = read_samples(path, names, max(1, len(filters)))
    except HonesError as error:
        return {}, [f"{path.name}: {error}"]
    except OSError as error:
        return {}, [f"{path.name}: {error.strerror}"]
    samples = dict(zip(filters, blocks, strict=False))
    for block in blocks[:1]:
        if expected is not None and len(block) < expected:
            problems.append(f"incomplete: {len(block):,} of {expected:,} examples")
        if len(block) and block.empty_answers == len(block):
            problems.append("every answer is empty: some stock wrappers answer '' when generation fails")
    if not blocks:
        problems.append(f"incomplete: {path.name} holds no example")
    return samples, problems


def _notes(samples: Mapping[str, Samples]) -> tuple[str, ...]:
    empty = max((block.empty_answers for block in samples.values()), default=0)
    return (f"{empty:,} empty answers",) if empty else ()


def _with_shown(samples: Samples, requests: Requests) -> Samples:
    columns = requests.columns(samples.doc_ids)
    return samples if columns is None else replace(samples, images=columns.images, shown=columns.content)
