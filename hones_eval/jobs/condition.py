"""Learn when a steering should act: a direction and a threshold that tell two tasks' prompts apart."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.condition import Condition
from hones_eval.errors import HonesError
from hones_eval.jobs.rank import provenance
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods.condition import Projections, PromptMeans, best_cut
from hones_eval.runs.lightning import Loop


def learn_condition(
    anatomy: Anatomy,
    examples: TaskExamples,
    against: TaskExamples,
    loop: Loop,
    settings: dict[str, Any],
    layer: int | None = None,
) -> Condition:
    """Learn a condition that holds for the prompts of one task and not for those of another.

    The direction is the difference of the mean residual streams of the two tasks' prompts. Layer and
    threshold are those with the highest balanced accuracy on the same examples, about half of all; among
    equal layers the one with the widest gap between the tasks is taken. The others, with other images, only
    measure precision and recall.

    Args:
        anatomy: of the model.
        examples: of the task for which the condition should hold.
        against: of the task for which it should not.
        loop: runs passes over examples.
        settings: what the provenance records.
        layer: whose input is read; None chooses one.

    Raises: HonesError when a task has no example to learn from, or none to test on.
    """
    layers = range(anatomy.shape.layers) if layer is None else [layer]
    if layer is not None and not 0 <= layer < anatomy.shape.layers:
        raise HonesError(f"--layer {layer}: this model has layers 0 to {anatomy.shape.layers - 1}")
    tasks = (examples, against)
    sums = [loop.run(task, PromptMeans(anatomy), f"means {i}").sums for i, task in enumerate(tasks, start=1)]
    counts = [int(found["examples"]) for found in sums]
    for task, count in zip(tasks, counts, strict=True):
        if not 0 < count < len(task):
            raise HonesError(
                f"{task.task}: {count} of its {len(task)} examples are to learn from and the others to test "
                "on; both need one or more: raise --limit"
            )
    difference = sums[0]["stream"] / counts[0] - sums[1]["stream"] / counts[1]
    directions = difference / difference.norm(dim=1, keepdim=True).clamp_min(1e-12)
    records = [
        list(loop.run(task, Projections(anatomy, directions), f"products {i}").records.values())
        for i, task in enumerate(tasks, start=1)
    ]
    learned = [_products(part, held_out=False) for part in records]
    cuts = {i: best_cut(learned[0][:, i], learned[1][:, i]) for i in layers}
    chosen = max(layers, key=lambda i: (cuts[i].balanced, cuts[i].margin, -i))
    tested = [_products(part, held_out=True)[:, chosen] for part in records]
    report = _report(tested, cuts[chosen].threshold, counts)
    report["balanced_accuracy_by_layer"] = {str(i): cuts[i].balanced for i in layers}
    recorded = settings | {"tasks": examples.task, "against": against.task, "layer": chosen}
    source = provenance(anatomy, examples, "hones", recorded, 0)
    source = replace(source, method="condition", examples=[*source.examples, against.example_set()])
    return Condition(chosen, directions[chosen].float(), cuts[chosen].threshold, source, report)


def _products(records: Sequence[Any], *, held_out: bool) -> Tensor:
    """The products [examples, L] of one half of a task's examples."""
    return torch.tensor([products for held, products in records if held is held_out], dtype=torch.float64)


def _report(tested: Sequence[Tensor], threshold: float, learned: Sequence[int]) -> dict[str, Any]:
    """Precision and recall on held-out examples, with all counts."""
    hits, false = (int((part > threshold).sum()) for part in tested)
    return {
        "precision": hits / (hits + false) if hits + false else None,
        "recall": hits / len(tested[0]),
        "false_alarms": false / len(tested[1]),
        "held_out": [len(part) for part in tested],
        "learned_from": list(learned),
    }


def summary(condition: Condition) -> str:
    """One line about how well a condition does on held-out examples."""
    report, tasks = condition.report, condition.provenance.settings
    share = report["precision"]
    precision = "it held for none" if share is None else f"precision {share:.3f}"
    return (
        f"layer {condition.layer}; on {report['held_out'][0]} held-out examples of {tasks['tasks']} and "
        f"{report['held_out'][1]} of {tasks['against']}: {precision}, recall {report['recall']:.3f}"
    )
