"""`hones-eval rank`."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_eval.choices import Absolute, Bound, DType, Estimate, Objective, Rows, Screen
from hones_eval.commands.answer import Answer
from hones_eval.commands.registered import with_help
from hones_eval.core import head_edits
from hones_eval.core.head_edits import HEAD_EDITS, HeadEditName
from hones_eval.methods import registry
from hones_eval.methods.registry import MethodName
from hones_eval.notes import note
from hones_eval.pages.parts import HeatMap, Table

if TYPE_CHECKING:
    from hones_eval.core.ranking import Ranking

SHOWN = 5
LISTED = 100  # best heads and neurons on the page
HEAD_UNITS = {
    "hones": "drop of the metric",
    "vseam": "drop of the answer's probability",
    "atp": "estimated change",
}


@with_help(METHODS=registry.described(), EDITS=head_edits.described())
def rank(
    method: MethodName,
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
    heads: int | None = None,
    neurons: float = 0.01,
    dtype: DType = "auto",
    batch_size: Rows = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 0,
    resume: bool = False,
    race: float | None = None,
    race_bound: Bound = "betting",
    race_span: float = 1.0,
    screen: Screen | None = None,
    screen_share: float = 0.25,
    budget: float | None = None,
    metric_only: bool = False,
    edit: HeadEditName = "mean",
    estimate: Estimate = "first_order",
    objective: Objective = "margin",
    absolute: Absolute = "position",
    confirm: int | None = None,
    joint: bool = False,
    scope: str = "all",
) -> Answer:
    """Score attention heads and FFN neurons on the examples of an lmms-eval task.

    Args:
        method: METHODS.
        model: any lmms-eval model whose wrapper calls generate, as in lmms-eval --model.
        tasks: the lmms-eval task to rank on, with free or multiple-choice answers; several tasks, a,b,c, give
            a ranking each, with the model loaded once. For entropy, that task and then the tasks to tell it
            apart from.
        out: the folder to write ranking.json and ranking.safetensors to; for several tasks, to OUT/TASK.
        model_args: as in lmms-eval --model_args, for example pretrained=FOLDER_OR_HUB_ID.
        include_path: a folder with more task YAML files.
        limit: use at most this many examples.
        offset: skip this many examples first; use it to keep discovery, development and test images apart.
        gen_kwargs: as in lmms-eval --gen_kwargs, for example max_new_tokens=24.
        metric: the task's metric to use, or log_probability for that of the gold answer; by default the
            task's first metric that is a number.
        target: the column, or a Jinja template, of the gold answer, where it is not found automatically.
        heads: how many heads neurons are conditioned on (hones), or how many are named as best and worst
            (vseam). By default the paper's share, 30 of 1024 heads, at least 1 and at most 30.
        neurons: the share of all neurons to select, 0.01 for one percent.
        dtype: the model's floating-point type; auto leaves it as the wrapper loads it.
        batch_size: how many edited passes run at once; auto fits them to the device.
        devices: processes on this node, one device each.
        num_nodes: number of nodes; torchrun or srun starts the command on each (docs/distributed.md).
        seed: for methods that draw at random, and for the order of a race.
        resume: continue from the progress that a killed run of the same command left in OUT/partial.
        race: stop measuring heads early, for hones with a metric that is a mean over examples. The value is
            the accepted risk, such as 0.05, that the best heads differ from the exact ones (up to ties).
            Examples come in random order, and a head is dropped once a bound shows that it is, or is not,
            among the best.
        race_bound: the confidence bound of a race; bernstein (empirical Bernstein) is wider than betting.
        race_span: the largest possible difference of the metric between two answers, 1 for metrics from 0 to
            1.
        screen: first_order estimates all heads of hones by one backward pass per example, which needs memory
            for gradients, and measures only the best ones. Heads that it leaves out have no score.
        screen_share: the share of all heads that is measured after a screen.
        budget: for hones; the share of the exact search's work to spend, such as 0.1. Gradients screen the
            heads, the worst of the others are dropped step by step, and the last few are measured on all
            examples. The report says what was spent, and bounds the risk of a wrong choice.
        metric_only: for hones; leave out the gold answer's log-probability where it takes passes of its own.
        edit: what replaces a head, for methods that replace heads. EDITS.
        estimate: for atp; one gradient (first_order), or gradients averaged along the line to the replacement
            (ig, integrated gradients), which takes 4 passes per layer for heads and as many for neurons.
        objective: for atp; the gold answer's log-probability, or the margin of its tokens over the likeliest
            other tokens.
        absolute: for atp; whether absolute values are taken per token position, or of each example's sum.
        confirm: measure the exact effect of the best N heads and N neurons of an estimate one by one, and
            rank by it. A random sample of the others is measured too, to show how many were missed.
        joint: with --confirm; also mask the N neurons all together, restore each alone, and rank neurons by
            the mean of both effects, each as a share of its largest. Finds neurons that do the same as
            others, whose single effects are small.
        scope: the tokens at which sites are edited: all, prompt, image, text, last, generated, or several
            joined by +; for hones, vseam and atp. Other scopes than all take full passes.

    Example:
        hones-eval rank --method hones --model llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf \\
            --tasks vqav2_val --limit 200 --out runs/vqa/ranking
        hones-eval rank --method vseam --model qwen2_5_vl \\
            --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct --tasks vseam_color_both \\
            --out runs/color/ranking
    """
    from hones_eval import api
    from hones_eval.api import ranking as ranking_api

    options = {
        "race": race,
        "race_bound": race_bound,
        "race_span": race_span,
        "screen": screen,
        "screen_share": screen_share,
        "budget": budget,
        "metric_only": metric_only,
        "edit": edit,
        "estimate": estimate,
        "objective": objective,
        "absolute": absolute,
        "confirm": confirm,
        "joint": joint,
        "scope": scope,
    }
    names = ranking_api.ranked_tasks(tasks, method)
    for name in names:
        ranking_api.check_request(name, method, **options)  # type: ignore[arg-type]
    loaded = api.load(
        model, model_args, dtype=dtype, batch_size=batch_size, devices=devices, num_nodes=num_nodes
    )

    def measured(task: str, folder: Path) -> Answer:
        ranking = api.rank(
            loaded,
            task,
            method=method,
            include_path=include_path,
            limit=limit,
            offset=offset,
            gen_kwargs=gen_kwargs,
            metric=metric,
            target=target,
            heads=heads,
            neurons=neurons,
            seed=seed,
            out=folder,
            resume=resume,
            **options,  # type: ignore[arg-type]
        )
        return answer_of(ranking, folder, explicit_heads=heads is not None)

    if len(names) == 1:
        return measured(tasks, out)
    for name in names[1:]:  # a task that cannot be read is told before hours of work on the others
        loaded.examples(
            name,
            include_path=include_path,
            limit=limit,
            offset=offset,
            gen_kwargs=gen_kwargs,
            metric=metric,
            target=target,
        )
    answers = {}
    for name in names:
        note(f"rank: {name}")
        answers[name] = measured(name, out / name)
    return _answer_of_several(answers, out)


def _answer_of_several(answers: Mapping[str, Answer], out: Path) -> Answer:
    """Every task's answer, and a table of the headlines."""
    lines = [line for answer in answers.values() for line in answer.lines]
    rows = [{"task": name, "found": answer.headline} for name, answer in answers.items()]
    data = {"out": str(out), "tasks": {name: answer.data for name, answer in answers.items()}}
    headline = f"{len(answers)} tasks, a ranking each"
    return Answer(lines, data, headline, [Table("Rankings", rows)], parts=answers)


