"""The commands of `hones-eval`: each a function whose signature is its flags and whose docstring its help."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from hones_eval.anatomy import Anatomy
from hones_eval.discovery import Discovery, Method, discover, provenance
from hones_eval.errors import HonesError
from hones_eval.examples import TaskExamples, inner_model, load_lmm
from hones_eval.loops import Loop
from hones_eval.methods import scaling
from hones_eval.ranking import Ranking
from hones_eval.replay import Replayer
from hones_eval.steering import Steering

DType = Literal["auto", "float32", "bfloat16", "float16"]


def rank(
    method: Method,
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
    heads: int = 30,
    neurons: float = 0.01,
    dtype: DType = "auto",
    batch_size: int | Literal["auto"] = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 0,
) -> None:
    """Score attention heads and FFN neurons on the examples of an lmms-eval task.

    Args:
        method: hones (the task's metric; neurons) or vseam (the answer's probability; heads that help or hurt).
        model: any lmms-eval model whose wrapper calls generate, as in lmms-eval --model.
        tasks: the lmms-eval task to discover on, one that generates.
        out: the folder to write ranking.json and ranking.safetensors to.
        model_args: as in lmms-eval --model_args.
        include_path: a folder with more task YAML files.
        limit: use at most so many examples.
        offset: skip so many examples first; keep discovery, development and test apart with it.
        gen_kwargs: as in lmms-eval --gen_kwargs, e.g. max_new_tokens=24.
        metric: which of the task's metrics to use; by default its first that is a number.
        target: the column, or a template, of the gold answer, where it is not found by itself.
        heads: how many heads to condition neurons on (hones), or to name as best and worst (vseam).
        neurons: the share of all neurons to select, 0.01 for one percent.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: edited passes run at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: nodes; start the same command on each with torchrun or SLURM.
        seed: recorded, and used by methods that draw at random.
    """
    _one_task(tasks)
    lmm = load_lmm(model, model_args)
    _cast(inner_model(lmm), dtype)
    anatomy = Anatomy.of(inner_model(lmm))
    examples = TaskExamples(
        lmm,
        tasks,
        model_name=model,
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        metric=metric,
        target=target,
    )
    settings = {
        "heads": heads,
        "neurons": neurons,
        "metric": examples.metric,
        "gen_kwargs": gen_kwargs,
        "model": model,
        "model_args": model_args,
        "dtype": str(anatomy.model.dtype).removeprefix("torch."),
    }
    loop = Loop(
        "cuda" if anatomy.unembedding.is_cuda else "cpu", devices, num_nodes, progress=sys.stderr.isatty()
    )
    job = Discovery(
        replayer=Replayer(anatomy, None if batch_size == "auto" else batch_size),
        examples=examples,
        loop=loop,
        provenance=provenance(anatomy, examples, method, settings, seed),
        heads=heads,
        neurons=neurons,
    )
    ranking = discover(job)
    if loop.is_first:
        ranking.save(out)
        _say_ranking(ranking, out)


def scale(
    ranking: Path,
    how: Literal["fixed", "signed", "topk"],
    out: Path,
    factor: float = 2.0,
    neurons: float | None = None,
    strength: float = 1.0,
    epsilon: float = 0.0,
    heads: int = 10,
    enhance: float = 0.5,
    suppress: float = 0.5,
) -> None:
    """Turn the scores of a ranking into the scales of a steering.

    Args:
        ranking: a folder that rank wrote.
        how: fixed (one factor for the selected neurons), signed (heads by 1 + strength * score, clipped to
            0..2) or topk (the best heads times 1 + enhance, the worst times 1 - suppress).
        out: the folder to write steering.json and steering.safetensors to.
        factor: fixed: what the selected neurons are multiplied by.
        neurons: fixed: the share of all neurons to scale; by default the share of the ranking.
        strength: signed: lambda in 1 + lambda * score.
        epsilon: signed: scores smaller than this are ignored.
        heads: topk: how many heads to enhance, and how many to suppress.
        enhance: topk: a in 1 + a.
        suppress: topk: b in 1 - b.
    """
    scores = Ranking.load(ranking)
    choices: dict[str, Callable[[], Steering]] = {
        "fixed": lambda: scaling.fixed(scores, factor, neurons),
        "signed": lambda: scaling.signed(scores, strength, epsilon),
        "topk": lambda: scaling.topk(scores, heads, enhance, suppress),
    }
    steering = choices[how]()
    if steering.is_noop:
        raise HonesError("every scale is 1: this steering would change nothing, so it was not written")
    steering.save(out)
    scaled_heads = int((steering.head_scales != 1).sum())
    scaled_neurons = int((steering.neuron_scales != 1).sum())
    _say(f"wrote {out}: {scaled_heads} heads and {scaled_neurons} neurons are scaled")


def leaderboard(logs: list[Path], out: Path, seed: int = 0, resamples: int = 9999) -> None:
    """Compare steered with baseline runs, from the folders that lmms-eval wrote with --log_samples.

    Args:
        logs: output folders of lmms-eval, baseline and steered, any number of them.
        out: the folder to write leaderboard.csv, leaderboard.md and index.html to.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    from hones_eval.leaderboard import make_board

    board = make_board(logs, out, seed=seed, resamples=resamples)
    for warning in board.warnings:
        _say(f"warning: {warning}")
    _say(f"wrote {out / 'index.html'}, {out / 'leaderboard.csv'} and {out / 'leaderboard.md'}")


COMMANDS: dict[str, Callable[..., None]] = {"rank": rank, "scale": scale, "leaderboard": leaderboard}


def _one_task(tasks: str) -> None:
    if "," in tasks:
        raise HonesError(f"--tasks {tasks}: a ranking is of one task; rank each by itself, then compare them")


def _cast(model: Any, dtype: DType) -> None:
    if dtype != "auto":
        model.to(getattr(torch, dtype))


def _say(line: str) -> None:
    print(line, flush=True)


def _say_ranking(ranking: Ranking, out: Path) -> None:
    report = ranking.report or {}
    _say(f"wrote {out}: {report['examples']} examples, replay {report['replay']}")
    if ranking.provenance.method == "vseam":
        _say(
            f"the likeliest first token was right in {report['correct_examples']} of {report['examples']}; "
            f"{len(report['top_positive'])} heads help, {len(report['top_negative'])} hurt"
        )
        return
    _say(f"{report['metric']} {report['base_metric']:.4g} unedited")
    if not report["heads_with_positive_score"]:
        _say(
            "warning: no head's replacement lowers the metric, so neurons are ranked by their contribution "
            "alone; more examples, or a task that the model can do, give heads a score"
        )
