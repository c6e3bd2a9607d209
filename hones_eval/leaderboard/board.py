"""A board from lmms-eval output folders: rows with paired statistics, and the runs left out."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hones_eval.choices import Correction
from hones_eval.core.notebook import data_frame, html_table, interval_plot
from hones_eval.errors import HonesError
from hones_eval.leaderboard.pairing import MADE_FOR, Unpaired, pair_runs
from hones_eval.leaderboard.pooling import Pooled, pool_seeds
from hones_eval.leaderboard.reading import Run, read_logs
from hones_eval.leaderboard.rows import Row, compare_pairs
from hones_eval.stats.verdicts import FEWEST_UNITS, corrected

FEWEST_RESAMPLES = 39  # with fewer, no draw falls outside a 95 % interval on either side
NONE_STEERED = (
    "none of these runs is steered, so there is nothing to compare: run the same lmms-eval command with "
    "steering= too"
)


@dataclass(frozen=True, eq=False, repr=False)
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
    correction: Correction = "holm"
    pooled: tuple[Pooled, ...] = ()
    """Steerings that differ in their seed alone, pooled over the seeds."""

    @property
    def answer(self) -> str:
        """Whether steering helped: counts of verdicts, and how small a difference could have been missed."""
        if not self.rows:
            return "There is nothing to compare."
        counts = Counter(row.verdict for row in self.rows)
        reasons = [reason for row in self.rows if (reason := row.why_not_judged)]
        if len(reasons) == len(self.rows):
            subject = "the only row" if len(reasons) == 1 else f"none of the {len(reasons)} rows"
            could = "could not be judged" if len(reasons) == 1 else "could be judged"
            parts = Counter(part for reason in reasons for part in reason.split("; "))
            return f"Did it help? That cannot be told: {subject} {could} ({parts.most_common(1)[0][0]})."
        helped = "No"
        if counts["better"]:
            helped = "In part" if counts["worse"] else "Yes"
        text = f"Did it help? {helped}: {counts['better']} better, {counts['worse']} worse, "
        text += f"{counts['no clear difference']} unclear, {counts['not judged']} not judged"
        missed = [row.detectable for row in self.rows if row.detectable is not None]
        if missed and counts["no clear difference"] and not counts["better"]:
            low, high = f"{min(missed):.2g}", f"{max(missed):.2g}"
            size = low if low == high else f"{low} to {high}"
            text += f"; differences below about {size} would mostly have been missed "
            text += "(80 % power, before correction)"
        return f"{text}."

    def records(self) -> list[dict[str, Any]]:
        """Every row as a JSON-ready mapping."""
        return [row.record() for row in self.rows]

    def to_pandas(self) -> Any:
        """The rows as a pandas.DataFrame. Raises: HonesError where pandas is not installed."""
        return data_frame(self.records())

    def plot(self) -> Any:
        """A matplotlib.figure.Figure: each row's difference with its 95 % interval, gains in blue."""
        return interval_plot([row.record() | {"gain": row.gain} for row in self.rows], self.answer)

    def __repr__(self) -> str:
        """The answer, in short."""
        rows = f"{len(self.rows)} row{'' if len(self.rows) == 1 else 's'}"
        return f"<hones_eval.Board of {rows} from {self.runs} runs. {self.answer}>"

    def _repr_html_(self) -> str:
        return html_table(self.records(), self.answer)


def build_board(
    logs: Sequence[Path],
    *,
    seed: int = 0,
    resamples: int = 9999,
    include_path: Path | None = None,
    correction: Correction = "holm",
) -> Board:
    """Read logs, pair the runs, and compare every metric of every pair; nothing is written.

    Raises: HonesError when a path does not exist or holds no results at all, or `resamples` are too few.
    """
    if resamples < FEWEST_RESAMPLES:
        raise HonesError(f"--resamples {resamples}: a 95 % interval needs {FEWEST_RESAMPLES} or more")
    if include_path is not None and not include_path.is_dir():
        raise HonesError(f"--include_path {include_path} is not a folder")
    found = read_logs(logs)
    pairs, unpaired = pair_runs(found.runs)
    rows = compare_pairs(pairs, seed, resamples, include_path)
    rows = _ranked(_adjusted(rows, resamples, correction))
    unranked = sorted(unpaired, key=lambda item: (item.run.task, item.run.date, str(item.run.results_path)))
    warnings = [NONE_STEERED] if all(run.steering is None for run in found.runs) else []
    made_for = [f"{p.steered.name}: {note}" for p in pairs for note in p.notes if note.startswith(MADE_FOR)]
    warnings += made_for
    warnings += [*found.unreadable, *(f"{item.run.name}: {item.reasons[0]}" for item in unranked)]
    return Board(
        rows=tuple(rows),
        unranked=tuple(unranked),
        unreadable=found.unreadable,
        runs=len(found.runs),
        seed=seed,
        resamples=resamples,
        warnings=tuple(warnings),
        correction=correction,
        pooled=tuple(pool_seeds(rows, seed, resamples, correction)),
    )


def _adjusted(rows: Sequence[Row], resamples: int, correction: Correction) -> list[Row]:
    """Add adjusted p-values, over all tested rows of the board with enough independent units."""
    tested = [k for k, row in enumerate(rows) if row.comparison.test and row.units >= FEWEST_UNITS]
    p = [test.p for k in tested if (test := rows[k].comparison.test) is not None]
    by_place = dict(zip(tested, corrected(p, correction), strict=True))
    return [
        _noted(replace(row, p_adjusted=by_place.get(k), correction=correction), resamples)
        for k, row in enumerate(rows)
    ]


def _noted(row: Row, resamples: int) -> Row:
    """Say which rows have too few units, and where a randomization test's smallest p decides nothing."""
    test, p = row.comparison.test, row.p_adjusted
    if test is not None and row.units < FEWEST_UNITS:
        unit = "examples" if row.images is None else "images"
        few = f"too few for a verdict: {row.units} independent {unit}"
        note = "; ".join(text for text in (row.comparison.note, few) if text)
        return replace(row, comparison=replace(row.comparison, note=note))
    if test is None or p is None or p < 0.05 or test.p > 1.001 / (resamples + 1):
        return row
    if not test.method.startswith(("sign flips", "exchange")):
        return row
    line = (
        f"no random draw differed this much, so p is at most {test.p:.1g}; raise --resamples for a "
        "smaller bound"
    )
    note = "; ".join(text for text in (row.comparison.note, line) if text)
    return replace(row, comparison=replace(row.comparison, note=note))


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Rank the rows of each base model, task and metric by gain, largest first, and order the board."""
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
