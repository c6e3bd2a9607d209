"""Causal tracing: edited images run with a clean image's activations put back, location by location."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from hones_eval.api.model import Model
from hones_eval.api.pair_keys import keys_of
from hones_eval.api.task_names import names_in
from hones_eval.choices import Pairs as WhichPairs
from hones_eval.choices import Rows, What
from hones_eval.core.adapters import model_source
from hones_eval.core.artifact import Provenance, write_json, write_text
from hones_eval.core.files import matching, staged_folder
from hones_eval.core.lock import writes_to_out
from hones_eval.core.weights import weights_digest
from hones_eval.engine.tokens import Roles
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.answers.tokens import tokenizer_of
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods.tracing import BY_TOKEN, WHATS, CausalTrace, Pairs, Refused, Traced
from hones_eval.reports import figures, trace_figures, trace_tables
from hones_eval.runs.lightning import Loop

# Columns of this package's tasks that say which words of a question play a role.
ROLE_COLUMNS = {"object": "objects", "attribute": "attributes", "relation": "relations"}


OWN = ("layers.csv", "layers.png", "tokens.csv", "roles.csv", "*_roles.png", "*_pair[0-9]*.png")
"""Patterns of the files of a trace; those of an earlier one in the same folder are deleted."""


class Plan(NamedTuple):
    """The settings of a trace, read from the flags before a model is loaded."""

    tasks: list[tuple[str, str]]
    whats: list[What]
    read_roles: "Callable[[dict[str, Any]], Roles]"
    roles: str
    only: WhichPairs
    examples: int


def plan(clean: str, edited: str, what: str, roles: str, only: WhichPairs, examples: int) -> Plan:
    """Check what is to be traced. Raises: HonesError that names the flag."""
    tasks = _task_pairs(clean, edited)
    if examples < 0:
        raise HonesError(f"--examples {examples}: give how many pairs get figures, 0 or more")
    return Plan(tasks, _whats(what), _role_reader(roles), roles, only, examples)


@writes_to_out
def trace(
    model: Model,
    wanted: Plan,
    out: Path,
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    batch_size: Rows = "auto",
) -> list[str]:
    """Trace every pair of tasks and write tables and figures.

    Returns: the answer in a few lines.
    Raises: HonesError when the tasks do not match, or no pair can be traced.
    """
    rows = None if batch_size == "auto" else batch_size
    method = CausalTrace(model.anatomy, tokenizer_of(model.lmm), wanted.whats, rows)
    categories, first = [], None
    for clean_task, edited_task in wanted.tasks:
        clean = model.examples(
            clean_task, include_path=include_path, limit=limit, offset=offset, gen_kwargs=gen_kwargs
        )
        edited = model.examples(edited_task, include_path=include_path, gen_kwargs=gen_kwargs)
        roles = [wanted.read_roles(clean.document(index)) for index in range(len(clean))]
        pairs = Pairs(clean, edited, keys_of(clean, edited), roles, limit)
        categories.append(_run(model.loop, method, pairs, wanted.only))
        first = first or clean
    assert first is not None
    if not model.loop.is_first:
        return []
    settings = model.settings(first, what=wanted.whats, only=wanted.only, roles=wanted.roles)
    replay = method.patcher.inexact
    exactness = "exact" if replay is None else f"not exact: {replay}"
    return _write(out, model, categories, settings, wanted.examples, exactness)


@dataclass(frozen=True, eq=False)
class _Category:
    """A traced pair of tasks: the pairs that are averaged, and those left out with the reason."""

    pairs: Pairs
    counted: list[Traced]
    left_out: list[Refused]
    right: int


def _run(loop: Loop, method: CausalTrace, pairs: Pairs, only: WhichPairs) -> _Category:
    totals = loop.run(cast(TaskExamples, pairs), cast(Any, method), f"trace {pairs.clean.task}")
    records: list[Traced | Refused] = [totals.records[index] for index in sorted(totals.records)]
    counted = [record for record in records if isinstance(record, Traced)]
    left_out = [record for record in records if isinstance(record, Refused)]
    left_out += [Refused(key, f"it has no counterpart in {pairs.edited.task}") for key in pairs.unmatched]
    right = [pair for pair in counted if all(pair.right)]
    if only == "right":
        left_out += [
            Refused(pair.key, "the model is not right on both images")
            for pair in counted
            if not all(pair.right)
        ]
        counted = right
    if not counted:
        raise TaskError(
            f"none of {len(left_out)} pairs of {pairs.clean.task} and {pairs.edited.task} can be traced; the "
            f"first, {left_out[0].key}: {left_out[0].reason}"
        )
    return _Category(pairs, counted, left_out, len(right))


def _task_pairs(clean: str, edited: str) -> list[tuple[str, str]]:
    first, second = names_in(clean, "clean"), [name.strip() for name in edited.split(",")]
    if len(first) != len(second):
        raise HonesError(
            f"--clean names {len(first)} tasks and --edited {len(second)}; "
            "give one edited task for each clean one"
        )
    return list(zip(first, second, strict=True))


def _whats(what: str) -> list[What]:
    asked = list(dict.fromkeys(what.split(",")))
    unknown = [name for name in asked if name not in WHATS]
    if unknown:
        raise HonesError(f"--what {unknown[0]!r} is unknown; choose from {', '.join(WHATS)}")
    return cast(list[What], asked)


def _role_reader(given: str) -> Callable[[dict[str, Any]], Roles]:
    """From a document to the words of each role."""
    asked = dict(ROLE_COLUMNS)
    for part in filter(None, given.split(";")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise HonesError(f"--roles {part!r} is not of the form object=COLUMN;attribute=red,green")
        asked[name] = value

    def read(document: dict[str, Any]) -> Roles:
        words = {}
        for role, value in asked.items():
            known = document.get(value, [] if ROLE_COLUMNS.get(role) == value else value.split(","))
            words[role] = [known] if isinstance(known, str) else [str(word) for word in known]
        return words

    return read


def _write(
    out: Path,
    model: Model,
    categories: list[_Category],
    settings: dict[str, Any],
    examples: int,
    replay: str,
) -> list[str]:
    names = [category.pairs.clean.task for category in categories]
    found = {
        name: trace_tables.averages(category.counted)
        for name, category in zip(names, categories, strict=True)
    }
    provenance = Provenance(
        **model_source(model.anatomy.model),
        shape=model.anatomy.shape,
        method="trace",
        weights=weights_digest(model.anatomy.model),
        settings=settings,
        examples=[
            task.example_set()
            for category in categories
            for task in (category.pairs.clean, category.pairs.edited)
        ],
    )
    report = {
        "format": "hones-eval trace",
        "replay": replay,
        "categories": [
            _category(name, category) | found[name] for name, category in zip(names, categories, strict=True)
        ],
    }
    whats: list[What] = settings["what"]
    with staged_folder(out, last=("trace.json",), stale=matching(*OWN)) as folder:
        write_json(folder / "trace.json", report | provenance.to_json())
        _write_tables(folder, names, categories, whats, examples)
        _write_figures(folder, names, categories, whats, examples)
    lines = [f"wrote {out / 'trace.json'} with its tables and figures; replay {replay}"]
    return lines + [line for category in categories for line in _lines(category)]


def _category(name: str, category: _Category) -> dict[str, Any]:
    return {
        "clean_task": name,
        "edited_task": category.pairs.edited.task,
        "pairs": len(category.counted),
        "right_on_both": category.right,
        "left_out": _reasons(category),
    }


def _write_tables(
    out: Path, names: list[str], categories: list[_Category], whats: list[What], examples: int
) -> None:
    streams = [what for what in whats if what not in BY_TOKEN]
    by_token = [what for what in whats if what in BY_TOKEN]
    all_of = list(zip(names, categories, strict=True))
    tables = {}
    if streams:
        tables["layers"] = [row for n, c in all_of for row in trace_tables.layer_table(n, c.counted)]
    if by_token:
        tables["tokens"] = [
            row for n, c in all_of for row in trace_tables.token_table(n, c.counted[:examples])
        ]
        tables["roles"] = [
            row
            for n, c in all_of
            for what in by_token
            for row in trace_tables.role_table(n, what, trace_tables.role_map(c.counted, what))
        ]
    for table, rows in tables.items():
        write_text(out / f"{table}.csv", trace_tables.csv_text(trace_tables.HEADERS[table], rows))


def _write_figures(
    out: Path, names: list[str], categories: list[_Category], whats: list[What], examples: int
) -> None:
    streams = [what for what in whats if what not in BY_TOKEN]
    if streams:
        curves = {
            name: {what: trace_tables.curve(category.counted, what) for what in streams}
            for name, category in zip(names, categories, strict=True)
        }
        figures.save(trace_figures.layer_curves(curves), out / "layers.png")
    for name, category in zip(names, categories, strict=True):
        for what in (each for each in whats if each in BY_TOKEN):
            title = f"{name}: {trace_figures.WHERE[what]} (pairs: {len(category.counted)})"
            found = trace_tables.role_map(category.counted, what)
            figures.save(trace_figures.role_figure(found, title), out / f"{name}_{what}_roles.png")
            for number, pair in enumerate(category.counted[:examples]):
                index = category.pairs.keys.index(pair.key)
                shown = [
                    task.images(at)
                    for task, at in zip(
                        (category.pairs.clean, category.pairs.edited),
                        category.pairs.places[index],
                        strict=True,
                    )
                ]
                drawn = trace_figures.pair_figure(pair, what, shown, "recovered")
                figures.save(drawn, out / f"{name}_{what}_pair{number}.png")


def _lines(category: _Category) -> list[str]:
    """The lines that report the result for a pair of tasks."""
    task = category.pairs.clean.task
    lines = [
        f"{task}: {_pairs(len(category.counted))} traced; the model is right on both images of "
        f"{category.right}; {len(category.left_out)} left out"
    ]
    for what in (each for each in category.counted[0].values if each not in BY_TOKEN):
        shares = trace_tables.curve(category.counted, what).recovered
        if shares is not None:
            best = max(range(len(shares)), key=shares.__getitem__)
            lines.append(
                f"{task}: putting back the {trace_figures.WHERE[what]} recovers most at layer {best}, "
                f"{shares[best]:.0%} of the lost logit difference"
            )
    if not trace_tables.lost(category.counted) > 0:
        lines.append(
            f"warning: {task}: on average the edit does not lower the logit difference of clean and edited "
            "answer, so there is no share to recover"
        )
    for reason, keys in _reasons(category).items():
        lines.append(f"warning: left out {_pairs(len(keys))}, the first is {keys[0]}: {reason}")
    return lines


def _pairs(count: int) -> str:
    return f"{count} pair{'' if count == 1 else 's'}"


def _reasons(category: _Category) -> dict[str, list[str]]:
    """The pairs that were left out, by the reason."""
    reasons: dict[str, list[str]] = {}
    for refused in category.left_out:
        reasons.setdefault(refused.reason, []).append(refused.key)
    return reasons
