"""`hones-eval lens`."""

from pathlib import Path

from hones_eval.choices import DType
from hones_eval.commands.answer import Answer
from hones_eval.errors import HonesError


def lens(
    model: str,
    tasks: str,
    out: Path,
    model_args: str = "",
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    positions: str = "last",
    top: int = 10,
    against: str | None = None,
    strength: float = 1.0,
    figures_of: int = 8,
    dtype: DType = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> Answer:
    """Unembed every layer's states: attention output, residual after attention, FFN and block output.

    Writes lens.json (means over examples), lens.csv (top tokens, their probabilities, entropy), a figure of
    the means, and one figure per example with its image.

    Args:
        model: as in lmms-eval --model.
        tasks: an lmms-eval task that generates an answer.
        out: the folder to write to.
        model_args: as in lmms-eval --model_args.
        include_path: a folder with more task YAML files.
        limit: use at most this many examples.
        offset: skip this many examples first.
        gen_kwargs: as in lmms-eval --gen_kwargs.
        positions: last, text, image, all, or positions in the prompt, counted from 0 or from the end, as in
            --positions=5,-1.
        top: how many of the most likely tokens to list.
        against: a steering to compare with (a folder or hub id after steering=), or other model_args.
        strength: the strength of that steering.
        figures_of: how many examples get a figure.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        devices: processes on this node, one device each.
        num_nodes: number of nodes; torchrun or srun starts the command on each (docs/distributed.md).

    Example:
        hones-eval lens --model llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf \\
            --tasks vqav2_val --limit 20 --against steering=runs/vqa/steering --out runs/vqa/lens
    """
    from hones_eval import api
    from hones_eval.api import lens as logit_lens

    steering = logit_lens.other_steering(against, strength)
    if figures_of < 0:
        raise HonesError(f"--figures_of {figures_of}: give how many examples get a figure, 0 or more")
    loaded = api.load(model, model_args, dtype=dtype, devices=devices, num_nodes=num_nodes)
    lines = logit_lens.lens(
        loaded,
        tasks,
        out,
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        positions=positions,
        top=top,
        against=against,
        steering=steering,
        strength=strength,
        figures_of=figures_of,
    )
    return Answer(lines, {"out": str(out), "answer": lines})
