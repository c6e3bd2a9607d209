"""`hones-eval scale`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_eval.choices import CEILING, SPARSITY, DType, How, Neurons, Rows, TunedSites
from hones_eval.commands.answer import Answer
from hones_eval.errors import HonesError
from hones_eval.pages.parts import HeatMap, Table

if TYPE_CHECKING:
    from hones_eval.api.model import Model
    from hones_eval.core.ranking import Ranking
    from hones_eval.core.steering import Steering


def scale(
    ranking: Path,
    how: How,
    out: Path,
    factor: float | None = None,
    neurons: Neurons | None = None,
    strength: float | None = None,
    epsilon: float | None = None,
    heads: int | None = None,
    enhance: float | None = None,
    suppress: float | None = None,
    strengths: list[float] | None = None,
    factors: list[float] | None = None,
    groups: int | None = None,
    beta: float | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
    tuned_sites: TunedSites = "all",
    rates: list[float] | None = None,
    ceiling: float = CEILING,
    sparsity: float = SPARSITY,
    shifts: bool = False,
    model: str | None = None,
    model_args: str = "",
    tasks: str | None = None,
    against: str | None = None,
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
    scope: str = "all",
    seed: int = 0,
    resume: bool = False,
) -> Answer:
    """Turn the scores of a ranking into the scales of a steering.

    Args:
        ranking: a folder that rank or compare wrote.
        how: the way to choose the scales. Neurons: fixed (one given factor), or on development examples grid
            (the best factor), search (a factor for each of a few groups of layers), learned (one scale per
            neuron, with the paper's settings), learned_no_kl (without the KL term), random (learned, for a
            random bank), signed_neurons (raise those that help and lower those that hurt, by the direction of
            an atp ranking). Heads and neurons: tuned (one scale each; held-out loss chooses heads or
            neurons, the learning rate and the epoch, so that scales move as far as they help), halving (a
            factor for each of a few groups of layers, without gradients). Heads: signed
            (1 + strength * score, clipped to 0..2) or topk (the best times 1 + enhance, the worst times
            1 - suppress), with given strengths or, with --model and --tasks, the best of a grid. Shifts:
            mean_difference (adds to the best heads, and to neurons with --neurons, the difference of mean
            activations of right and wrong answers, or of two tasks).
        out: the folder to write steering.json and steering.safetensors to.
        factor: fixed: what the selected neurons are multiplied by; 2 by default.
        neurons: the share of all neurons to scale, or all; by default the share of the ranking, and for
            tuned all.
        strength: signed: lambda in 1 + lambda * score; 1 by default. signed_neurons: the largest change of a
            neuron's scale; 0.5 by default. mean_difference: what the difference is
            multiplied by; by default the best of --strengths.
        epsilon: signed: scores smaller than this are ignored; 0 by default.
        heads: topk: how many heads to enhance, and how many to suppress; mean_difference: how many to shift;
            halving: how many to scale; 10 by default.
        enhance: topk: a in 1 + a; 0.5 by default.
        suppress: topk: b in 1 - b; 0.5 by default.
        strengths: signed, topk and signed_neurons with --tasks, mean_difference: the values to try besides 0;
            by default 0.5, 1, 2, 4 and 8 of signed, 0.25, 0.5, 0.75 and 1 of topk and signed_neurons, and
            0.5, 1, 2 and 4 of mean_difference.
        factors: grid, search and halving: the values to try; by default 0.5, 0.75, 1, 1.25, 1.5 and 2.
        groups: search and halving: how many groups of layers get a factor of their own; 3 by default.
        beta: learned and random: the weight of KL(original || scaled); 0.05 by default.
        learning_rate: learned, learned_no_kl and random: of AdamW, 5e-4 by default; it falls to a tenth.
        epochs: learned, learned_no_kl and random: passes over the development examples; 2 by default.
        tuned_sites: tuned and halving: heads, neurons, or all of both.
        rates: tuned: the learning rates to try; by default 0.2, and 0.02 where that helps nowhere.
        ceiling: tuned: the largest scale; the smallest is 0.
        sparsity: tuned: how strongly weak sites are held at 1, from 0 (not at all) to below 1.
        shifts: tuned: learn shifts beside the scales too (a vector per head, a number per neuron, which is
            added after scaling); held-out loss chooses whether to use them.
        model: for the ways that choose on development examples, as in lmms-eval --model.
        model_args: as in lmms-eval --model_args.
        tasks: the development task, with other images than the ranking's.
        against: mean_difference: a task whose mean activations are subtracted from those of --tasks; by
            default those of wrong answers are subtracted from those of right answers.
        include_path: a folder with more task YAML files.
        limit: use at most this many development examples.
        offset: skip this many examples first.
        gen_kwargs: as in lmms-eval --gen_kwargs, for example max_new_tokens=24.
        metric: the task's metric to use; by default its first that is a number.
        target: the column, or a Jinja template, of the gold answer, where it is not found automatically.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: how many answers are generated at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: number of nodes; torchrun or srun starts the command on each (docs/distributed.md).
        scope: the tokens that the scales act on while they are chosen on --tasks: all, prompt, image, text,
            last, generated, or several joined by +; steer with the same scope=.
        seed: for the random bank and the order of examples.
        resume: continue from the progress that a killed run of the same command left in OUT/partial.

    Example:
        hones-eval scale --ranking runs/vqa/ranking --how fixed --factor 1.5 --out runs/vqa/steering
        hones-eval scale --ranking runs/vqa/ranking --how grid --model llava_hf --model_args pretrained=... \\
            --tasks vqav2_val --offset 200 --limit 200 --out runs/vqa/steering
    """
    from hones_eval import api
    from hones_eval.core.ranking import Ranking

    scores = Ranking.load(ranking)
    if how != "fixed" and (model is None) != (tasks is None):
        raise HonesError(
            f"--how {how} chooses scales on development examples: give --model, --model_args and --tasks, a "
            "task with other images than the ranking's"
        )
    loaded = None
    if model is not None and tasks is not None and how != "fixed":
        loaded = api.load(
            model, model_args, dtype=dtype, batch_size=batch_size, devices=devices, num_nodes=num_nodes
        )
    steering = api.scale(
        scores,
        how,
        factor=factor,
        neurons=neurons,
        strength=strength,
        epsilon=epsilon,
        heads=heads,
        enhance=enhance,
        suppress=suppress,
        strengths=strengths,
        factors=factors,
        groups=groups,
        beta=beta,
        learning_rate=learning_rate,
        epochs=epochs,
        tuned_sites=tuned_sites,
        rates=rates,
        ceiling=ceiling,
        sparsity=sparsity,
        shifts=shifts,
        model=loaded,
        tasks=tasks,
        against=against,
        include_path=include_path,
        limit=limit,
        offset=offset,
        gen_kwargs=gen_kwargs,
        metric=metric,
        target=target,
        scope=scope,
        seed=seed,
        out=out,
        resume=resume,
    )
    return answer_of(steering, scores, out, loaded)


def answer_of(steering: "Steering", ranking: "Ranking", out: Path, model: "Model | None") -> Answer:
    """What is scaled, by how much, and why."""
    settings = steering.provenance.settings
    counts = steering.counts
    scaled_heads, scaled_neurons = counts["scaled_heads"], counts["scaled_neurons"]
    shifted = [counts.get(f"shifted_{kind}", 0) for kind in ("heads", "neurons")]
    changed = [f"{scaled_heads} heads and {scaled_neurons} neurons are scaled"]
    if steering.has_shifts:
        changed = changed if scaled_heads or scaled_neurons else []
        changed.append(f"{shifted[0]} heads and {shifted[1]} neurons are shifted")
    lines = [f"wrote {out}: {', '.join(changed)}"]
    if scaled_heads or scaled_neurons or not steering.has_shifts:
        lines.append(f"scales go from {_least(steering):.4g} to {_most(steering):.4g}")
    if model is not None:
        from hones_eval.jobs.scale import summary

        lines.append(summary(settings))
        lines += [f"warning: {warning}" for warning in settings.get("warnings", [])]
        if lost := steering.rounded_away(model.anatomy.model.dtype):
            lines.append(
                f"warning: {lost} scales are so near to 1 that rounding to {model.dtype} undoes them"
            )
    else:
        lines.append(
            "these scales were given, not tested: evaluate them with lmms-eval and hones-eval leaderboard"
        )
    data: dict[str, Any] = {"out": str(out), "heads": scaled_heads, "neurons": scaled_neurons}
    data |= {"settings": settings, "ranking": ranking.digest}
    return Answer(lines, data, _headline(steering), _tables(steering), _charts(steering))


def _headline(steering: "Steering") -> str:
    """What is changed, and by which scales."""
    counts, parts = steering.counts, []
    for how in ("scaled", "shifted"):
        named = [(counts.get(f"{how}_{site}s", 0), site) for site in ("head", "neuron")]
        sites = [f"{count} {site}{'' if count == 1 else 's'}" for count, site in named if count]
        if sites:
            parts.append(f"{' and '.join(sites)} {how}{_factors(steering) if how == 'scaled' else ''}")
    return ", ".join(parts) or "Nothing is scaled"


def _factors(steering: "Steering") -> str:
    """The smallest and the largest of the scales that are not 1."""
    changed = [scales[scales != 1] for scales in (steering.head_scales, steering.neuron_scales)]
    ends = [(float(scales.min()), float(scales.max())) for scales in changed if len(scales)]
    low, high = f"{min(low for low, _ in ends):.4g}", f"{max(high for _, high in ends):.4g}"
    return f" by {low}" if low == high else f" by {low} to {high}"


def _tables(steering: "Steering") -> list[Table]:
    """Scaled neurons by layer."""
    rows = [
        {
            "layer": layer,
            "scaled neurons": int((scales != 1).sum()),
            "smallest scale": float(scales[scales != 1].min()),
            "largest scale": float(scales[scales != 1].max()),
        }
        for layer, scales in enumerate(steering.neuron_scales)
        if bool((scales != 1).any())
    ]
    return [Table("Scaled neurons by layer", rows)]


def _charts(steering: "Steering") -> list[HeatMap]:
    """The scales of the heads, if any is scaled."""
    if not bool((steering.head_scales != 1).any()):
        return []
    return [HeatMap("Scales of the heads", steering.head_scales.tolist(), "layer", "head", neutral=1.0)]


def _least(steering: "Steering") -> float:
    return float(min(steering.head_scales.min(), steering.neuron_scales.min()))


def _most(steering: "Steering") -> float:
    return float(max(steering.head_scales.max(), steering.neuron_scales.max()))
