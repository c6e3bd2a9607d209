"""From lmms-eval output folders to a board: rows with paired statistics, and everything that is on no row."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from hones_eval.errors import HonesError
from hones_eval.leaderboard.captions import is_caption_metric
from hones_eval.leaderboard.lmms_tasks import find_aggregation
from hones_eval.leaderboard.metrics import (
    Corpus,
    Scores,
    caption_form,
    check_aggregation,
    corpus_of,
    scores_of,
)
from hones_eval.leaderboard.pairing import Pair, Unpaired, pair_runs
from hones_eval.leaderboard.reading import Metric, Run, read_logs
from hones_eval.leaderboard.reuse import reused_examples
from hones_eval.leaderboard.samples import Floats, Integers
from hones_eval.stats.corpus import compare_corpus
from hones_eval.stats.paired import (
    Comparison,
    compare_graded,
    compare_right_wrong,
    holm,
)

Verdict = Literal["better", "worse", "no clear difference", "not judged"]
CORPUS_RESAMPLES = 999  # a corpus metric is computed again for each of them
FEWEST_RESAMPLES = 39  # with fewer, no draw lies outside an interval of 95 % on either side
NONE_STEERED = (
    "none of these runs is steered, so there is nothing to compare: run the same lmms-eval command with "
    "steering= too"
)


@dataclass(frozen=True, eq=False)
class Row:
    """One metric of one task under one steering, beside its baseline."""

    pair: Pair
    metric: Metric
    baseline: float
    steered: float
    n: int
    pictures: int | None
    kind: str
    comparison: Comparison
    gained: int | None = None
    lost: int | None = None
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    p_holm: float | None = None
    rank: int | None = None

    @property
    def gain(self) -> float | None:
        """The difference, positive where steered is better; None where the metric has no good side."""
        if self.metric.higher_is_better is None:
            return None
        return self.comparison.difference * (1 if self.metric.higher_is_better else -1)

    @property
    def verdict(self) -> Verdict:
        """Whether steering helped: the difference's side where Holm's p is below 0.05."""
        if self.p_holm is None or self.gain is None:
            return "not judged"
        if self.p_holm >= 0.05:
            return "no clear difference"
        return "better" if self.gain > 0 else "worse"

    @property
    def group(self) -> tuple[str, str, str, str]:
        """Rows with one group are ranked against each other."""
        run = self.pair.steered
        return (run.base.name, run.task, self.metric.name, self.metric.filter)


@dataclass(frozen=True, eq=False)
class Board:
    """Everything that a leaderboard shows, and the files that were written for it."""

    rows: tuple[Row, ...]
    unranked: tuple[Unpaired, ...]
    unreadable: tuple[str, ...]
    runs: int
    seed: int
    resamples: int
    written: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def build_board(
    logs: Sequence[Path], *, seed: int = 0, resamples: int = 9999, include_path: Path | None = None
) -> Board:
    """Read logs, pair the runs, and compare every metric of every pair; nothing is written.

    Raises: HonesError when a path does not exist or holds no results at all, or `resamples` are too few.
    """
    if resamples < FEWEST_RESAMPLES:
        raise HonesError(f"--resamples {resamples}: an interval of 95 % takes {FEWEST_RESAMPLES} or more")
    if include_path is not None and not include_path.is_dir():
        raise HonesError(f"--include_path {include_path} is not a folder")
    found = read_logs(logs)
    pairs, unpaired = pair_runs(found.runs)
    rows = _compared(pairs, seed, resamples, include_path)
    rows = _ranked(_adjusted(rows, resamples))
    unranked = sorted(unpaired, key=lambda one: (one.run.task, one.run.date, str(one.run.results_path)))
    warnings = [NONE_STEERED] if all(run.steering is None for run in found.runs) else []
    warnings += [*found.unreadable, *(f"{one.run.name}: {one.reasons[0]}" for one in unranked)]
    return Board(
        rows=tuple(rows),
        unranked=tuple(unranked),
        unreadable=found.unreadable,
        runs=len(found.runs),
        seed=seed,
        resamples=resamples,
        warnings=tuple(warnings),
    )


def _compared(pairs: Sequence[Pair], seed: int, resamples: int, include_path: Path | None) -> list[Row]:
    rows: list[Row] = []
    graded: dict[tuple[object, ...], list[tuple[int, Floats, Integers | None]]] = defaultdict(list)
    for pair in pairs:
        flags = reused_examples(pair.steered)
        for metric in pair.steered.metrics:
            row, scores, clusters = _row(pair, metric, flags)
            corpus = None
            if scores.kind == "corpus":
                row, scores, clusters, corpus = _of_corpus(row, clusters)
            if scores.kind == "right/wrong" and clusters is None:
                row = _with(row, _scaled(compare_right_wrong(*_columns(scores)), scores.scale), scores)
            elif scores.kind in ("right/wrong", "graded"):
                before, after = _columns(scores)
                row = _with(row, row.comparison, scores)
                key = (id(pair.baseline), metric.name, metric.filter, scores.scale, clusters is None)
                graded[key].append((len(rows), (after - before) * scores.scale, clusters))
            elif corpus is not None:
                row = replace(row, comparison=_corpus(row, corpus, clusters, seed, resamples, include_path))
            rows.append(row)
    for jobs in graded.values():
        columns = np.column_stack([difference for _, difference, _ in jobs])
        found = compare_graded(columns, jobs[0][2], seed=seed, resamples=resamples)
        for (place, _, _), comparison in zip(jobs, found, strict=True):
            rows[place] = replace(rows[place], comparison=comparison)
    return rows


def _row(pair: Pair, metric: Metric, flags: tuple[str, ...]) -> tuple[Row, Scores, Integers | None]:
    before = next(
        (one for one in pair.baseline.metrics if (one.name, one.filter) == (metric.name, metric.filter)), None
    )
    samples = pair.steered.samples[metric.filter]
    clusters = _clusters(pair, metric.filter)
    values = (before.value if before else None, metric.value)
    if values[0] is None or values[1] is None:
        scores = Scores("none", note="the reported value is not a number")
    else:
        scores = scores_of(metric, pair.baseline, pair.steered, (values[0], values[1]))
    baseline, steered = (float("nan") if value is None else value for value in values)
    row = Row(
        pair=pair,
        metric=metric,
        baseline=baseline,
        steered=steered,
        n=len(samples),
        pictures=None if clusters is None else len(np.unique(clusters)),
        kind=scores.kind,
        comparison=Comparison(steered - baseline, None, None, None, scores.note),
        flags=flags,
        notes=(*pair.notes, *pair.steered.notes),
    )
    return row, scores, clusters


def _clusters(pair: Pair, filter_name: str) -> Integers | None:
    """The picture of each example, numbered, where examples share pictures; None where each has its own."""
    both = pair.baseline.samples[filter_name], pair.steered.samples[filter_name]
    pictures = next((one.pictures for one in both if one.pictures is not None), None)
    if pictures is None or len(set(pictures)) == len(pictures):
        return None
    codes = {shown: k for k, shown in enumerate(dict.fromkeys(pictures))}
    return np.array([codes[shown] for shown in pictures], dtype=np.int64)


def _columns(scores: Scores) -> tuple[Floats, Floats]:
    assert scores.baseline is not None
    assert scores.steered is not None
    return scores.baseline, scores.steered


def _with(row: Row, comparison: Comparison, scores: Scores) -> Row:
    before, after = _columns(scores)
    up, down = int((after > before).sum()), int((after < before).sum())
    if row.metric.higher_is_better is False:
        up, down = down, up
    return replace(row, comparison=comparison, gained=up, lost=down)


def _scaled(comparison: Comparison, scale: float) -> Comparison:
    if scale == 1 or comparison.interval is None:
        return comparison
    ends = comparison.interval
    ends = replace(ends, low=ends.low * scale, high=ends.high * scale)
    return replace(comparison, difference=comparison.difference * scale, interval=ends)


def _of_corpus(row: Row, clusters: Integers | None) -> tuple[Row, Scores, Integers | None, Corpus | None]:
    """The row over the examples that have the metric; caption metrics in the form that resamples best."""
    metric, pair, values = row.metric, row.pair, (row.baseline, row.steered)
    corpus = corpus_of(metric, pair.baseline, pair.steered)
    if isinstance(corpus, Corpus):
        if clusters is not None:
            clusters = clusters[corpus.kept]
            row = replace(row, pictures=len(np.unique(clusters)))
        row = replace(row, n=len(corpus.kept))
        if not is_caption_metric(metric.name, corpus.baseline):
            return row, Scores("corpus"), clusters, corpus
        form = caption_form(metric, corpus, values)
        if isinstance(form, Scores):
            return replace(row, kind=form.kind), form, clusters, None
        if isinstance(form, Corpus):
            return row, Scores("corpus"), clusters, form
        corpus = form
    comparison = replace(row.comparison, note=f"no interval: {corpus}")
    return replace(row, comparison=comparison), Scores("none"), clusters, None


def _corpus(
    row: Row,
    corpus: Corpus,
    clusters: Integers | None,
    seed: int,
    resamples: int,
    include_path: Path | None,
) -> Comparison:
    function = corpus.function or find_aggregation(row.pair.steered.task, row.metric.name, include_path)
    if isinstance(function, str):
        return replace(row.comparison, note=f"no per-example value, no interval: {function}")
    if problem := check_aggregation(function, corpus.runs, (row.baseline, row.steered)):
        return replace(row.comparison, note=f"no interval: {problem}")
    draws = min(resamples, CORPUS_RESAMPLES)
    return compare_corpus(function, *corpus.runs, clusters, seed=seed, resamples=draws, most=resamples)


def _adjusted(rows: Sequence[Row], resamples: int) -> list[Row]:
    """Give every row with a p-value the one that Holm's method makes of it for the whole board."""
    tested = [k for k, row in enumerate(rows) if row.comparison.test is not None]
    adjusted = holm([test.p for k in tested if (test := rows[k].comparison.test) is not None])
    by_place = dict(zip(tested, adjusted, strict=True))
    return [_noted(replace(row, p_holm=by_place.get(k)), resamples) for k, row in enumerate(rows)]


