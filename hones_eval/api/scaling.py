"""Turn the scores of a ranking into the scales of a steering."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_eval.choices import CEILING, SPARSITY, How, Neurons, TunedSites
from hones_eval.core.adapters import model_source
from hones_eval.core.artifact import hash_of
from hones_eval.core.lock import writes_to_out
from hones_eval.core.ranking import Ranking
from hones_eval.core.steering import Steering
from hones_eval.core.weights import weights_digest
from hones_eval.errors import HonesError
from hones_eval.methods import scaling
from hones_eval.version import __version__

if TYPE_CHECKING:  # scales that need no model are made without importing lmms-eval and Lightning
    from hones_eval.api.model import Model

FACTOR = 2.0
HEADS = 10
GROUPS = 3
DEVELOPED = ("grid", "search", "learned", "learned_no_kl", "random", "tuned", "halving", "mean_difference")
"""Ways that choose on development examples without a score of heads."""


@writes_to_out
def scale(
    ranking: Ranking,
    how: How = "fixed",
    *,
    factor: float | None = None,
    neurons: Neurons | None = None,
    strength: float | None = None,
    epsilon: float | None = None,
    heads: int | None = None,
    enhance: float | None = None,
    suppress: float | None = None,
    strengths: Sequence[float] | None = None,
    factors: Sequence[float] | None = None,
    groups: int | None = None,
    beta: float | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
    tuned_sites: TunedSites = "all",
    rates: Sequence[float] | None = None,
    ceiling: float = CEILING,
    sparsity: float = SPARSITY,
    shifts: bool = False,
    model: Model | None = None,
    tasks: str | None = None,
    against: str | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    metric: str | None = None,
    target: str | None = None,
    scope: str = "all",
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
) -> Steering:
    """Turn the scores of a ranking into the scales of a steering.

    A scale `s` multiplies a neuron's activation or a head's slice: `a <- s * a`. `fixed` sets `s = factor`
    for the selected neurons; `signed` sets `s = clip(1 + strength * score, 0, 2)` for every head; `topk`
    sets `s = 1 + enhance` for the best and `s = 1 - suppress` for the worst heads; `signed_neurons` sets
    `s = clip(1 + strength * d, 0, 2)` for the selected neurons, whose directions `d` are divided by the
    largest. `mean_difference` adds to
    the best heads, and to neurons if their share is given, a difference of mean activations. It and the other
    ways choose on development examples, and need `model` and `tasks`.

    Args:
        ranking: what `rank` returned.
        how: the way to choose the scales.
        factor: fixed: what the selected neurons are multiplied by; 2 by default.
        neurons: the share of all neurons to scale, or "all"; by default the ranking's, and for tuned all.
        strength: signed: lambda in 1 + lambda * score; 1 by default. signed_neurons: the largest change of a
            neuron's scale; 0.5 by default. mean_difference: what the difference is
            multiplied by; by default the best of `strengths`.
        epsilon: signed: scores smaller than this are ignored; 0 by default.
        heads: topk: how many heads to enhance, and how many to suppress; mean_difference: how many to shift;
            halving: how many to scale; 10 by default.
        enhance: topk: a in 1 + a; 0.5 by default.
        suppress: topk: b in 1 - b; 0.5 by default.
        strengths: signed, topk and signed_neurons with `tasks`, and mean_difference: the values to try.
        factors: grid, search and halving: the values to try.
        groups: search and halving: how many groups of layers get a factor of their own; 3 by default.
        beta: learned and random: the weight of KL(original || scaled); 0.05 by default.
        learning_rate: learned, learned_no_kl and random: AdamW's; 5e-4 by default.
        epochs: learned, learned_no_kl and random: passes over the development examples; 2 by default.
        tuned_sites: tuned and halving: heads, neurons, or all of both.
        rates: tuned: the learning rates to try; held-out loss chooses among them.
        ceiling: tuned: the largest scale; the smallest is 0.
        sparsity: tuned: how strongly weak sites are held at 1, from 0 to below 1.
        shifts: tuned: learn shifts beside the scales too, `a <- s * a + b`; held-out loss chooses whether to
            use them.
        model: what `load` returned, for the ways that choose on development examples.
        tasks: the development task, with other images than the ranking's.
        against: mean_difference: a task whose mean activations are subtracted from those of `tasks`; by
            default those of wrong answers are subtracted from those of right answers.
        include_path: a folder with more task YAML files.
        limit: use at most this many development examples.
        offset: skip this many examples first.
        gen_kwargs: as in lmms-eval --gen_kwargs.
        metric: the task's metric to use; by default its first that is a number.
        target: the column, or a template, of the gold answer.
        scope: the tokens that the scales act on while they are chosen, as in `steer`; steer with the same.
        seed: for the random bank and the order of examples.
        out: the folder to save the steering to.
        resume: continue from the progress that a killed run of the same job left in `out`.

    Raises: HonesError when a value does not belong to `how`, when every scale would be 1, or when no scales
        helped on the development examples.

    Examples:
        >>> from hones_eval import load, rank
        >>> from hones_eval.toy import checkpoint_path
        >>> model = load("hones_llava", f"pretrained={checkpoint_path()}")
        >>> ranking = rank(model, "scenes_vqa_relation_discovery", method="random", limit=2)
        >>> steering = scale(ranking, how="fixed", factor=1.5)
        >>> int((steering.neuron_scales == 1.5).sum())
        21
    """
    share = 1.0 if neurons == "all" else neurons
    _refuse_values_of_other_ways(
        how,
        factor=factor,
        neurons=neurons,
        strength=strength,
        epsilon=epsilon,
        heads=heads,
        enhance=enhance,
        suppress=suppress,
        groups=groups,
        beta=beta,
        learning_rate=learning_rate,
        epochs=epochs,
        against=against,
        shifts=shifts or None,
        rates=rates,
        factors=factors,
        strengths=strengths,
        tuned_sites=None if tuned_sites == "all" else tuned_sites,
        ceiling=None if ceiling == CEILING else ceiling,
        sparsity=None if sparsity == SPARSITY else sparsity,
    )
    if how == "fixed" or (how not in DEVELOPED and model is None and tasks is None):
        if scope != "all":
            raise HonesError(
                f"--scope {scope} only applies to scales that are chosen on --tasks, with --model"
            )
        if strengths:
            raise HonesError("--strengths are tried on development examples: give --model and --tasks too")
        steering = _given(ranking, how, factor, share, strength, epsilon, heads, enhance, suppress)
        if out is not None:
            steering.save(out)
        return steering
    if model is None or tasks is None:
        raise HonesError(
            f"--how {how} chooses scales on development examples: give --model, --model_args and --tasks, a "
            "task with other images than the ranking's"
        )
    for flag, value in (("strength", strength), ("enhance", enhance), ("suppress", suppress)):
        if how not in DEVELOPED and value is not None:
            raise HonesError(
                f"--{flag} {value:g} leaves nothing to choose on --tasks {tasks}: leave one of them out; "
                "--strengths gives the values to try"
            )
    from hones_eval.core.scope import Scope
    from hones_eval.jobs.learn import FitSettings
    from hones_eval.jobs.mean_difference import mean_difference
    from hones_eval.jobs.scale import GRID, Development, choose, summary
    from hones_eval.jobs.tune import TuneSettings
    from hones_eval.runs.checkpoint import Partial

    where = Scope.parse(scope)
    task_settings: dict[str, Any] = {
        "include_path": include_path,
        "limit": limit,
        "offset": offset,
        "gen_kwargs": gen_kwargs,
    }
    examples = model.examples(tasks, **task_settings, metric=metric, target=target)
    other = None if against is None else model.examples(against, **task_settings)
    fit = FitSettings(
        beta=FitSettings.beta if beta is None else beta,
        learning_rate=FitSettings.learning_rate if learning_rate is None else learning_rate,
        epochs=FitSettings.epochs if epochs is None else epochs,
        seed=seed,
    )
    tune = TuneSettings(ceiling=ceiling, sparsity=sparsity, seed=seed, shifts=shifts)
    tune = replace(tune, rates=tuple(rates)) if rates else tune
    tried = tuple(factors or GRID)
    settings = (
        share,
        tried,
        GROUPS if groups is None else groups,
        fit,
        HEADS if heads is None else heads,
        epsilon or 0.0,
        strengths,
        tune,
        tuned_sites,
    )
    replayer = model.replayer.in_scope(scope)
    development = Development(ranking, replayer, examples, model.loop, *settings)
    partial = None
    if out is not None:
        pinned = [ranking.digest, development.example_set.hash, *map(str, (how, *settings))]
        pinned.append(json.dumps(model.settings(examples, gen_kwargs=gen_kwargs), sort_keys=True))
        # The ranking's provenance too: its settings choose the neurons where --neurons does not.
        pinned.append(json.dumps(ranking.provenance.to_json(), sort_keys=True))
        pinned += [weights_digest(model.anatomy.model), json.dumps(model_source(model.anatomy.model))]
        pinned += ["" if other is None else other.example_set().hash, f"{heads} {strength} {where}"]
        partial = Partial(Path(out) / "partial", hash_of([__version__, *pinned]), resume)
    model.loop.partial = partial
    try:
        if how == "mean_difference":
            steering = mean_difference(development, other, heads, strength)
        else:
            steering = choose(development, how)
    finally:
        model.loop.partial = None
    if not where.is_all:
        source = steering.provenance
        steering = replace(
            steering, provenance=replace(source, settings=source.settings | {"scope": str(where)})
        )
    if out is not None and partial is not None and model.loop.is_first:
        if not steering.is_noop:
            steering.save(out)
        partial.clear()  # after the result is written, so that a kill in between loses nothing
    if steering.is_noop:
        warned = "".join(f"; {warning}" for warning in steering.provenance.settings.get("warnings", []))
        raise HonesError(
            "no strength helped on development examples: nothing was written; the best is the model without "
            f"steering ({summary(steering.provenance.settings)}){warned}"
        )
    return steering


def _given(
    ranking: Ranking,
    how: How,
    factor: float | None,
    neurons: float | None,
    strength: float | None,
    epsilon: float | None,
    heads: int | None,
    enhance: float | None,
    suppress: float | None,
) -> Steering:
    """The steering of values that are given, not chosen."""
    if how == "fixed":
        steering = scaling.fixed(ranking, FACTOR if factor is None else factor, neurons)
    elif how == "signed":
        steering = scaling.signed(ranking, 1.0 if strength is None else strength, epsilon or 0.0)
    elif how == "signed_neurons":
        steering = scaling.signed_neurons(ranking, 0.5 if strength is None else strength, neurons)
    else:
        steering = scaling.topk(
            ranking,
            HEADS if heads is None else heads,
            0.5 if enhance is None else enhance,
            0.5 if suppress is None else suppress,
        )
    if steering.is_noop:
        raise HonesError("every scale is 1: this steering would change nothing, so it was not written")
    return steering


# The ways of scaling that read each value; with another way it would be silently ignored.
_LEARNED = ("learned", "learned_no_kl", "random")
READ_BY = {
    "factor": ("fixed",),
    "neurons": ("fixed", "signed_neurons", *DEVELOPED),
    "groups": ("search", "halving"),
    "beta": ("learned", "random"),
    "learning_rate": _LEARNED,
    "epochs": _LEARNED,
    "strength": ("signed", "signed_neurons", "mean_difference"),
    "epsilon": ("signed",),
    "heads": ("topk", "halving", "mean_difference"),
    "enhance": ("topk",),
    "suppress": ("topk",),
    "against": ("mean_difference",),
    "shifts": ("tuned",),
    "rates": ("tuned",),
    "factors": ("grid", "search", "halving"),
    "strengths": ("signed", "topk", "signed_neurons", "mean_difference"),
    "tuned_sites": ("tuned", "halving"),
    "ceiling": ("tuned",),
    "sparsity": ("tuned",),
}


def _refuse_values_of_other_ways(how: str, **given: float | str | Sequence[float] | None) -> None:
    for name, value in given.items():
        if value is not None and how not in READ_BY[name]:
            *others, last = READ_BY[name]
            ways = f"{', '.join(others)} and {last}" if others else last
            raise HonesError(f"--{name} only applies to --how {ways}, not to {how}")
