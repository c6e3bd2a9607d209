"""`hones-eval compare`."""

from pathlib import Path
from typing import Any

from hones_eval.api.task_names import limits_of, names_in
from hones_eval.choices import Correction, DType, Rows
from hones_eval.commands.answer import Answer
from hones_eval.errors import HonesError


def compare(
    rankings: list[Path],
    out: Path,
    neurons: float | None = None,
    heads: int | None = None,
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
    correction: Correction = "holm",
) -> Answer:
    """Compare rankings of one model: neurons per layer, shared groups, overlaps; with a model, cross-masking.

    Args:
        rankings: folders that rank wrote, two or more.
        out: the folder to write compare.json, tables, figures and the groups' rankings to.
        neurons: the share of all neurons to select; by default each ranking's own.
        heads: how many heads to compare; by default the paper's share, 30 of 1024, at least 1 and at most 30.
        levels: the semantic level of each ranking, in the order of the rankings
            (object,object,attribute), for mean overlaps within a level and across levels.
        model: with --tasks, for the matrix "mask one ranking's neurons, measure another's task".
        model_args: as in lmms-eval --model_args.
        tasks: tasks to measure on, a,b,c, with other images than the rankings'.
        include_path: a folder with more task YAML files.
        limit: use at most this many examples of each task.
        limits: limits of single tasks that replace --limit, as {"hones_retrieval": 2500}, where an example is
            a candidate.
        offset: skip this many examples of each task first.
        gen_kwargs: as in lmms-eval --gen_kwargs, for example max_new_tokens=24.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: how many masked answers are generated at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: number of nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: for the random banks, the bootstrap and the permutations of levels.
        correction: of p-values over the rows of the report: holm, or benjamini_hochberg for the false
            discovery rate.

    Example:
        hones-eval compare runs/vqa/ranking runs/ocr/ranking --out runs/compare
    """
    from hones_eval.api.ranking import default_heads
    from hones_eval.jobs.compare import Comparison, Crossing, cross, load_named
    from hones_eval.jobs.compare_levels import Sharing, levels_of, sharing
    from hones_eval.reports import comparison as comparison_report

    loaded = load_named(rankings)
    if heads is None:
        heads = default_heads(next(iter(loaded.values())).provenance.shape)
    comparison = Comparison(loaded, neurons, heads)
    shared: list[Sharing] = []
    if levels is not None:
        of_each = levels_of(list(comparison.rankings), levels.split(","))
        shared = sharing(comparison.overlaps(), of_each, seed)
    if (model is None) != (tasks is None):
        raise HonesError("cross-masking needs --model and --tasks; leave both out to compare scores alone")
    crossings: list[Crossing] = []
    first = True
    if model is not None and tasks is not None:
        from hones_eval import api

        names = names_in(tasks, "tasks")
        few = limits_of(names, limit, limits, "limits")
        masked = api.load(
            model, model_args, dtype=dtype, batch_size=batch_size, devices=devices, num_nodes=num_nodes
        )
        examples = [
            masked.examples(
                name, limit=few[name], include_path=include_path, offset=offset, gen_kwargs=gen_kwargs
            )
            for name in names
        ]
        crossings = cross(comparison, masked.replayer, examples, masked.loop, seed, correction)
        first = masked.loop.is_first
    if not first:
        return Answer([])
    report = comparison_report.write(comparison, crossings, shared, out)
    return Answer(_lines(report, out), {"out": str(out), **report}, _headline(report))


def _headline(report: dict[str, Any]) -> str:
    """How much of their neurons the rankings share."""
    pairs = report["neuron_overlaps"]
    if not pairs:
        return f"{len(report['rankings'])} rankings compared"
    values = sorted(pair["jaccard"] for pair in pairs)
    if len(values) == 1:
        return f"The rankings share {pairs[0]['shared']} of their selected neurons (Jaccard {values[0]:.2g})"
    return (
        f"The selected neurons of {len(report['rankings'])} rankings overlap by Jaccard {values[0]:.2g} to "
        f"{values[-1]:.2g}"
    )


def _lines(report: dict[str, Any], out: Path) -> list[str]:
    """The overlaps beyond chance, and what masking one ranking's neurons costs on another's task."""
    lines = [f"wrote {out}: {len(report['rankings'])} rankings"]
    for pair in report["neuron_overlaps"]:
        lines.append(
            f"{pair['first']} and {pair['second']} share {pair['shared']} neurons: Jaccard "
            f"{pair['jaccard']:.3g}, {_chance(pair)}"
        )
    for level in report["levels"]:
        p = "" if level["p"] is None else f" (p of more than across levels: {level['p']:.2g})"
        lines.append(
            f"{level['sites']} {level['levels']}, {level['pairs']} pairs: mean Jaccard "
            f"{level['jaccard']:.3g}, {_chance(level)}{p}"
        )
    for cell in report["cross_task"]:
        lines.append(
            f"mask {cell['masked']}, measure {cell['measured']}: drop {cell['drop']['value']:.4g} of "
            f"{cell['baseline']:.4g}, random {cell['random_drop']:.4g}"
        )
    return lines


def _chance(found: dict[str, Any]) -> str:
    return f"{found['chance']:.3g} by chance, {found['chance_by_layer']:.3g} by chance in the same layers"
