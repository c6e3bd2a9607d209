"""`hones-eval verify`."""

from pathlib import Path
from typing import Any

from hones_eval.commands.shared import DType, Job, Rows, say
from hones_eval.core.artifact import write_json
from hones_eval.core.ranking import Ranking
from hones_eval.jobs.verify import Sites, Verification
from hones_eval.jobs.verify import verify as verify_banks
from hones_eval.reports import figures


def verify(
    ranking: Path,
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
    sites: Sites = "auto",
    neurons: float | None = None,
    heads: int = 10,
    trials: int = 5,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 0,
) -> None:
    """Mask the sites that a ranking selects on held-out examples, beside matched random ones.

    Args:
        ranking: a folder that rank or compare wrote.
        model: as in lmms-eval --model; the model that the ranking was made for.
        tasks: the lmms-eval task to measure on, with other pictures than the ranking's.
        out: the folder to write verify.json and verify.png to.
        model_args: as in lmms-eval --model_args.
        include_path: a folder with more task YAML files.
        limit: use at most so many examples.
        offset: skip so many examples first.
        gen_kwargs: as in lmms-eval --gen_kwargs, e.g. max_new_tokens=24.
        metric: which of the task's metrics to use; by default its first that is a number.
        target: the column, or a template, of the gold answer, where it is not found by itself.
        sites: mask neurons or heads; auto is heads for rankings by vseam and neurons for the others.
        neurons: the share of all neurons to mask; by default the share of the ranking.
        heads: how many positive, how many negative and how many random heads to mask.
        trials: random banks to compare with, two or more; with fewer than five a warning says so.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: masked answers generated at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: of the random banks and of the bootstrap.
    """
    scores = Ranking.load(ranking)
    job = Job.open(
        model,
        model_args,
        tasks,
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
    report = verify_banks(
        Verification(scores, job.replayer, job.examples, job.loop, sites, neurons, heads, trials, seed)
    )
    if job.loop.is_first:
        write_json(out / "verify.json", report | {"settings": job.settings(gen_kwargs=gen_kwargs)})
        figures.save(figures.drops(report), out / "verify.png")
        _say_drops(report, out)


def _say_drops(report: dict[str, Any], out: Path) -> None:
    name, count = report["metric"], report["examples"]["count"]
    say(f"wrote {out}: {name} {report['baseline']['metric']:.4g} unedited on {count} examples")
    for bank in report["beyond_random"]:
        found = report["banks"][bank]
        relative = found["relative_drop"]["value"]
        share = "" if relative is None else f", {relative:.1%}"
        say(
            f"{report['bank_sizes'][bank]} {bank} {report['sites']} masked: {name} {found['metric']:.4g}, "
            f"drop {_interval(found['metric_drop'])}{share}"
        )
    random = report["random"]["metric"]
    say(f"random banks: drop {random['drop_mean']:.4g} on average, {random['drop_largest']:.4g} at most")
    for warning in report["warnings"]:
        say(f"warning: {warning}")


def _interval(drop: dict[str, Any]) -> str:
    if drop["low"] is None:
        return f"{drop['value']:.4g}"
    return f"{drop['value']:.4g} [{drop['low']:.4g}, {drop['high']:.4g}]"