def answer_of(ranking: "Ranking", out: Path, explicit_heads: bool = True) -> Answer:
    """Which heads and neurons a ranking names."""
    report = ranking.report or {}
    method = ranking.provenance.method
    exactness = f", replay {report['replay']}" if "replay" in report else f", ranked by {method}"
    edit = ranking.provenance.settings.get("edit")
    if edit is not None:
        exactness += f", heads replaced by {HEAD_EDITS[edit].help}"
    lines = [f"wrote {out}: {_count(report['examples'], 'example')}{exactness}"]
    if not explicit_heads and method in HEAD_UNITS:
        shape, chosen = ranking.provenance.shape, ranking.provenance.settings["heads"]
        lines.append(
            f"chose {chosen} of {shape.layers * shape.heads} heads, the paper's share (30 of 1024); --heads "
            "changes that"
        )
    if method == "hones":
        lines += _hones_lines(report)
    elif method == "vseam":
        lines += _vseam_lines(report)
    lines += _confirmed_lines(report)
    best = []
    if ranking.head_scores is not None and method in HEAD_UNITS:
        best = ranking.top_heads(min(SHOWN, ranking.measured_heads))
    if best and best[0][1] > 0:
        unit = HEAD_UNITS[method] if "confirmed" not in report else "drop of the answer's log-probability"
        shown = ", ".join(f"{head.layer}.{head.head} {score:+.4f}" for head, score in best)
        lines.append(f"top heads, as layer.head with the {unit}: {shown}")
    if ranking.neuron_scores is not None:
        lines.append(_neuron_line(ranking))
        lines += _unmeasured_lines(report)
    lines += [f"warning: {warning}" for warning in _warnings(ranking)]
    return Answer(lines, _data(ranking, out), _headline(ranking), _tables(ranking), _charts(ranking))


