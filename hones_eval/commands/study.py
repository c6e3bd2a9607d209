"""`hones-eval study`."""

from pathlib import Path
from typing import Any

from hones_eval.commands.shared import DType, Job, Rows, limits_of, names_in, say
from hones_eval.errors import HonesError
from hones_eval.jobs.learn import FitSettings
from hones_eval.jobs.rank import Method
from hones_eval.jobs.study import Study, TaskSplits, run
from hones_eval.reports import study as study_report

METHODS: tuple[Method, ...] = ("hones", "dvp", "write_norm", "activation", "entropy", "random")


def study(
    model: str,
    tasks: str,
    out: Path,
    model_args: str = "",
    shifted: str = "_shifted",
    methods: list[Method] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    limits: dict[str, int] | None = None,
    test_limits: dict[str, int] | None = None,
    gen_kwargs: str | None = None,
    heads: int = 30,
    neurons: float = 0.01,
    factor: float = 2.0,
    trials: int = 5,
    learning_rate: float = 5e-4,
    epochs: int = 2,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 0,
) -> None:
    """Make the paper's table: rank, scale in every way and test on several tasks, as they are and shifted.

    A task called T is tested as T, and has its neurons chosen on T_discovery and its scales on T_development.
    Rankings and steerings are kept in the folder, and a second run goes on from there.

    Args:
        model: as in lmms-eval --model.
        tasks: tasks whose other splits are tasks too, a,b,c.
        out: the folder to write study.md, study.json, steering.csv, attribution.csv and figures to.
        model_args: as in lmms-eval --model_args.
        shifted: what to append to a task's name for its shifted test set; or other tasks to transfer to, as
            in hones_vqa=gqa,hones_ocr=textvqa_val; empty for none.
        methods: rankings to compare by masking their top neurons; by default hones and all of its
            baselines, but entropy only where there are several tasks to tell apart.
        include_path: a folder with more task YAML files.
        limit: use at most so many examples for discovery and as many for development.
        test_limit: use at most so many examples of each test.
        limits: the limit of single tasks in place of that of all, {"hones_retrieval": 2500}, where an
            example is a candidate.
        test_limits: the same for tests.
        gen_kwargs: as in lmms-eval --gen_kwargs, e.g. max_new_tokens=24.
        heads: how many heads to condition neurons on.
        neurons: the share of all neurons to select, 0.01 for one percent.
        factor: of the fixed scales.
        trials: random banks, as many neurons in each layer as HONES selects; two or more, better five.
        learning_rate: of the learned scales, for AdamW; it falls to a tenth.
        epochs: of the learned scales, passes over the development examples.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: edited passes run at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: of everything that is drawn at random.
    """
    names = names_in(tasks, "tasks")
    if methods is None:
        methods = [one for one in METHODS if one != "entropy" or len(names) > 1]
    elif "entropy" in methods and len(names) == 1:
        raise HonesError(f"--methods: entropy compares tasks, and --tasks {tasks} is one: leave it out")
    chosen: dict[str, Any] = {"include_path": include_path, "gen_kwargs": gen_kwargs}
    few = limits_of(names, limit, limits, "limits")
    tested = limits_of(names, test_limit, test_limits, "test_limits")
    machine = {"dtype": dtype, "batch_size": batch_size, "devices": devices, "num_nodes": num_nodes}
    elsewhere = _elsewhere(names, shifted)
    job = Job.open(model, model_args, f"{names[0]}_discovery", limit=few[names[0]], **chosen, **machine)  # type: ignore[arg-type]

    def splits(name: str) -> TaskSplits:
        return TaskSplits(
            name,
            job.on(f"{name}_discovery", limit=few[name], **chosen).examples,
            job.on(f"{name}_development", limit=few[name], **chosen).examples,
            job.on(name, limit=tested[name], **chosen).examples,
            job.on(elsewhere[name], limit=tested[name], **chosen).examples if name in elsewhere else None,
        )

    plan = Study(
        job.replayer,
        job.loop,
        [splits(name) for name in names],
        methods,
        out,
        job.settings(heads=heads, neurons=neurons, gen_kwargs=gen_kwargs),
        heads,
        neurons,
        factor,
        trials,
        seed,
        FitSettings(learning_rate=learning_rate, epochs=epochs, seed=seed),
    )
    report = run(plan)
    if job.loop.is_first:
        study_report.write(report, out)
        say((out / "study.md").read_text(encoding="utf-8"))
        say(f"wrote {out / 'study.md'}, study.json, two tables and two figures")


def _elsewhere(names: list[str], shifted: str) -> dict[str, str]:
    """Where scales are tested too, by the task that they are chosen for."""
    if "=" not in shifted:
        return {name: f"{name}{shifted}" for name in names} if shifted else {}
    pairs = [one.partition("=") for one in shifted.split(",")]
    wrong = [f"{name}{sign}{other}" for name, sign, other in pairs if name not in names or not other]
    if wrong:
        raise HonesError(f"--shifted {wrong[0]}: give TASK=OTHER, with TASK one of {', '.join(names)}")
    return {name: other for name, _, other in pairs}