def _noted(row: Row, resamples: int) -> Row:
    """Say so where a randomization test was at its smallest p, and this does not pass Holm's correction."""
    test, p = row.comparison.test, row.p_holm
    if test is None or p is None or p < 0.05 or test.p > 1.001 / (resamples + 1):
        return row
    if not test.method.startswith(("sign flips", "exchange")):
        return row
    line = (
        f"no random draw differed as much: p is at most {test.p:.1g}; more --resamples can tell by how much"
    )
    note = "; ".join(one for one in (row.comparison.note, line) if one)
    return replace(row, comparison=replace(row.comparison, note=note))


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Number the rows of each base, task and metric from the largest gain down; order the board by them."""
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    ordered = []
    for _, members in sorted(groups.items()):
        members.sort(key=_place)
        able = [row for row in members if _rankable(row)]
        ordered += [replace(row, rank=k) for k, row in enumerate(able, start=1)]
        ordered += [row for row in members if not _rankable(row)]
    return ordered


def _rankable(row: Row) -> bool:
    return row.gain is not None and bool(np.isfinite(row.gain))


def _place(row: Row) -> tuple[float, str, str]:
    gain = row.gain if _rankable(row) else None
    return (-(gain or 0.0), _label(row.pair.steered), row.pair.steered.date)


def _label(run: Run) -> str:
    return run.steering.label if run.steering else "baseline"
