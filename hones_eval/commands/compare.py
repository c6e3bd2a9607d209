"""`hones-eval compare`."""

from pathlib import Path
from typing import Any

from hones_eval.commands.shared import DType, Job, Rows, limits_of, names_in, say
from hones_eval.errors import HonesError
from hones_eval.jobs.compare import Comparison, Crossing, cross, load_named
from hones_eval.jobs.compare_levels import Sharing, levels_of, sharing
from hones_eval.reports import comparison as comparison_report


def compare(
    rankings: list[Path],
    out: Path,
    neurons: float | None = None,
    heads: int = 30,
    levels: str | None = None,
    model: str | None = None,
    model_args: str = "",
    tasks: str | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    limits: dict[str, int] | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 0,
) -> None:
    """Compare rankings of one model: layer curves, shared groups, overlaps; with a model, cross-masking.

    Args:
        rankings: folders that rank wrote, two or more.
        out: the folder to write compare.json, tables, figures and the groups' rankings to.
        neurons: the share of all neurons to select; by default each ranking's own.
        heads: how many heads to compare.
        levels: the semantic level of each ranking in their order, object,object,attribute, for mean overlaps
            within a level and across levels.
        model: with tasks, for the matrix "mask one ranking's neurons, measure another's task".
        model_args: as in lmms-eval --model_args.
        tasks: tasks to measure on, a,b,c, with other pictures than the rankings'.
        include_path: a folder with more task YAML files.
        limit: use at most so many examples of each task.
        limits: the limit of single tasks in place of that of all, {"hones_retrieval": 2500}, where an
            example is a candidate.
        offset: skip so many examples of each task first.
        gen_kwargs: as in lmms-eval --gen_kwargs, e.g. max_new_tokens=24.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: masked answers generated at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: of the random banks, the bootstrap and the permutations of levels.
    """
    comparison = Comparison(load_named(rankings), neurons, heads)
    shared: list[Sharing] = []
    if levels is not None:
        of_each = levels_of(list(comparison.rankings), levels.split(","))
        shared = sharing(comparison.overlaps(), of_each, seed)
    if (model is None) != (tasks is None):
        raise HonesError("cross-masking needs --model and --tasks; leave both out to compare scores alone")
    crossings: list[Crossing] = []
    first = True
    if model is not None and tasks is not None:
        names = names_in(tasks, "tasks")
        few = limits_of(names, limit, limits, "limits")
        chosen: dict[str, Any] = {
            "include_path": include_path,
            "offset": offset,
            "gen_kwargs": gen_kwargs,
        }
        machine = {"dtype": dtype, "batch_size": batch_size, "devices": devices, "num_nodes": num_nodes}
        job = Job.open(model, model_args, names[0], limit=few[names[0]], **chosen, **machine)  # type: ignore[arg-type]
        others = [job.on(name, limit=few[name], **chosen).examples for name in names[1:]]
        examples = [job.examples, *others]
        crossings = cross(comparison, job.replayer, examples, job.loop, seed)
        first = job.loop.is_first
    if first:
        report = comparison_report.write(comparison, crossings, shared, out)
        _say_comparison(report, out)


def _say_comparison(report: dict[str, Any], out: Path) -> None:
    say(f"wrote {out}: {len(report['rankings'])} rankings")
    for one in report["neuron_overlaps"]:
        chance = f"{one['chance']:.3g} by chance, {one['chance_by_layer']:.3g} by chance in the same layers"
        say(
            f"{one['first']} and {one['second']} share {one['shared']} neurons: "
            f"Jaccard {one['jaccard']:.3g}, {chance}"
        )
    for one in report["levels"]:
        more = "" if one["p"] is None else f" (p of more than across levels: {one['p']:.2g})"
        say(
            f"{one['sites']} {one['levels']}, {one['pairs']} pairs: mean Jaccard {one['jaccard']:.3g}, "
            f"{one['chance']:.3g} by chance, {one['chance_by_layer']:.3g} by chance in the same layers{more}"
        )
    for one in report["cross_task"]:
        drop = one["drop"]["value"]
        say(
            f"mask {one['masked']}, measure {one['measured']}: drop {drop:.4g} of {one['baseline']:.4g}, "
            f"random {one['random_drop']:.4g}"
        )
