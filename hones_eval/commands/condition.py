"""`hones-eval condition`."""

from pathlib import Path

from hones_eval.choices import DType, Rows
from hones_eval.commands.answer import Answer


def condition(
    model: str,
    tasks: str,
    against: str,
    out: Path,
    model_args: str = "",
    layer: int | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> Answer:
    """Learn on which inputs a steering should act: those of one task, and not those of another.

    A condition is a direction and a threshold at the input of one layer, at the last token of the prompt.
    Half of the images are only used to measure precision and recall.

    Args:
        model: as in lmms-eval --model.
        tasks: the task on whose prompts a steering should act.
        against: the task on whose prompts it should not.
        out: the folder to write condition.json and condition.safetensors to.
        model_args: as in lmms-eval --model_args.
        layer: the layer whose input is read; by default the one that tells the tasks apart best.
        include_path: a folder with more task YAML files.
        limit: use at most this many examples of each task.
        offset: skip this many examples of each task first.
        gen_kwargs: as in lmms-eval --gen_kwargs.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: how many passes run at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: number of nodes; torchrun or srun starts the command on each (docs/distributed.md).

    Example:
        hones-eval condition --model llava_hf --model_args pretrained=... --tasks textvqa_val \\
            --against gqa --limit 200 --out runs/reads-text
        lmms-eval --model hones_llava --tasks gqa \\
            --model_args pretrained=...,steering=runs/a,condition=runs/reads-text
    """
    from hones_eval import api
    from hones_eval.api.conditions import learn_condition
    from hones_eval.jobs.condition import summary

    loaded = api.load(
        model, model_args, dtype=dtype, batch_size=batch_size, devices=devices, num_nodes=num_nodes
    )
    found = learn_condition(
        loaded,
        tasks,
        against,
        layer=layer,
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        out=out,
    )
    data = {"out": str(out), "layer": found.layer, "threshold": found.threshold, **found.report}
    return Answer([f"wrote {out}: {summary(found)}", "use it: condition=" + str(out)], data)
