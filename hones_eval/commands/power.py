"""`hones-eval power`."""

import json
from pathlib import Path

from hones_eval.commands.answer import Answer
from hones_eval.errors import HonesError

CHANGED = (0.0, 0.05, 0.1, 0.2)


def power(
    tasks: str,
    out: Path | None = None,
    difference: float = 0.03,
    changed: list[float] | None = None,
    rows: int = 1,
    target_power: float = 0.8,
    examples: int | None = None,
    deviation: float | None = None,
    include_path: Path | None = None,
) -> Answer:
    """How many examples does a difference need, and which difference can a task's examples show?

    For metrics of right and wrong answers the test is McNemar's exact test, so the answer depends on the
    share of answers that change. For graded metrics give the standard deviation of the paired differences:
    the number is then that of lmms-eval power (Miller 2024).

    Args:
        tasks: the tasks that will be run, a,b,c.
        out: a folder to write power.json to; none by default.
        difference: the difference to find, 0.03 for three points of a hundred.
        changed: shares of answers that change, in either direction; by default 0 (only gains), 0.05, 0.1 and
            0.2. A share below the difference means gains alone.
        rows: how many rows are tested together; the level is 0.05 divided by it, as in Holm's first step.
        target_power: the probability to find the difference.
        examples: the number of examples per task, as a --limit; by default all that the task has.
        deviation: for graded metrics, the standard deviation of the paired differences of the examples.
        include_path: a folder with more task YAML files.

    Example:
        hones-eval power --tasks pope,gqa --difference 0.03
    """
    from hones_eval.api.task_names import names_in
    from hones_eval.core.artifact import write_json
    from hones_eval.lmms.examples.tasks import task_size
    from hones_eval.stats.power import (
        detectable_mean,
        detectable_right_wrong,
        examples_for_mean,
        examples_for_right_wrong,
    )

    _check(difference, changed, rows, target_power, examples, deviation)
    alpha = 0.05 / rows
    shares = sorted(set(CHANGED if changed is None else changed))
    needed: dict[str, int | None] = {
        f"{share:g}": examples_for_right_wrong(difference, share, alpha, target_power) for share in shares
    }
    lines = [
        f"to find a difference of {difference:g} with probability {target_power:g} at level {alpha:.2g}:",
        *(
            f"  {_number(count)} examples if {_share(float(share), difference)} of the answers change"
            for share, count in needed.items()
        ),
    ]
    report = {"difference": difference, "alpha": alpha, "power": target_power, "examples_by_share": needed}
    if deviation is not None:
        count = examples_for_mean(difference, deviation, alpha, target_power)
        lines.append(
            f"  {count:,} examples for a graded metric whose differences have an sd of {deviation:g}"
        )
        report["examples_graded"] = count
    by_task = {}
    for name in names_in(tasks, "tasks"):
        size = task_size(name, include_path)
        used = size if examples is None else min(size, examples)
        found = {f"{share:g}": detectable_right_wrong(used, share, alpha, target_power) for share in shares}
        by_task[name] = {"examples": used, "detectable_by_share": found}
        smallest = ", ".join(
            f"{'none' if least is None else f'{least:.3f}'} "
            f"({f'{100 * float(share):g}% change' if float(share) else 'gains alone'})"
            for share, least in found.items()
        )
        lines.append(f"{name}: {used:,} examples; the smallest difference found: {smallest}")
        if deviation is not None:
            least = detectable_mean(deviation / used**0.5, used, alpha, target_power)
            by_task[name]["detectable_graded"] = least
            lines.append(f"{name}: graded, sd {deviation:g}: {'none' if least is None else f'{least:.3f}'}")
    report["tasks"] = by_task
    if out is not None:
        write_json(out / "power.json", json.loads(json.dumps(report)))
        lines.append(f"wrote {out / 'power.json'}")
    return Answer(lines, report)


def _check(
    difference: float,
    changed: list[float] | None,
    rows: int,
    target_power: float,
    examples: int | None,
    deviation: float | None,
) -> None:
    if not 0 < difference < 1:
        raise HonesError(f"--difference {difference:g}: give a number between 0 and 1, 0.03 for three points")
    if changed is not None and not all(0 <= share <= 1 for share in changed):
        raise HonesError(f"--changed {changed}: shares are between 0 and 1")
    if rows < 1:
        raise HonesError(f"--rows {rows}: give 1 or more")
    if not 0 < target_power < 1:
        raise HonesError(f"--target_power {target_power:g}: give a probability between 0 and 1")
    if examples is not None and examples < 1:
        raise HonesError(f"--examples {examples}: give 1 or more")
    if deviation is not None and deviation <= 0:
        raise HonesError(f"--deviation {deviation:g}: give a number above 0")


def _share(share: float, difference: float) -> str:
    return f"{100 * share:g}%" if share > difference else f"{100 * difference:g}% (gains alone)"


def _number(count: int | None) -> str:
    return "more than ten million" if count is None else f"{count:,}"
