"""`hones-eval spike-in`."""

from pathlib import Path
from typing import Any

from hones_eval.choices import Correction, DType, Plant, Rows, Way, check_damage
from hones_eval.commands.answer import Answer
from hones_eval.errors import HonesError
from hones_eval.methods.registry import MethodName as Method


def spike_in(
    ranking: Path,
    model: str,
    tasks: str,
    out: Path,
    model_args: str = "",
    damp: float = 0.25,
    plant: Plant = "neurons",
    neurons: float = 0.01,
    heads: int = 4,
    method: Method = "hones",
    how: list[Way] | None = None,
    factor: float = 2.0,
    trials: int = 5,
    chosen_on_random: bool = False,
    discovery: str | None = None,
    development: str | None = None,
    parts: list[int] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    gen_kwargs: str | None = None,
    metric: str | None = None,
    target: str | None = None,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 0,
    correction: Correction = "holm",
    scope: str = "all",
) -> Answer:
    """Would this pipeline find a gain here, if there was one? Damage the model and measure the repair.

    Damps the best sites of a ranking by hooks, ranks and scales the damaged model as a user would, and
    reports on test examples how much of the loss is recovered, with the exact repair and random sites for
    comparison. The model's files are not changed.

    Args:
        ranking: a folder that rank wrote for the undamaged model; the planted sites are its best.
        model: as in lmms-eval --model.
        tasks: the task to test on. Scales are chosen on TASK_development and sites on TASK_discovery.
        out: the folder to write spike_in.json, spike_in.md and spike_in.png to.
        model_args: as in lmms-eval --model_args.
        damp: the scale of the planted sites, above 0 and below 1.
        plant: damp the ranking's best neurons or best heads, or random neurons of the same layers.
        neurons: the share of all neurons to plant, and to select for the ways that scale a selection; tuned
            may scale all heads and neurons.
        heads: how many heads to plant and to select.
        method: how the damaged model is ranked.
        how: ways to choose the scales, each a row of the table; by default tuned.
        factor: fixed: what the selected neurons are multiplied by.
        trials: random controls per row: the same scales on random sites of the same layers.
        chosen_on_random: also choose scales on a random bank that is matched to the planted one by layer.
        discovery: the task to rank on, in place of TASK_discovery.
        development: the task to choose scales on, in place of TASK_development.
        parts: for a task without such splits, the sizes of three consecutive parts, [64,64,200].
        include_path: a folder with more task YAML files.
        limit: use at most this many examples for discovery and as many for development.
        test_limit: use at most this many test examples.
        gen_kwargs: as in lmms-eval --gen_kwargs, for example max_new_tokens=24.
        metric: the task's metric to use; by default its first that is a number.
        target: the column, or a Jinja template, of the gold answer, where it is not found automatically.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: how many edited passes run at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: number of nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: for everything that is drawn at random.
        correction: of p-values over the rows of the report: holm, or benjamini_hochberg for the false
            discovery rate.
        scope: the tokens at which sites are damped, ranked and scaled: all, prompt, image, text, last,
            generated, or several joined by +; for --method hones, vseam and atp.

    Example:
        hones-eval spike-in --ranking runs/vqa --model llava_hf --model_args pretrained=... \\
            --tasks vqav2_val --parts "[200,200,500]" --damp 0.25 --out runs/vqa-spike-in
    """
    check_damage(damp, trials)
    if parts is not None and (len(parts) != 3 or min(parts) < 1):
        raise HonesError(f"--parts {parts}: give three sizes, for discovery, development and test")
    given = {"limit": limit, "test_limit": test_limit, "discovery": discovery, "development": development}
    unused = [name for name, value in given.items() if value is not None]
    if parts is not None and unused:
        raise HonesError(f"--{unused[0]} has no effect with --parts, which cuts --tasks {tasks} itself")
    from hones_eval import api
    from hones_eval.api.ranking import check_scope
    from hones_eval.core.ranking import Ranking
    from hones_eval.jobs.spike_in import SpikeIn
    from hones_eval.jobs.spike_in import spike_in as run
    from hones_eval.reports import spike_in as report_of

    check_scope(scope, method)

    scores = Ranking.load(ranking)
    loaded = api.load(
        model, model_args, dtype=dtype, batch_size=batch_size, devices=devices, num_nodes=num_nodes
    )
    shared: dict[str, Any] = {
        "include_path": include_path,
        "gen_kwargs": gen_kwargs,
        "metric": metric,
        "target": target,
    }
    names = (discovery or f"{tasks}_discovery", development or f"{tasks}_development", tasks)
    cuts: list[dict[str, Any]] = [{"limit": limit}, {"limit": limit}, {"limit": test_limit}]
    if parts is not None:
        names = (tasks, tasks, tasks)
        cuts = [{"limit": size, "offset": sum(parts[:place])} for place, size in enumerate(parts)]
    examples = [loaded.examples(name, **cut, **shared) for name, cut in zip(names, cuts, strict=True)]
    job = SpikeIn(
        scores,
        loaded.replayer,
        loaded.loop,
        discovery=examples[0],
        development=examples[1],
        test=examples[2],
        plant=plant,
        neurons=neurons,
        heads=heads,
        damp=damp,
        method=method,
        ways=how or ["tuned"],
        factor=factor,
        trials=trials,
        chosen_on_random=chosen_on_random,
        seed=seed,
        correction=correction,
        scope=scope,
    )
    report = run(job)
    report["settings"] |= loaded.settings(job.test, gen_kwargs=gen_kwargs)
    if not loaded.loop.is_first:
        return Answer([])
    report_of.write(report, out)
    return Answer([f"wrote {out}", *report_of.lines(report)], report, report_of.headline(report))
