"""`hones-eval scale`."""

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Literal

from hones_eval.commands.shared import DType, Job, Rows, say
from hones_eval.core.artifact import hash_of
from hones_eval.core.ranking import Ranking
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError
from hones_eval.jobs.learn import FitSettings
from hones_eval.jobs.scale import GRID, STRENGTHS, Development, choose, summary
from hones_eval.methods import scaling
from hones_eval.runs.checkpoint import Partial
from hones_eval.version import __version__


def scale(
    ranking: Path,
    how: Literal["fixed", "grid", "search", "learned", "learned_no_kl", "random", "signed", "topk"],
    out: Path,
    factor: float = 2.0,
    neurons: float | None = None,
    strength: float | None = None,
    epsilon: float = 0.0,
    heads: int = 10,
    enhance: float | None = None,
    suppress: float | None = None,
    strengths: list[float] | None = None,
    factors: list[float] | None = None,
    groups: int = 3,
    beta: float = 0.05,
    learning_rate: float = 5e-4,
    epochs: int = 2,
    model: str | None = None,
    model_args: str = "",
    tasks: str | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    metric: str | None = None,
    target: str | None = None,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Turn the scores of a ranking into the scales of a steering.

    Args:
        ranking: a folder that rank or compare wrote.
        how: for neurons fixed (one factor), or chosen on development examples by grid (the best factor),
            search (a factor for each of a few groups of layers), learned (one scale a neuron, kept close to
            the model), learned_no_kl (not kept close) or random (learned, of a random bank); for heads signed
            (1 + strength * score, clipped to 0..2) or topk (the best times 1 + enhance, the worst times
            1 - suppress), with strengths that are given or, with --model and --tasks, the best of a grid.
        out: the folder to write steering.json and steering.safetensors to.
        factor: fixed: what the selected neurons are multiplied by.
        neurons: the share of all neurons to scale; by default the share of the ranking.
        strength: signed: lambda in 1 + lambda * score; 1 by default.
        epsilon: signed: scores smaller than this are ignored.
        heads: topk: how many heads to enhance, and how many to suppress.
        enhance: topk: a in 1 + a; 0.5 by default.
        suppress: topk: b in 1 - b; 0.5 by default.
        strengths: signed, topk with --tasks: what is tried beside 0, for lambda or for each of a and b; by
            default 0.5, 1, 2, 4 and 8, or 0.25, 0.5, 0.75 and 1.
        factors: grid, search: what is tried; by default 0.5, 0.75, 1, 1.25, 1.5 and 2.
        groups: search: into how many groups of layers the bank is cut.
        beta: learned, random: the weight of KL(original || scaled).
        learning_rate: learned, random: of AdamW; it falls to a tenth.
        epochs: learned, random: passes over the development examples.
        model: grid, search, learned, random, signed, topk: as in lmms-eval --model.
        model_args: as in lmms-eval --model_args.
        tasks: the same: the development task, with other pictures than the ranking's.
        include_path: a folder with more task YAML files.
        limit: use at most so many development examples.
        offset: skip so many examples first.
        gen_kwargs: as in lmms-eval --gen_kwargs, e.g. max_new_tokens=24.
        metric: which of the task's metrics to use; by default its first that is a number.
        target: the column, or a template, of the gold answer, where it is not found by itself.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: grid, search, signed, topk: answers generated at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: of the random bank and of the order of examples.
        resume: go on from what a killed run of the same command left in OUT/partial.
    """
    _refuse_others_flags(
        how,
        factor=factor,
        strength=strength,
        epsilon=epsilon,
        heads=heads,
        enhance=enhance,
        suppress=suppress,
    )
    scores = Ranking.load(ranking)
    choices: dict[str, Callable[[], Steering]] = {
        "fixed": lambda: scaling.fixed(scores, factor, neurons),
        "signed": lambda: scaling.signed(scores, 1.0 if strength is None else strength, epsilon),
        "topk": lambda: scaling.topk(
            scores, heads, 0.5 if enhance is None else enhance, 0.5 if suppress is None else suppress
        ),
    }
    if how in choices and (how == "fixed" or (model is None and tasks is None)):
        steering = choices[how]()
        if steering.is_noop:
            raise HonesError("every scale is 1: this steering would change nothing, so it was not written")
        _save(steering, out)
        return
    if model is None or tasks is None:
        raise HonesError(
            f"--how {how} chooses scales on development examples: give --model, --model_args and --tasks, a "
            "task with other pictures than the ranking's"
        )
    for flag, value in (("strength", strength), ("enhance", enhance), ("suppress", suppress)):
        if how in STRENGTHS and value is not None:
            raise HonesError(
                f"--{flag} {value:g} leaves nothing to choose on --tasks {tasks}: leave one of them out; "
                "--strengths says what is tried"
            )
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
    fit = FitSettings(beta=beta, learning_rate=learning_rate, epochs=epochs, seed=seed)
    tried = tuple(factors or GRID)
    settings = (neurons, tried, groups, fit, heads, epsilon, strengths)
    development = Development(scores, job.replayer, job.examples, job.loop, *settings)
    pinned = [scores.digest, development.example_set.hash, *map(str, (how, *settings))]
    pinned.append(json.dumps(job.settings(gen_kwargs=gen_kwargs), sort_keys=True))
    job.loop.partial = partial = Partial(out / "partial", hash_of([__version__, *pinned]), resume)
    steering = choose(development, how)  # type: ignore[arg-type]
    if job.loop.is_first:
        _save(steering, out)
        partial.clear()
        say(summary(steering.provenance.settings))
        for warning in steering.provenance.settings.get("warnings", []):
            say(f"warning: {warning}")
        if steering.is_noop:
            say("warning: nothing beats leaving the model as it is, so this steering changes nothing")
        lost = steering.rounded_away(job.anatomy.model.dtype)
        if lost:
            say(f"warning: {lost} scales are so near to 1 that rounding to {job.dtype} undoes them")


# How much is scaled, and which heads: with another way of scaling it would be passed over.
READ_BY = {
    "factor": "fixed",
    "strength": "signed",
    "epsilon": "signed",
    "heads": "topk",
    "enhance": "topk",
    "suppress": "topk",
}


def _refuse_others_flags(how: str, **given: float | None) -> None:
    """Raise HonesError where a flag is not left at its default, and `how` does not read it."""
    for flag, value in given.items():
        if how != READ_BY[flag] and value != signature(scale).parameters[flag].default:
            raise HonesError(f"--{flag} {value} says nothing to --how {how}: it is for {READ_BY[flag]}")


def _save(steering: Steering, out: Path) -> None:
    steering.save(out)
    scaled_heads = int((steering.head_scales != 1).sum())
    scaled_neurons = int((steering.neuron_scales != 1).sum())
    say(f"wrote {out}: {scaled_heads} heads and {scaled_neurons} neurons are scaled")
