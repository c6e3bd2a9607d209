"""`hones-eval trace`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from hones_eval.commands.documents import keys_of
from hones_eval.commands.shared import DType, Job, Rows, names_in, say
from hones_eval.core.artifact import Provenance, write_json, write_text
from hones_eval.core.weights import weights_digest
from hones_eval.engine.tokens import Roles
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.answers.tokens import tokenizer_of
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods.tracing import BY_TOKEN, WHATS, CausalTrace, Pairs, Refused, Traced, What
from hones_eval.reports import figures, trace_figures, trace_tables
from hones_eval.runs.lightning import Loop

# Columns of this package's tasks that say which words of a question play a role.
ROLE_COLUMNS = {"object": "objects", "attribute": "attributes", "relation": "relations"}
Only = Literal["all", "right"]


def trace(
    clean: str,
    edited: str,
    model: str,
    out: Path,
    what: str = "image",
    model_args: str = "",
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    roles: str = "",
    only: Only = "all",
    examples: int = 3,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> None:
    """Run edited pictures with a clean picture's activations put back, place by place (causal tracing).

    Writes trace.json (averages, counts, what was left out and why), layers.csv, roles.csv, tokens.csv (of
    some pairs), and heat maps and curves as PNG. Documents of the two tasks are matched by question_id, or
    else by their number. Layer l is where what was put back is read; the last is the final norm.

    Args:
        clean: the lmms-eval task with the clean pictures; several with commas, one curve each.
        edited: the task with the edited pictures, whose answers differ; as many as in --clean.
        model: as in lmms-eval --model.
        out: the folder to write to.
        what: the residual stream at all image tokens, all text tokens or the last token, or the attention or
            ffn output of one text token at a time; image, text, last, attention, ffn, several with commas.
        model_args: as in lmms-eval --model_args.
        include_path: a folder with more task YAML files.
        limit: trace at most so many pairs of each task.
        offset: skip so many documents of the clean task first.
        gen_kwargs: as in lmms-eval --gen_kwargs.
        roles: words that play a role in the prompt, as object=COLUMN;attribute=red,green (semicolons).
        only: average over all pairs, or those on both of whose pictures the model's likeliest token is right.
        examples: how many pairs get figures of their own and rows in tokens.csv.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: patched passes run at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: nodes; torchrun or srun starts the command on each (docs/distributed.md).
    """
    tasks = _task_pairs(clean, edited)
    if examples < 0:
        raise HonesError(f"--examples {examples}: give how many pairs get figures, 0 or more")
    whats = _whats(what)
    read = _role_reader(roles)
    job = Job.open(
        model,
        model_args,
        tasks[0][0],
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        dtype=dtype,
        batch_size=batch_size,
        devices=devices,
        num_nodes=num_nodes,
    )
    rows = None if batch_size == "auto" else batch_size
    method = CausalTrace(job.anatomy, tokenizer_of(job.lmm), whats, rows)
    categories = []
    for place, (one, other) in enumerate(tasks):
        first = job.examples
        if place:
            first = job.on(
                one, include_path=include_path, limit=limit, offset=offset, gen_kwargs=gen_kwargs
            ).examples
        twin = job.on(other, include_path=include_path, gen_kwargs=gen_kwargs).examples
        pairs = Pairs(
            first, twin, keys_of(first, twin), [read(first.document(i)) for i in range(len(first))], limit
        )
        categories.append(_run(job.loop, method, pairs, only))
    if job.loop.is_first:
        settings = job.settings(what=whats, only=only, roles=roles)
        replay = method.patcher.inexact
        _write(
            out, job, categories, settings, examples, "exact" if replay is None else f"not exact: {replay}"
        )


@dataclass(frozen=True, eq=False)
class _Category:
    """One pair of tasks, traced: the pairs that count, those left out with the reason, and all of them."""

    pairs: Pairs
    counted: list[Traced]
    left_out: list[Refused]
    right: int


def _run(loop: Loop, method: CausalTrace, pairs: Pairs, only: Only) -> _Category:
    totals = loop.run(cast(TaskExamples, pairs), cast(Any, method), f"trace {pairs.clean.task}")
    records: list[Traced | Refused] = [totals.records[index] for index in sorted(totals.records)]
    counted = [one for one in records if isinstance(one, Traced)]
    left_out = [one for one in records if isinstance(one, Refused)]
    left_out += [Refused(key, f"it has no twin in {pairs.edited.task}") for key in pairs.unmatched]
    right = [one for one in counted if all(one.right)]
    if only == "right":
        left_out += [
            Refused(one.key, "the model is not right on both pictures")
            for one in counted
            if not all(one.right)
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
        raise HonesError(f"--clean names {len(first)} tasks and --edited {len(second)}; give a twin for each")
    return list(zip(first, second, strict=True))


def _whats(what: str) -> list[What]:
    asked = list(dict.fromkeys(what.split(",")))
    unknown = [one for one in asked if one not in WHATS]
    if unknown:
        raise HonesError(f"--what {unknown[0]!r} is unknown; choose from {', '.join(WHATS)}")
    return cast(list[What], asked)


def _role_reader(given: str) -> Callable[[dict[str, Any]], Roles]:
    """From a document to the words of each role."""
    asked = dict(ROLE_COLUMNS)
    for one in filter(None, given.split(";")):
        name, equals, value = one.partition("=")
        if not (name and equals and value):
            raise HonesError(f"--roles {one!r} is not of the form object=COLUMN;attribute=red,green")
        asked[name] = value

    def read(document: dict[str, Any]) -> Roles:
        words = {}
        for role, value in asked.items():
            known = document.get(value, [] if ROLE_COLUMNS.get(role) == value else value.split(","))
            words[role] = [known] if isinstance(known, str) else [str(word) for word in known]
        return words

    return read


def _write(
    out: Path, job: Job, categories: list[_Category], settings: dict[str, Any], examples: int, replay: str
) -> None:
    names = [one.pairs.clean.task for one in categories]
    found = {name: trace_tables.averages(one.counted) for name, one in zip(names, categories, strict=True)}
    config = job.anatomy.model.config
    provenance = Provenance(
        base_model=str(getattr(config, "name_or_path", "") or type(job.anatomy.model).__name__),
        revision=getattr(config, "_commit_hash", None),
        shape=job.anatomy.shape,
        method="trace",
        weights=weights_digest(job.anatomy.model),
        settings=settings,
        examples=[task.example_set() for one in categories for task in (one.pairs.clean, one.pairs.edited)],
    )
    report = {
        "format": "hones-eval trace",
        "replay": replay,
        "categories": [
            _category(name, one) | found[name] for name, one in zip(names, categories, strict=True)
        ],
    }
    write_json(out / "trace.json", report | provenance.to_json())
    whats: list[What] = settings["what"]
    _write_tables(out, names, categories, whats, examples)
    _write_figures(out, names, categories, whats, examples)
    for one in categories:
        _say(one)
    say(f"wrote {out / 'trace.json'} with its tables and figures; replay {replay}")


def _category(name: str, one: _Category) -> dict[str, Any]:
    return {
        "clean_task": name,
        "edited_task": one.pairs.edited.task,
        "pairs": len(one.counted),
        "right_on_both": one.right,
        "left_out": _reasons(one),
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
            name: {what: trace_tables.curve(one.counted, what) for what in streams}
            for name, one in zip(names, categories, strict=True)
        }
        figures.save(trace_figures.layer_curves(curves), out / "layers.png")
    for name, one in zip(names, categories, strict=True):
        for what in (each for each in whats if each in BY_TOKEN):
            title = f"{name}: {trace_figures.WHERE[what]} (pairs: {len(one.counted)})"
            found = trace_tables.role_map(one.counted, what)
            figures.save(trace_figures.role_figure(found, title), out / f"{name}_{what}_roles.png")
            for number, pair in enumerate(one.counted[:examples]):
                index = one.pairs.keys.index(pair.key)
                shown = [
                    task.images(at)
                    for task, at in zip(
                        (one.pairs.clean, one.pairs.edited), one.pairs.places[index], strict=True
                    )
                ]
                drawn = trace_figures.pair_figure(pair, what, shown, "recovered")
                figures.save(drawn, out / f"{name}_{what}_pair{number}.png")


def _say(one: _Category) -> None:
    say(
        f"{one.pairs.clean.task}: {len(one.counted)} pairs traced; the model is right on both pictures of "
        f"{one.right}; {len(one.left_out)} left out"
    )
    if not trace_tables.lost(one.counted) > 0:
        say(
            f"warning: {one.pairs.clean.task}: on average the edit does not lower the logit difference of "
            "clean and edited answer, so there is no share to recover"
        )
    for reason, keys in _reasons(one).items():
        say(f"warning: left out {len(keys)} pairs, the first is {keys[0]}: {reason}")


def _reasons(one: _Category) -> dict[str, list[str]]:
    """The pairs that were left out, by the reason."""
    reasons: dict[str, list[str]] = {}
    for refused in one.left_out:
        reasons.setdefault(refused.reason, []).append(refused.key)
    return reasons
