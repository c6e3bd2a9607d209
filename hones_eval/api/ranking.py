"""Rank heads and neurons of a model on the examples of a task."""

import json
from pathlib import Path

from hones_eval.api.model import Model
from hones_eval.api.task_names import names_in
from hones_eval.choices import Bound, Method, Screen
from hones_eval.core.artifact import ModelShape, hash_of
from hones_eval.core.ranking import Ranking
from hones_eval.errors import HonesError
from hones_eval.jobs.head_search import Savings
from hones_eval.jobs.rank import Discovery, discover, provenance
from hones_eval.runs.checkpoint import Partial
from hones_eval.version import __version__

PAPER_HEADS, PAPER_TOTAL = 30, 32 * 32
"""HONES conditions neurons on 30 of the 1024 heads of LLaVA-1.5-7B."""


def rank(
    model: Model,
    tasks: str,
    *,
    method: Method = "hones",
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
        out: the folder to save the ranking to; while it is measured, progress is kept there in `partial`.
        resume: continue from the progress that a killed run of the same job left in `out`.

    A head's HONES score is the drop of the metric when its slice is replaced by the mean of the other heads:
    `score[l, h] = mean over examples of (metric - metric with head (l, h) replaced)`. V-SEAM's is the same
    drop of the answer's probability.

    Returns: the ranking, the same on every process.
    Raises: HonesError when the job cannot be done as asked.

    Example:
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
    (task, *others), savings = check_request(
        tasks,
        method,
        race=race,
        race_bound=race_bound,
        race_span=race_span,
        screen=screen,
        screen_share=screen_share,
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
        examples, heads=heads, neurons=neurons, gen_kwargs=gen_kwargs, **savings.settings()
    )
    source = provenance(model.anatomy, examples, method, settings, seed)
    contrast = [
        model.examples(other, include_path=include_path, limit=limit, offset=offset, gen_kwargs=gen_kwargs)
        for other in others
    ]
    partial = None
    if out is not None:
        fingerprint = hash_of([__version__, json.dumps(source.to_json(), sort_keys=True)])
        partial = Partial(Path(out) / "partial", fingerprint, resume)
    model.loop.partial = partial
    try:
        ranking = discover(
            Discovery(model.replayer, examples, model.loop, source, heads, neurons, contrast, savings)
        )
    finally:
        model.loop.partial = None
    if out is not None and partial is not None and model.loop.is_first:
        ranking.save(out)
        partial.clear()
    return ranking


def check_request(
    tasks: str,
    method: Method,
    *,
    race: float | None = None,
    race_bound: Bound = "betting",
    race_span: float = 1.0,
    screen: Screen | None = None,
    screen_share: float = 0.25,
) -> tuple[list[str], Savings]:
    """Check what can be checked before a model is loaded.

    Returns: the task to rank on, then those that `entropy` compares it with; and how heads are measured.
    Raises: HonesError for settings that do not go together.
    """
    savings = Savings(race, race_bound, race_span, screen, screen_share)
    if savings.settings() and method != "hones":
        raise HonesError(f"--race and --screen only apply to --method hones, not to {method}")
    return _tasks(tasks, method), savings


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


def _tasks(tasks: str, method: Method) -> list[str]:
    """The task to rank on, then those that `entropy` tells it apart from."""
    if method != "entropy":
        return [tasks]
    names = names_in(tasks, "tasks")
    if len(names) < 2:
        raise HonesError("entropy compares tasks: give the one to rank for and then others, --tasks a,b,c")
    return names
