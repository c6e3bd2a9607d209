"""`hones-eval study`."""

from collections import Counter
from pathlib import Path
from typing import Any

from hones_eval.api.task_names import limits_of, names_in
from hones_eval.choices import Correction, DType, Rows
from hones_eval.commands.answer import Answer, say
from hones_eval.errors import HonesError
from hones_eval.methods.registry import METHODS as REGISTERED
from hones_eval.methods.registry import MethodName as Method

METHODS: tuple[Method, ...] = tuple(
    name for name, row in REGISTERED.items() if "neurons" in row.scores and not row.gradients
)


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
    heads: int | None = None,
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
    correction: Correction = "holm",
) -> Answer:
    """Make the paper's table: rank, scale in every way, and test on several tasks and on shifted ones.

    A task T has its neurons chosen on T_discovery, its scales on T_development, and is tested on T. Rankings
    and steerings are kept in the folder; the same command continues from there.

    Args:
        model: as in lmms-eval --model.
        tasks: the tasks, a,b,c; their discovery and development splits are tasks too.
        out: the folder to write study.md, study.json, steering.csv, attribution.csv and figures to.
        model_args: as in lmms-eval --model_args.
        shifted: the suffix of the tasks with shifted test sets; or other tasks to transfer to, as in
            hones_vqa=gqa,hones_ocr=textvqa_val; empty for none.
        methods: rankings to compare by masking their top neurons; by default hones and its baselines, entropy
            only where there are several tasks.
        include_path: a folder with more task YAML files.
        limit: use at most this many examples for discovery and as many for development.
        test_limit: use at most this many examples of each test.
        limits: limits of single tasks that replace --limit, as {"hones_retrieval": 2500}, where an example is
            a candidate.
        test_limits: the same for tests.
        gen_kwargs: as in lmms-eval --gen_kwargs, for example max_new_tokens=24.
        heads: how many heads neurons are conditioned on; by default the paper's share, 30 of 1024, at least 1
            and at most 30.
        neurons: the share of all neurons to select, 0.01 for one percent.
        factor: the factor of the fixed scales.
        trials: how many random banks, with as many neurons in each layer as HONES selects; two or more,
            better five.
        learning_rate: AdamW's, for the learned scales; it falls to a tenth.
        epochs: passes over the development examples, for the learned scales.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: how many edited passes run at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: number of nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: for everything that is drawn at random.
        correction: of p-values over the rows of the report: holm, or benjamini_hochberg for the false
            discovery rate.

    Example:
        hones-eval study --model llava_hf --model_args pretrained=... --tasks hones_vqa,hones_ocr \\
            --limit 200 --test_limit 500 --out runs/study
    """
    from hones_eval import api
    from hones_eval.api.ranking import check_heads, default_heads
    from hones_eval.jobs.learn import FitSettings
    from hones_eval.jobs.study import Study, TaskSplits, run
    from hones_eval.reports import study as study_report

    names = names_in(tasks, "tasks")
    if methods is None:
        methods = [one for one in METHODS if one != "entropy" or len(names) > 1]
    elif "entropy" in methods and len(names) == 1:
        raise HonesError(f"--methods: entropy compares tasks, and --tasks {tasks} is one: leave it out")
    chosen: dict[str, Any] = {"include_path": include_path, "gen_kwargs": gen_kwargs}
    few = limits_of(names, limit, limits, "limits")
    tested = limits_of(names, test_limit, test_limits, "test_limits")
    elsewhere = _elsewhere(names, shifted)
    loaded = api.load(
        model, model_args, dtype=dtype, batch_size=batch_size, devices=devices, num_nodes=num_nodes
    )
    heads = default_heads(loaded.anatomy.shape) if heads is None else check_heads(loaded, heads)

    def splits(name: str) -> TaskSplits:
        return TaskSplits(
            name,
            loaded.examples(f"{name}_discovery", limit=few[name], **chosen),
            loaded.examples(f"{name}_development", limit=few[name], **chosen),
            loaded.examples(name, limit=tested[name], **chosen),
            loaded.examples(elsewhere[name], limit=tested[name], **chosen) if name in elsewhere else None,
        )

    every = [splits(name) for name in names]
    plan = Study(
        loaded.replayer,
        loaded.loop,
        every,
        methods,
        out,
        loaded.settings(every[0].discovery, heads=heads, neurons=neurons, gen_kwargs=gen_kwargs),
        heads,
        neurons,
        factor,
        trials,
        seed,
        FitSettings(learning_rate=learning_rate, epochs=epochs, seed=seed),
        correction,
    )
    report = run(plan)
    if not loaded.loop.is_first:
        return Answer([])
    study_report.write(report, out)
    say((out / "study.md").read_text(encoding="utf-8"))
    counts = Counter(row["verdict"] for row in report["steering"])
    headline = (
        f"{counts['better']} of {counts.total()} steered tests are better than the baseline, "
        f"{counts['worse']} worse"
    )
    return Answer([f"wrote {out / 'study.md'}, study.json, two tables and two figures"], report, headline)


def _elsewhere(names: list[str], shifted: str) -> dict[str, str]:
    """The shifted task of every task, where there is one."""
    if "=" not in shifted:
        return {name: f"{name}{shifted}" for name in names} if shifted else {}
    pairs = [one.partition("=") for one in shifted.split(",")]
    wrong = [f"{name}{sign}{other}" for name, sign, other in pairs if name not in names or not other]
    if wrong:
        raise HonesError(f"--shifted {wrong[0]}: give TASK=OTHER, with TASK one of {', '.join(names)}")
    return {name: other for name, _, other in pairs}
