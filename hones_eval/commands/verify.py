"""`hones-eval verify`."""

from pathlib import Path

from hones_eval.choices import Correction, DType, Rows, Sites
from hones_eval.commands.answer import Answer
from hones_eval.pages.parts import Table


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
    correction: Correction = "holm",
    scope: str = "all",
) -> Answer:
    """Mask the sites that a ranking selects on held-out examples, and matched random sites for comparison.

    Args:
        ranking: a folder that rank or compare wrote.
        model: as in lmms-eval --model; the model that the ranking was made for.
        tasks: the lmms-eval task to measure on, with other images than the ranking's.
        out: the folder to write verify.json and verify.png to.
        model_args: as in lmms-eval --model_args.
        include_path: a folder with more task YAML files.
        limit: use at most this many examples.
        offset: skip this many examples first.
        gen_kwargs: as in lmms-eval --gen_kwargs, for example max_new_tokens=24.
        metric: the task's metric to use; by default its first that is a number.
        target: the column, or a Jinja template, of the gold answer, where it is not found automatically.
        sites: mask neurons or heads; auto is heads for rankings by vseam and neurons for the others.
        neurons: the share of all neurons to mask; by default the share of the ranking.
        heads: how many positive, how many negative and how many random heads to mask.
        trials: random banks to compare with, two or more; with fewer than five a warning is printed.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: how many masked answers are generated at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: number of nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: for the random banks and the bootstrap.
        correction: of p-values over the rows of the report: holm, or benjamini_hochberg for the false
            discovery rate.
        scope: the tokens at which sites are masked: all, prompt, image, text, last, generated, or several
            joined by +.

    Example:
        hones-eval verify --ranking runs/vqa/ranking --model llava_hf --model_args pretrained=... \\
            --tasks vqav2_val --offset 200 --limit 200 --out runs/vqa/verify
    """
    from hones_eval import api
    from hones_eval.core.ranking import Ranking

    scores = Ranking.load(ranking)
    loaded = api.load(
        model, model_args, dtype=dtype, batch_size=batch_size, devices=devices, num_nodes=num_nodes
    )
    found = api.verify(
        scores,
        loaded,
        tasks,
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        metric=metric,
        target=target,
        sites=sites,
        neurons=neurons,
        heads=heads,
        trials=trials,
        seed=seed,
        correction=correction,
        scope=scope,
        out=out,
    )
    first, *others = found.lines()
    tables = [Table("Every masked bank", found.rows())]
    return Answer([f"wrote {out}: {first}", *others], found.to_json(), found.headline, tables)
