"""`hones-eval trace`."""

from pathlib import Path

from hones_eval.choices import DType, Pairs, Rows
from hones_eval.commands.answer import Answer


def trace(
    clean: str,
    edited: str,
    model: str,
    out: Path,
    what: str = "image",
    model_args: str = "",
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    roles: str = "",
    only: Pairs = "all",
    examples: int = 3,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> Answer:
    """Run edited images with a clean image's activations put back, location by location (causal tracing).

    Writes trace.json (averages, counts, what was left out and why), layers.csv, roles.csv, tokens.csv (for
    some pairs), and heat maps and curves as PNG. Documents of the two tasks are matched by question_id, or
    by their number where they have none. Layer l is the one that reads the patched activation; the last is
    the final norm.

    Args:
        clean: the lmms-eval task with the clean images; several with commas, one curve each.
        edited: the task with the edited images, whose answers differ; as many as in --clean.
        model: as in lmms-eval --model.
        out: the folder to write to.
        what: the activations to put back: the residual stream at all image tokens (image), all text tokens
            (text) or the last token (last), or the attention or ffn output of one text token at a time;
            several with commas.
        model_args: as in lmms-eval --model_args.
        include_path: a folder with more task YAML files.
        limit: trace at most this many pairs of each task.
        offset: skip this many documents of the clean task first.
        gen_kwargs: as in lmms-eval --gen_kwargs.
        roles: words that play a role in the prompt, as object=COLUMN;attribute=red,green (semicolons).
        only: average over all pairs, or over the right ones, where the model's most likely token is right on
            both images.
        examples: how many pairs get figures of their own and rows in tokens.csv.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: how many patched passes run at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: number of nodes; torchrun or srun starts the command on each (docs/distributed.md).

    Example:
        hones-eval trace --clean vseam_color --edited vseam_color_edited --what image,last \\
            --model llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf --out runs/color/trace
    """
    from hones_eval import api
    from hones_eval.api import tracing

    wanted = tracing.plan(clean, edited, what, roles, only, examples)
    loaded = api.load(
        model, model_args, dtype=dtype, batch_size=batch_size, devices=devices, num_nodes=num_nodes
    )
    lines = tracing.trace(
        loaded,
        wanted,
        out,
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        batch_size=batch_size,
    )
    found = next((line for line in lines if " recovers most at " in line), None)
    tasks = clean.count(",") + 1
    nothing = f"{tasks} task{'' if tasks == 1 else 's'} traced, no share of a logit difference to recover"
    return Answer(lines, {"out": str(out), "answer": lines}, found or nothing)