def _headline(ranking: "Ranking") -> str:
    """The best heads, or the layers that the selected neurons are in."""
    task, method = ranking.provenance.examples[0].task, ranking.provenance.method
    if ranking.head_scores is not None and method in HEAD_UNITS:
        found = ranking.top_heads(min(3, ranking.measured_heads))
        best = [f"{head.layer}.{head.head}" for head, score in found if score > 0]
        if not best:
            return f"No head matters for {task} on these examples"
        listed = f"{', '.join(best[:-1])} and {best[-1]}" if len(best) > 1 else best[0]
        return f"Heads {listed} matter most for {task}"
    counts = _selected_by_layer(ranking)
    layer, count = counts.most_common(1)[0]
    return f"{count} of {counts.total()} neurons selected for {task} are in layer {layer}"


def _tables(ranking: "Ranking") -> list[Table]:
    """The best heads and neurons."""
    tables = []
    if ranking.head_scores is not None and ranking.provenance.method in HEAD_UNITS:
        best = ranking.top_heads(min(LISTED, ranking.measured_heads))
        rows = [{"layer": head.layer, "head": head.head, "score": score} for head, score in best]
        tables.append(Table(f"The {len(rows)} best heads", rows))
    if ranking.neuron_scores is not None:
        found = ranking.top_neurons(min(LISTED, int(ranking.measured_neurons().sum())))
        rows = [{"layer": neuron.layer, "neuron": neuron.neuron, "score": score} for neuron, score in found]
        tables.append(Table(f"The {len(rows)} best neurons", rows))
        counts = sorted(_selected_by_layer(ranking).items())
        rows = [{"layer": layer, "selected neurons": count} for layer, count in counts]
        tables.append(Table("Selected neurons by layer", rows))
    return tables


def _charts(ranking: "Ranking") -> list[HeatMap]:
    """All heads with their scores."""
    if ranking.head_scores is None or ranking.provenance.method not in HEAD_UNITS:
        return []
    there = ranking.provenance.shape.head_mask()
    values = [
        [score if exists else None for score, exists in zip(scores, mask, strict=True)]
        for scores, mask in zip(ranking.head_scores.tolist(), there.tolist(), strict=True)
    ]
    return [HeatMap(f"Every head: {HEAD_UNITS[ranking.provenance.method]}", values, "layer", "head")]


