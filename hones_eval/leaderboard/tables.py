"""The board as CSV and as Markdown."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from hones_eval.leaderboard.board import NONE_STEERED, Board
from hones_eval.leaderboard.rows import CORPUS_RESAMPLES, Row, Verdict
from hones_eval.leaderboard.text import cell, number, plain_cell, probability
from hones_eval.stats.verdicts import CORRECTIONS

COLUMNS = (
    "base", "task", "metric", "filter", "steering", "steering_digest", "strength", "attach", "control",
    "chosen_for", "n", "pictures", "baseline", "steered", "difference", "low", "high", "interval_method",
    "p", "test", "p_holm", "effect", "effect_name", "gained", "lost", "verdict", "rank", "flags", "notes",
    "baseline_run", "steered_run",
)  # fmt: skip


def csv_table(board: Board, views: Sequence[Mapping[str, Any]]) -> str:
    """The board as CSV: every row in full precision, then the runs left out, with the reason in `notes`."""
    text = io.StringIO()
    columns = [f"p_{board.correction}" if name == "p_holm" else name for name in COLUMNS]
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for row, view in zip(board.rows, views, strict=True):
        writer.writerow({name: plain_cell(value) for name, value in _record(row, view).items()})
    for left in board.unranked:
        steering = left.run.steering
        record = {
            "base": left.run.base.name,
            "task": left.run.task,
            "steering": "" if steering is None else steering.label,
            "verdict": "left out",
            "notes": "; ".join(left.reasons),
            "steered_run": left.run.name,
        }
        writer.writerow({name: plain_cell(value) for name, value in record.items()})
    return text.getvalue()


def _record(row: Row, view: Mapping[str, Any]) -> dict[str, object]:
    found, run, steering = row.comparison, row.pair.steered, row.pair.steered.steering
    assert steering is not None
    return {
        "base": run.base.name,
        "task": run.task,
        "metric": row.metric.name,
        "filter": row.metric.filter,
        "steering": view["steering"],
        "steering_digest": steering.digest or "",
        "strength": f"{steering.strength:g}",
        "attach": steering.attach,
        "control": "yes" if steering.is_control else "no",
        "chosen_for": "+".join(steering.chosen_for),
        "n": str(row.n),
        "pictures": "" if row.images is None else str(row.images),
        "baseline": _full(row.baseline),
        "steered": _full(row.steered),
        "difference": _full(found.difference),
        "low": _full(found.interval.low if found.interval else None),
        "high": _full(found.interval.high if found.interval else None),
        "interval_method": found.interval.method if found.interval else "",
        "p": _full(found.test.p if found.test else None),
        "test": found.test.method if found.test else "",
        f"p_{row.correction}": _full(row.p_adjusted),
        "effect": _full(found.effect.value if found.effect else None),
        "effect_name": found.effect.name if found.effect else "",
        "gained": "" if row.gained is None else str(row.gained),
        "lost": "" if row.lost is None else str(row.lost),
        "verdict": row.verdict,
        "rank": "" if row.rank is None else str(row.rank),
        "flags": "; ".join(row.flags),
        "notes": "; ".join(text for text in (*row.notes, found.note) if text),
        "baseline_run": row.pair.baseline.name,
        "steered_run": run.name,
    }


def _full(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.8g}"


def markdown_table(board: Board, views: Sequence[Mapping[str, Any]]) -> str:
    """The board as a Markdown document: rows, runs left out, and how to read them."""
    lines = ["# Leaderboard", "", _summary(board), ""]
    lines += (
        _table(views, CORRECTIONS[board.correction])
        if views
        else ["No steered run could be compared with a baseline.", ""]
    )
    if board.pooled:
        lines += ["## Pooled over seeds", "", *_pooled_table(board)]
    if NONE_STEERED in board.warnings:
        lines += [f"{NONE_STEERED.capitalize()}.", ""]
    if board.unranked or board.unreadable:
        lines += ["## Left out", ""]
        lines += [f"- {cell(left.run.name)}: {cell('; '.join(left.reasons))}" for left in board.unranked]
        lines += [f"- {cell(line)}" for line in board.unreadable] + [""]
    lines += [
        "Change: steered minus baseline, with its 95 % interval. Verdict: p below 0.05 after "
        f"{CORRECTIONS[board.correction]}'s correction over the board. Seed {board.seed}, "
        f"{board.resamples:,} resamples ({CORPUS_RESAMPLES:,} for metrics of the whole corpus). "
        "leaderboard.csv has every figure and names every method.",
        "",
    ]
    return "\n".join(lines)


def _pooled_table(board: Board) -> list[str]:
    lines = [
        "| Steering | Task | Metric | Seeds | Change | 95 % interval | "
        f"p ({CORRECTIONS[board.correction]}) | Verdict |",
        "|---|---|---|---:|---:|---|---:|---|",
    ]
    for row in board.pooled:
        found = row.record()
        interval = row.comparison.interval
        ends = (
            "none"
            if interval is None
            else f"{number(interval.low, sign=True)}, {number(interval.high, sign=True)}"
        )
        cells = (
            cell(row.label),
            cell(str(found["task"])),
            cell(str(found["metric"])),
            str(found["seeds"]),
            number(row.comparison.difference, sign=True),
            ends,
            probability(row.p_adjusted).replace("<", "&lt;"),
            row.verdict,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Steerings that differ in their seed alone: each example counts once, with its mean change over the "
        "seeds. P-values are corrected over this table.",
        "",
    ]


def _summary(board: Board) -> str:
    verdicts = Counter(row.verdict for row in board.rows)
    names: tuple[Verdict, ...] = get_args(Verdict)
    counts = ", ".join(f"{verdicts[name]} {name}" for name in names)
    return f"{len(board.rows)} rows from {board.runs} runs: {counts}."


def _table(views: Sequence[Mapping[str, Any]], correction: str) -> list[str]:
    lines = [
        "| Steering | Task | Metric | Baseline | Steered | Change | 95 % interval | "
        f"p ({correction}) | n | Verdict |",
        "|---|---|---|---:|---:|---:|---|---:|---:|---|",
    ]
    for view in views:
        name = cell(view["steering"]) + (" (control)" if view["control"] else "")
        name += " **examples reused**" if view["flags"] else ""
        interval = f"{view['interval']} ({view['method']})" if view["interval"] else "none"
        figures = (
            view["baseline"],
            view["steered"],
            view["difference"],
            interval,
            view["p"].replace("<", "&lt;"),
        )
        verdict = f"{view['sign']} {view['verdict']}"
        words = (name, cell(view["task"]), cell(view["metric"]), *figures, view["n_text"], verdict)
        lines.append(f"| {' | '.join(words)} |")
    return [*lines, ""]
