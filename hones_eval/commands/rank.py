"""`hones-eval rank`."""

import json
from pathlib import Path
from typing import Any

from hones_eval.commands.shared import DType, Job, Rows, names_in, say
from hones_eval.core.artifact import hash_of
from hones_eval.core.ranking import Ranking
from hones_eval.errors import HonesError
from hones_eval.jobs.head_search import Savings, Screen
from hones_eval.jobs.rank import Discovery, Method, discover, provenance
from hones_eval.runs.checkpoint import Partial
from hones_eval.runs.racing import Bound
from hones_eval.version import __version__


def rank(
    method: Method,
    model: str,
    tasks: str,
    out: Path,
    model_args: str = "",
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    metric: str | None = None,
    target: str | None = None,
    heads: int = 30,
    neurons: float = 0.01,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 0,
    resume: bool = False,
    race: float | None = None,
    race_bound: Bound = "betting",
    race_span: float = 1.0,
    screen: Screen | None = None,
    screen_share: float = 0.25,
) -> None:
    """Score attention heads and FFN neurons on the examples of an lmms-eval task.

    Args:
        method: hones (the task's metric; also neurons) or vseam (the answer's probability; heads); to
            compare with, by neurons alone: random, activation (mean size), write_norm (the same times the
            norm of what is written), dvp (what is written towards the answer), entropy (active in this task
            and not in others).
        model: any lmms-eval model whose wrapper calls generate, as in lmms-eval --model.
        tasks: the lmms-eval task to discover on, one that asks for an answer or a choice; for entropy the
            tasks to tell it apart from follow it, a,b,c.
        out: the folder to write ranking.json and ranking.safetensors to.
        model_args: as in lmms-eval --model_args.
        include_path: a folder with more task YAML files.
        limit: use at most so many examples.
        offset: skip so many examples first; keep discovery, development and test apart with it.
        gen_kwargs: as in lmms-eval --gen_kwargs, e.g. max_new_tokens=24.
        metric: which of the task's metrics to use, or log_probability, that of the gold answer; by default
            the task's first that is a number.
        target: the column, or a template, of the gold answer, where it is not found by itself.
        heads: how many heads to condition neurons on (hones), or to name as best and worst (vseam).
        neurons: the share of all neurons to select, 0.01 for one percent.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: edited passes run at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: recorded, and used by methods that draw at random and for the order of a race.
        resume: go on from what a killed run of the same command left in OUT/partial.
        race: for hones with a metric that is a mean over examples: the risk, such as 0.05, that the best
            heads differ from the exact ones (up to ties). Examples come in random order, and a head is no
            longer measured once a bound shows that it is, or is not, among the best.
        race_bound: the bound that a race goes by, betting or the wider bernstein (empirical Bernstein).
        race_span: the largest difference of the metric between two answers, 1 for metrics from 0 to 1.
        screen: first_order (for hones) estimates all heads by one backward pass an example, which needs
            gradients and their memory, and measures only the best of them. What it leaves out is not known.
        screen_share: the share of all heads that is measured after a screen.
    """
    savings = Savings(race, race_bound, race_span, screen, screen_share)
    if savings.settings() and method != "hones":
        raise HonesError(f"--race and --screen save work of --method hones; {method} has nothing to save")
    task, others = tasks, list[str]()
    if method == "entropy":
        task, *others = names_in(tasks, "tasks")
        if not others:
            raise HonesError(
                "entropy compares tasks: give the one to rank for and then others, --tasks a,b,c"
            )
    job = Job.open(
        model,
        model_args,
        task,
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        metric=metric,
        target=target,
        dtype=dtype,
        batch_size=batch_size,
        devices=devices,
        num_nodes=num_nodes,
    )
    settings = job.settings(heads=heads, neurons=neurons, gen_kwargs=gen_kwargs, **savings.settings())
    source = provenance(job.anatomy, job.examples, method, settings, seed)
    contrast = [
        job.on(other, include_path=include_path, limit=limit, offset=offset, gen_kwargs=gen_kwargs).examples
        for other in others
    ]
    partial = Partial(
        out / "partial", hash_of([__version__, json.dumps(source.to_json(), sort_keys=True)]), resume
    )
    job.loop.partial = partial
    ranking = discover(
        Discovery(job.replayer, job.examples, job.loop, source, heads, neurons, contrast, savings)
    )
    if job.loop.is_first:
        ranking.save(out)
        partial.clear()
        _say_ranking(ranking, out)


def _say_ranking(ranking: Ranking, out: Path) -> None:
    report = ranking.report or {}
    if ranking.provenance.method not in ("hones", "vseam"):
        say(f"wrote {out}: {report['examples']} examples, neurons by {ranking.provenance.method}")
        return
    say(f"wrote {out}: {report['examples']} examples, replay {report['replay']}")
    if ranking.provenance.method == "vseam":
        say(
            f"the likeliest first token was right in {report['correct_examples']} of {report['examples']}; "
            f"{len(report['top_positive'])} heads help, {len(report['top_negative'])} hurt"
        )
        for warning in report["warnings"]:
            say(f"warning: {warning}")
        return
    say(f"{report['metric']} {report['base_metric']:.4g} unedited")
    if "margin" in report:
        say(
            f"answers are margins {report['margin']}; {report['examples_sharing_a_prefix']} examples shared "
            f"their picture's prefix with others ({report['prefix_sharing']})"
        )
    _say_savings(report)
    if not report["heads_with_positive_score"]:
        say(
            "warning: no head's replacement lowers the metric, so neurons are ranked by their contribution "
            "alone; more examples, or a task that the model can do, give heads a score"
        )


def _say_savings(report: dict[str, Any]) -> None:
    if "screen" in report:
        one = report["screen"]
        say(
            f"screened by first-order estimates (with gradients): {one['heads_measured']} heads measured, "
            f"{one['heads_not_measured']} not, which stand as 0 and are never chosen"
        )
    if "race" in report:
        one = report["race"]
        say(
            f"raced at risk {one['delta']:g}: {one['work_saved']:.0%} of the work saved, "
            f"{one['examples_run']} of {report['examples']} examples run, "
            f"{len(one['undecided'])} heads measured on all of them"
        )
