"""Rank heads and neurons of a model on the examples of a task."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hones_eval.api.model import Model
from hones_eval.api.task_names import names_in
from hones_eval.choices import Absolute, Bound, Estimate, Objective, Screen
from hones_eval.core.artifact import ModelShape, Provenance, hash_of
from hones_eval.core.head_edits import HeadEditName, head_edit
from hones_eval.core.lock import writes_to_out
from hones_eval.core.ranking import Ranking
from hones_eval.core.scope import Scope
from hones_eval.errors import HonesError
from hones_eval.jobs.rank import Discovery, discover, provenance
from hones_eval.methods.attribution import AttributionSettings
from hones_eval.methods.confirm import check_has_estimates
from hones_eval.methods.head_search import Savings
from hones_eval.methods.registry import METHODS, MethodName
from hones_eval.methods.registry import method as registered
from hones_eval.runs.checkpoint import Partial
from hones_eval.version import __version__

PAPER_HEADS, PAPER_TOTAL = 30, 32 * 32
"""HONES conditions neurons on 30 of the 1024 heads of LLaVA-1.5-7B."""


@writes_to_out
def rank(
    model: Model,
    tasks: str,
    *,
    method: MethodName = "hones",
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    metric: str | None = None,
    target: str | None = None,
    heads: int | None = None,
    neurons: float = 0.01,
    seed: int = 0,
    race: float | None = None,
    race_bound: Bound = "betting",
    race_span: float = 1.0,
    screen: Screen | None = None,
    screen_share: float = 0.25,
    budget: float | None = None,
    metric_only: bool = False,
    edit: HeadEditName = "mean",
    estimate: Estimate = "first_order",
    objective: Objective = "margin",
    absolute: Absolute = "position",
    confirm: int | None = None,
    joint: bool = False,
    scope: str = "all",
    out: Path | None = None,
    resume: bool = False,
) -> Ranking:
    """Score attention heads and FFN neurons on the examples of an lmms-eval task.

    Args:
        model: what `load` returned.
        tasks: an lmms-eval task; for `entropy`, that task and then the ones to tell it apart from, a,b,c.
        method: `hones`, `vseam`, or a baseline; see `hones-eval rank --help`.
        include_path: a folder with more task YAML files.
        limit: use at most this many examples.
        offset: skip this many examples first.
        gen_kwargs: as in lmms-eval --gen_kwargs, such as `max_new_tokens=24`.
        metric: the task's metric to use; by default its first that is a number.
        target: the column, or a template, of the gold answer, where it is not found automatically.
        heads: how many heads neurons are conditioned on (hones), or how many are named as best and worst
            (vseam); by default the paper's share, 30 of 1024, and at least 1.
        neurons: the share of all neurons to select, 0.01 for one percent.
        seed: for methods that draw at random, and for the order of a race.
        race: the accepted risk that the best heads of a race differ from the exact ones.
        race_bound: the confidence bound of a race.
        race_span: the largest possible difference of the metric between two answers.
        screen: measure only the heads that this estimate finds best.
        screen_share: the share of all heads that is measured after a screen.
        budget: the share of an exact search's head-examples to measure; chooses screen and race by itself.
        metric_only: leave out the gold answer's log-probability where it takes passes of its own.
        edit: what replaces a head: the mean of the other heads, zeros, or its output for another example.
        estimate: for `atp`; one gradient, or integrated gradients.
        objective: for `atp`; what the gradient is taken of.
        absolute: for `atp`; whether absolute values are taken per token position or per example.
        confirm: the number of best heads and of best neurons whose exact effect is measured and ranked by.
        joint: with `confirm`; also mask these neurons all together, restore each alone, and rank neurons by
            the mean of both effects, each as a share of its largest.
        scope: the tokens at which sites are edited, as in `steer`; for `hones`, `vseam` and `atp`. Other
            scopes than `all` take full passes.
        out: the folder to save the ranking to; while it is measured, progress is kept there in `partial`.
        resume: continue from the progress that a killed run of the same job left in `out`; a finished
            ranking of the same job is returned as it is.

    A head's HONES score is the drop of the metric when its slice is replaced by the mean of the other heads:
    `score[l, h] = mean over examples of (metric - metric with head (l, h) replaced)`. V-SEAM's is the same
    drop of the answer's probability.

    Returns: the ranking, the same on every process.
    Raises: HonesError when the job cannot be done as asked.

    Examples:
        >>> from hones_eval import load
        >>> from hones_eval.toy import checkpoint_path
        >>> model = load("hones_llava", f"pretrained={checkpoint_path()}")
        >>> ranking = rank(model, "scenes_vqa_relation_discovery", limit=2, heads=4)
        >>> ranking.head_scores.shape, ranking.neuron_scores.shape
        (torch.Size([6, 8]), torch.Size([6, 344]))
        >>> (best, score), *others = ranking.top_heads(3)
        >>> len(ranking.neurons())  # 1 % of 6 * 344
        21
    """
    (task, *others), options = check_request(
        tasks,
        method,
        race=race,
        race_bound=race_bound,
        race_span=race_span,
        screen=screen,
        screen_share=screen_share,
        budget=budget,
        metric_only=metric_only,
        edit=edit,
        estimate=estimate,
        objective=objective,
        absolute=absolute,
        confirm=confirm,
        joint=joint,
        scope=scope,
    )
    examples = model.examples(
        task,
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        metric=metric,
        target=target,
    )
    heads = default_heads(model.anatomy.shape) if heads is None else check_heads(model, heads)
    settings = model.settings(
        examples, heads=heads, neurons=neurons, gen_kwargs=gen_kwargs, **options.recorded
    )
    source = provenance(model.anatomy, examples, method, settings, seed)
    contrast = [
        model.examples(other, include_path=include_path, limit=limit, offset=offset, gen_kwargs=gen_kwargs)
        for other in others
    ]
    if resume and out is not None and (finished := _finished(Path(out), source)) is not None:
        return finished
    partial = None
    if out is not None:
        fingerprint = hash_of([__version__, json.dumps(source.to_json(), sort_keys=True)])
        partial = Partial(Path(out) / "partial", fingerprint, resume)
    model.loop.partial = partial
    try:
        job = Discovery(
            model.replayer.in_scope(scope),
            examples,
            model.loop,
            source,
            heads,
            neurons,
            contrast,
            options.savings,
            edit,
            options.attribution,
            confirm,
            joint,
        )
        ranking = discover(job)
    finally:
        model.loop.partial = None
    if out is not None and partial is not None and model.loop.is_first:
        ranking.save(out)
        partial.clear()
    return ranking


def _finished(out: Path, source: Provenance) -> Ranking | None:
    """The ranking in a folder, if it is that of this very job; None otherwise."""
    if not (out / "ranking.json").is_file() or (out / "partial").is_dir():
        return None
    try:
        saved = Ranking.load(out)
    except HonesError:  # damaged, or of a version that is too new: it is measured again
        return None
    same = [json.dumps(made.to_json(), sort_keys=True) for made in (saved.provenance, source)]
    return saved if same[0] == same[1] else None


def ranked_tasks(tasks: str, method: MethodName) -> list[str]:
    """The values of `tasks` for one ranking each. Raises: HonesError when a name is empty or given twice."""
    return [tasks] if registered(method).contrasts_tasks or "," not in tasks else names_in(tasks, "tasks")


def check_request(
    tasks: str,
    method: MethodName,
    *,
    race: float | None = None,
    race_bound: Bound = "betting",
    race_span: float = 1.0,
    screen: Screen | None = None,
    screen_share: float = 0.25,
    budget: float | None = None,
    metric_only: bool = False,
    edit: HeadEditName = "mean",
    estimate: Estimate = "first_order",
    objective: Objective = "margin",
    absolute: Absolute = "position",
    confirm: int | None = None,
    joint: bool = False,
    scope: str = "all",
) -> tuple[list[str], "Options"]:
    """Check what can be checked before a model is loaded.

    Returns: the task to rank on, then those that `entropy` compares it with; and the method's options.
    Raises: HonesError for settings that do not go together.
    """
    row = registered(method)
    savings = Savings(race, race_bound, race_span, screen, screen_share, budget, metric_only)
    attribution = AttributionSettings(estimate, objective, absolute)
    recorded: dict[str, Any] = dict(savings.settings())
    if recorded and not row.savings:
        flags = "--budget, --metric_only, --race and --screen"
        raise HonesError(f"{flags} only apply to --method {_having('savings')}, not to {method}")
    head_edit(edit)
    if edit != "mean":
        if not row.head_edit:
            raise HonesError(f"--edit only applies to --method {_having('head_edit')}, not to {method}")
        recorded["edit"] = edit
    if row.gradients:
        recorded |= asdict(attribution)
    elif attribution != AttributionSettings():
        flag = next(name for name, value in asdict(attribution).items() if value != _DEFAULTS[name])
        raise HonesError(f"--{flag} only applies to --method {_having('gradients')}, not to {method}")
    if confirm is not None:
        check_has_estimates(method)
        recorded["confirm"] = confirm
    if joint:
        if confirm is None or "neurons" not in check_has_estimates(method):
            raise HonesError("--joint needs --confirm N, and a method that estimates effects of neurons")
        recorded["joint"] = True
    if not Scope.parse(scope).is_all:
        check_scope(scope, method)
        recorded["scope"] = scope
    return _tasks(tasks, method), Options(savings, attribution, recorded)


def check_scope(given: str, method: MethodName) -> None:
    """Raise HonesError for a scope that a method does not know, or at which it reads no neurons."""
    scope = Scope.parse(given)
    if scope.is_all:
        return
    if method not in EDITING:
        raise HonesError(f"--scope only applies to --method {', '.join(EDITING)}, not to {method}")
    if method == "hones" and not {"prompt", "text", "last"} & {*scope.names}:
        raise HonesError(
            f"--scope {scope} leaves out the last token of the prompt, where --method hones reads neurons: "
            "use --method atp, or vseam for heads"
        )


class Options(NamedTuple):
    """The options of a method, and those that a ranking records."""

    savings: Savings
    attribution: AttributionSettings
    recorded: dict[str, Any]


EDITING = ("hones", "vseam", "atp")
"""Methods that edit sites, or estimate the effect of doing so."""
_DEFAULTS = asdict(AttributionSettings())


def _having(feature: str) -> str:
    """The names of the methods that have a feature."""
    *others, last = (name for name, row in METHODS.items() if getattr(row, feature))
    return f"{', '.join(others)} and {last}" if others else last


def default_heads(shape: ModelShape) -> int:
    """The paper's share of a model's heads: 30 of 1024, at least 1 and at most 30."""
    return min(PAPER_HEADS, max(1, round(shape.layers * shape.heads * PAPER_HEADS / PAPER_TOTAL)))


def check_heads(model: Model, heads: int) -> int:
    """The number of heads that was asked for. Raises: HonesError when the model does not have that many."""
    shape = model.anatomy.shape
    total = shape.layers * shape.heads
    if not 1 <= heads <= total:
        raise HonesError(
            f"--heads {heads}: cannot choose {heads} of {total} heads ({shape.layers} layers of "
            f"{shape.heads}): ask for 1 to {total}"
        )
    return heads


def _tasks(tasks: str, method: MethodName) -> list[str]:
    """The task to rank on, then those that `entropy` tells it apart from."""
    if not registered(method).contrasts_tasks:
        return [tasks]
    names = names_in(tasks, "tasks")
    if len(names) < 2:
        raise HonesError(
            f"{method} compares tasks: give the task to rank for and then the others, as --tasks a,b,c"
        )
    return names
