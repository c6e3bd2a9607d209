"""Pairs each steered run with its baseline run, or says why there is none."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hones_eval.core.digests import weights_differ
from hones_eval.leaderboard.reading import Run
from hones_eval.leaderboard.samples import Samples

MADE_FOR = "the steering was made for"


@dataclass(frozen=True, eq=False)
class Pair:
    """A steered run with the baseline run that answered the same examples."""

    baseline: Run
    steered: Run
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Unpaired:
    """A run that is left out of the board, and why."""

    run: Run
    reasons: tuple[str, ...]


def pair_runs(runs: Sequence[Run]) -> tuple[list[Pair], list[Unpaired]]:
    """Pair every steered run with the newest baseline that fits it, one with the same seeds first.

    Runs with problems, and all but the newest of several identical runs, are returned as unpaired.
    """
    runs, left = _set_aside(runs)
    baselines = [run for run in runs if run.steering is None]
    broken = [item.run for item in left if item.run.steering is None]
    pairs: list[Pair] = []
    for steered in (run for run in runs if run.steering is not None):
        found = _pair(steered, [run for run in baselines if run.task == steered.task])
        if isinstance(found, Pair):
            pairs.append(found)
            continue
        if not found.reasons:
            found = Unpaired(steered, (_no_baseline(steered, broken),))
        left.append(found)
    return pairs, left


def _set_aside(runs: Iterable[Run]) -> tuple[list[Run], list[Unpaired]]:
    """Take out runs with problems, and all but the newest of several identical runs."""
    newest: dict[tuple[object, ...], Run] = {}
    left: list[Unpaired] = []
    for run in sorted(runs, key=lambda run: (run.date, str(run.results_path))):
        if run.problems:
            left.append(Unpaired(run, run.problems))
            continue
        if older := newest.get(run.key):
            why = f"a newer run of the same thing is used: {run.name}"
            if older.name == run.name:
                why = "a copy of this run in another folder is used"
            left.append(Unpaired(older, (why,)))
        newest[run.key] = run
    return list(newest.values()), left


def _pair(steered: Run, candidates: Sequence[Run]) -> Pair | Unpaired:
    refused: list[list[str]] = []
    for baseline in sorted(candidates, key=lambda run: (run.seeds == steered.seeds, run.date), reverse=True):
        if reasons := differences(baseline, steered):
            refused.append(reasons)
        else:
            return Pair(baseline, steered, tuple(_notes(baseline, steered)))
    closest: list[str] = min(refused, key=len, default=[])
    return Unpaired(steered, tuple(closest))


def differences(baseline: Run, steered: Run) -> list[str]:
    """Reasons why two runs of a task cannot be compared; empty if they can."""
    reasons = baseline.base.differences(steered.base)
    for name, value in baseline.settings.items():
        if steered.settings.get(name) != value:
            reasons.append(f"{name} is {steered.settings.get(name)} here and {value} in the baseline")
    if reasons:
        return reasons
    if set(baseline.samples) != set(steered.samples):
        return ["the filters of the task differ"]
    for name, samples in baseline.samples.items():
        reasons += _example_differences(samples, steered.samples[name])
    return list(dict.fromkeys(reasons))


def _example_differences(baseline: Samples, steered: Samples) -> list[str]:
    if not np.array_equal(baseline.doc_ids, steered.doc_ids):
        missing = np.setdiff1d(baseline.doc_ids, steered.doc_ids)
        extra = np.setdiff1d(steered.doc_ids, baseline.doc_ids)
        return [f"examples differ: {len(missing):,} only in the baseline, {len(extra):,} only here"]
    other = np.flatnonzero(baseline.prompts != steered.prompts)
    if len(other):
        first = baseline.doc_ids[other[0]]
        return [
            f"the question or the gold answer differs for {len(other):,} examples (first: doc_id {first})"
        ]
    if baseline.shown is not None and steered.shown is not None:
        other = np.flatnonzero(baseline.shown != steered.shown)
        if len(other):
            first = baseline.doc_ids[other[0]]
            return [f"the prompt or the image differs for {len(other):,} examples (first: doc_id {first})"]
    return []


def _notes(baseline: Run, steered: Run) -> Iterable[str]:
    if other := _made_for_another_model(steered):
        yield other
    if baseline.seeds != steered.seeds:
        yield f"seeds differ: {baseline.seeds} in the baseline, {steered.seeds} here"
    if baseline.has_manifest != steered.has_manifest:
        yield "only one of the two runs has a manifest, so only the texts of the prompts were compared"
    for name in sorted(baseline.versions.keys() & steered.versions.keys()):
        if baseline.versions[name] != steered.versions[name]:
            yield f"{name} {steered.versions[name]} here, {baseline.versions[name]} in the baseline"
    same = all(
        np.array_equal(baseline.samples[key].answers, block.answers) for key, block in steered.samples.items()
    )
    if same:
        yield "the steering changed no answer"


def _made_for_another_model(run: Run) -> str:
    """A sentence if a steering was made for another base model: by its weights, else by its name."""
    assert run.steering is not None
    provenance = run.steering.provenance
    name, weights = provenance.get("base_model"), provenance.get("weights")
    if run.base.weights is not None and weights == run.base.weights:
        return ""
    if weights_differ(weights, run.base.weights) and name == run.base.name:
        return f"{MADE_FOR} other weights of {name} ({weights}; here {run.base.weights})"
    if name is None or name == run.base.name:
        return ""
    return f"{MADE_FOR} {name}, and the base model here is {run.base.name}"


def _no_baseline(steered: Run, broken: Sequence[Run]) -> str:
    if any(run.task == steered.task and run.base.name == steered.base.name for run in broken):
        return "its only baseline run is unusable: run the baseline again"
    return (
        f"no baseline run of {steered.base.name} on {steered.task}: "
        "run the same lmms-eval command without steering="
    )