def _hones_lines(report: dict[str, Any]) -> list[str]:
    lines = [f"{report['metric']} {report['base_metric']:.4g} unedited"]
    if "margin" in report:
        lines.append(
            f"answers are margins {report['margin']}; {report['examples_sharing_a_prefix']} examples shared "
            f"the prefix of their image with others ({report['prefix_sharing']})"
        )
    if "screen" in report:
        found = report["screen"]
        lines.append(
            f"screened by first-order estimates (with gradients): {found['heads_measured']} heads measured; "
            f"the other {found['heads_not_measured']} are stored as 0 and never chosen"
        )
    if "budget" in report:
        lines.append(_budget_line(report["budget"]))
    if "race" in report:
        found = report["race"]
        lines.append(
            f"raced at risk {found['delta']:g}: {found['work_saved']:.0%} of the work saved, "
            f"{found['examples_run']} of {report['examples']} examples run, "
            f"{len(found['undecided'])} heads measured on all of them"
        )
    return lines


def _budget_line(found: dict[str, Any]) -> str:
    spent, whole, bound = (
        found["head_examples"],
        found["head_examples_of_an_exact_search"],
        found["risk_bound"],
    )
    line = (
        f"budget {found['share']:g}: measured {spent} of {whole} head-examples ({spent / whole:.1%}) after "
        f"{found['gradient_examples']} gradient passes"
    )
    if bound is None or bound == 1:
        return f"{line}; no bound shows that these are the best of the screened heads"
    return f"{line}; the best of the screened heads are right with probability at least {1 - bound:.3g}"


def _vseam_lines(report: dict[str, Any]) -> list[str]:
    return [
        f"the most likely first token was right in {report['correct_examples']} of {report['examples']} "
        f"examples; {len(report['top_positive'])} heads help, {len(report['top_negative'])} hurt"
    ]


def _confirmed_lines(report: dict[str, Any]) -> list[str]:
    return [
        f"measured the {found['candidates']} best {kind} exactly, and {found['sampled']} random others, of "
        f"which {found['sampled_above_the_last_selected']} exceed the last of the {found['selected']} "
        f"selected ({found['effect_of_the_last_selected']:.3g})"
        for kind, found in report.get("confirmed", {}).items()
    ] + [
        f"masked together, the {found['candidates']} neurons cost {found['drop_when_all_are_masked']:.3g}; "
        f"their single effects add up to {found['sum_of_single_drops']:.3g}"
        for found in report.get("confirmed", {}).values()
        if "drop_when_all_are_masked" in found
    ]


def _neuron_line(ranking: "Ranking") -> str:
    """How the selected neurons lie over the layers."""
    counts = _selected_by_layer(ranking)
    by_layer = ", ".join(f"{layer}: {count}" for layer, count in sorted(counts.items()))
    return f"{_count(counts.total(), 'neuron')} selected, by layer {by_layer}"


def _selected_by_layer(ranking: "Ranking") -> Counter[int]:
    """The number of selected neurons of each layer that has any."""
    return Counter(neuron.layer for neuron in ranking.neurons())


def _unmeasured_lines(report: dict[str, Any]) -> list[str]:
    """The neurons of experts that no example was routed to."""
    if not report.get("neurons_not_measured"):
        return []
    return [
        f"not measured: {report['neurons_not_measured']} neurons of {report['experts_never_routed_to']} of "
        f"the {report['experts']} experts, to which no example was routed; they are never selected"
    ]


def _warnings(ranking: "Ranking") -> list[str]:
    report = ranking.report or {}
    found = list(report.get("warnings", []))
    if ranking.provenance.method == "hones" and not report["heads_with_positive_score"]:
        found.append(
            "no head's replacement lowers the metric, so neurons are ranked by their contribution alone; use "
            "more examples, or a task that the model can do"
        )
    return found


def _data(ranking: "Ranking", out: Path) -> dict[str, Any]:
    """The answer for programs."""
    report = {key: value for key, value in (ranking.report or {}).items() if key != "screen"}
    data: dict[str, Any] = {"out": str(out), "method": ranking.provenance.method, "report": report}
    if ranking.head_scores is not None:
        best = ranking.top_heads(min(20, ranking.measured_heads))
        data["top_heads"] = [{"layer": h.layer, "head": h.head, "score": score} for h, score in best]
    if ranking.neuron_scores is not None:
        data["neurons"] = [list(neuron) for neuron in ranking.neurons()]
    return data


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
