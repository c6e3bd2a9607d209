"""The effect of every single head and neuron of the small model on every task, by exhaustive ablation.

This is the yardstick for attribution methods. It was made by

    python -m hones_eval.toy.ground_truth --out hones_eval/toy/ground_truth --examples 200

on the discovery splits, by replay. `ground_truth.json` says how many examples each task has. Tasks from an
earlier format, with 32 examples, have neither errors nor halves, and tasks of another one no margin.

The command measures one task after the other and stores each in files of its own. It can be stopped at any
time: the same command continues from the last finished example, and skips finished tasks. The same examples
give the same tensors, however often the command was stopped.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import digest, hash_of, read_json, write_bytes, write_json
from hones_eval.core.sites import Head, Neuron
from hones_eval.engine.passes import SiteEdit
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples, inner_model, load_lmm
from hones_eval.runs.ablation import Ablation
from hones_eval.runs.checkpoint import Partial
from hones_eval.runs.lightning import Loop
from hones_eval.runs.measure import Measurement, Totals
from hones_eval.toy import checkpoint_path

FOLDER = Path(__file__).resolve().parent / "ground_truth"
TASKS = ("vqa_object", "vqa_attribute", "vqa_relation", "ocr", "caption", "retrieval", "grounding")
KINDS = ("heads_by_mean", "heads_by_zero", "neurons")
MEASURES = ("metric", "log_probability", "margin")
SPREAD = ("squares", "even")
"""The sums from which standard errors and split halves are computed, next to the plain sum."""


class Effects(NamedTuple):
    """Drops under one edit at a time: `[L, H]` for heads and `[L, I]` for neurons, float32.

    `metric`, `log_probability` and `margin` are the mean drops of the task's metric (its sign is flipped
    where lower is better), of the gold answer's log-probability, and of its margin: the sum over its tokens
    of the token's logit minus the largest other logit. `errors` are their standard errors by name, and
    `halves` the drops on the examples of even and of odd index. A metric that is computed over the corpus has
    halves but no standard error. Tasks that were measured in an earlier format have no margin, or neither
    errors nor halves.
    """

    metric: Tensor
    log_probability: Tensor
    errors: dict[str, Tensor]
    halves: dict[str, tuple[Tensor, Tensor]]
    margin: Tensor | None = None


class GroundTruth(NamedTuple):
    """Effects by task and kind of edit, and a report of how they were made."""

    effects: dict[str, dict[str, Effects]]
    report: dict[str, Any]


def load_ground_truth(folder: Path = FOLDER) -> GroundTruth:
    """Load the stored ground truth of the shipped model.

    Raises: HonesError when a file is missing, or does not match the digest that was stored with it.
    """
    report = read_json(folder / "ground_truth.json")
    path = folder / "ground_truth.safetensors"
    if not path.is_file():
        raise HonesError(f"{path} does not exist: install hones-eval again")
    tensors = load_file(path)
    if digest(tensors) != report["digest"]:
        raise HonesError(f"{path} does not match the digest in ground_truth.json: install hones-eval again")
    effects = {
        task: {kind: _effects_in(tensors, f"{task}.{kind}") for kind in KINDS} for task in report["tasks"]
    }
    return GroundTruth(effects, report)


def _effects_in(tensors: dict[str, Tensor], name: str) -> Effects:
    def halves(measure: str) -> tuple[Tensor, Tensor]:
        return tensors[f"{name}.{measure}.even"], tensors[f"{name}.{measure}.odd"]

    return Effects(
        metric=tensors[f"{name}.metric"],
        log_probability=tensors[f"{name}.log_probability"],
        errors={m: tensors[f"{name}.{m}.error"] for m in MEASURES if f"{name}.{m}.error" in tensors},
        halves={m: halves(m) for m in MEASURES if f"{name}.{m}.even" in tensors},
        margin=tensors.get(f"{name}.margin"),
    )


class SpreadAblation:
    """An ablation that also sums what standard errors and split halves need."""

    def __init__(self, ablation: Ablation) -> None:
        """Measure the ablation's edits on its examples."""
        self.ablation = ablation

    def zeros(self) -> dict[str, Tensor]:
        """The ablation's sums, and per measure the squares and the sum over examples of even index [E]."""
        sums = self.ablation.zeros()
        drops = {f"{measure}_drop": sums[f"{measure}_drop"] for measure in MEASURES}
        return sums | {
            f"{name}_{part}": torch.zeros_like(drop) for name, drop in drops.items() for part in SPREAD
        }

    def measure(self, example: Example) -> Measurement:
        """Measure one example under every edit."""
        measured = self.ablation.measure(example)
        sums = dict(measured.sums)
        for measure in MEASURES:
            drop = sums[f"{measure}_drop"]
            sums[f"{measure}_drop_squares"] = drop.square()
            sums[f"{measure}_drop_even"] = drop * float(example.index % 2 == 0)
        return Measurement(sums, measured.record)

    def tensors(self, totals: Totals) -> dict[str, Tensor]:
        """Everything that is stored of a task [E], by measure: the mean, its standard error, both halves."""
        examples = self.ablation.examples
        sign = 1.0 if examples.higher_is_better else -1.0
        found = {
            f"{measure}{name}": value
            for measure in ("log_probability", "margin")
            for name, value in _spread(totals, f"{measure}_drop", len(examples), 1.0).items()
        }
        if examples.is_mean:
            metric = _spread(totals, "metric_drop", len(examples), sign)
        else:
            metric = {"": self.ablation.metric_drops(totals)}
            for name, odd in ((".even", 0), (".odd", 1)):
                half = {index: record for index, record in totals.records.items() if index % 2 == odd}
                metric[name] = self.ablation.metric_drops(Totals(totals.sums, half))
        return found | {f"metric{name}": value for name, value in metric.items()}


def _spread(totals: Totals, name: str, count: int, sign: float) -> dict[str, Tensor]:
    """Mean, standard error, and means of the two halves of a sum over `count` examples."""
    total, squares = totals.sums[name], totals.sums[f"{name}_squares"]
    even, evens = totals.sums[f"{name}_even"], (count + 1) // 2
    # Rounding can leave a sum of squares just below the square of the sum where all examples agree.
    variance = (squares - total.square() / count).clamp(min=0) / max(count - 1, 1)
    return {
        "": sign * total / count,
        ".error": (variance / count).sqrt(),
        ".even": sign * even / evens,
        ".odd": sign * (total - even) / max(count - evens, 1),
    }


def make_ground_truth(out: Path, tasks: Sequence[str], examples: int, checkpoint: Path) -> None:
    """Ablate every site on the first examples of every task's discovery split, and write the effects.

    Tasks that `out` already holds for these examples are not measured again. Tasks of other commands stay.
    """
    lmm = load_lmm("llava_hf", f"pretrained={checkpoint}", device="cpu")
    anatomy = Anatomy.of(inner_model(lmm))
    weights = (checkpoint / "model.safetensors.sha256").read_text(encoding="utf-8").split()[0]
    for task in tasks:
        name = f"scenes_{task}_discovery"
        discovery = TaskExamples(lmm, name, model_name="llava_hf", limit=examples)
        if discovery.kind.name != "text":
            raise HonesError(
                f"{name} asks for {discovery.kind.name}: the ground truth needs answers in words"
            )
        stored = _stored(out, weights).get(task, {})
        if stored.get("examples_hash") == discovery.example_set().hash and "margin" in stored.get(
            "measures", ()
        ):
            print(f"{task}: already measured on these examples", flush=True)
            continue
        _measure_task(out, task, discovery, anatomy, weights)


def _measure_task(out: Path, task: str, discovery: TaskExamples, anatomy: Anatomy, weights: str) -> None:
    """Measure one task, and add it to the files in `out`."""
    chosen = discovery.example_set()
    ablation = Ablation(Replayer(anatomy), discovery, all_edits(anatomy), margins=True)
    spread = SpreadAblation(ablation)
    loop = Loop("cpu", progress=True)
    loop.partial = Partial(
        out / "partial" / task, hash_of([weights, chosen.hash, json.dumps(SPREAD + MEASURES)]), True
    )
    started = time.process_time()
    totals = loop.run(discovery, spread, task)
    report = {
        "task": discovery.task,
        "metric": discovery.metric,
        "base_metric": ablation.base_metric(totals),
        "base_log_probability": float(totals.sums["log_probability"] / totals.sums["examples"]),
        "examples": chosen.count,
        "examples_hash": chosen.hash,
        "measures": list(MEASURES),
        "cpu_seconds_of_the_last_start": round(time.process_time() - started),
    }
    tensors = {
        f"{task}.{kind}.{name}": part
        for name, values in spread.tensors(totals).items()
        for kind, part in _by_kind(values, anatomy).items()
    }
    _add(out, task, tensors, report, weights)
    loop.partial.clear()


def _stored(out: Path, weights: str) -> dict[str, Any]:
    """The reports by task that `out` holds for a checkpoint. Raises: HonesError for another checkpoint."""
    if not (out / "ground_truth.json").is_file():
        return {}
    report = load_ground_truth(out).report
    if report["checkpoint_sha256"] != weights:
        raise HonesError(f"{out} is the ground truth of another checkpoint: use another --out")
    return dict(report["tasks"])


def _add(out: Path, task: str, tensors: dict[str, Tensor], report: dict[str, Any], weights: str) -> None:
    """Add a task to the files in `out`, or replace it."""
    reports = _stored(out, weights)
    known = load_file(out / "ground_truth.safetensors") if reports else {}
    kept = {name: value for name, value in known.items() if name.split(".")[0] != task}
    together = {name: value.contiguous() for name, value in sorted((kept | tensors).items())}
    reports = {name: (reports | {task: report})[name] for name in TASKS if name in reports or name == task}
    write_bytes(out / "ground_truth.safetensors", save(together))
    write_json(
        out / "ground_truth.json",
        {"digest": digest(together), "checkpoint_sha256": weights, "tasks": reports},
    )


def all_edits(anatomy: Anatomy) -> list[SiteEdit]:
    """Every head by the mean of the others, every head by zero, and every neuron masked, in this order."""
    shape = anatomy.shape
    heads = [Head(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    neurons = [Neuron(layer, neuron) for layer in range(shape.layers) for neuron in range(shape.neurons)]
    return [
        *(SiteEdit(head, "mean") for head in heads),
        *(SiteEdit(head, "zero") for head in heads),
        *(SiteEdit(neuron, "mask") for neuron in neurons),
    ]


def _by_kind(values: Tensor, anatomy: Anatomy) -> dict[str, Tensor]:
    """Values of `all_edits` [E] as [L, H] or [L, I] float32 per kind of edit."""
    shape = anatomy.shape
    sizes = [shape.layers * shape.heads] * 2 + [shape.layers * shape.neurons]
    parts = [part.reshape(shape.layers, -1).float() for part in values.split(sizes)]
    return dict(zip(KINDS, parts, strict=True))


def main() -> None:
    """Make the ground truth of the shipped model, or of another checkpoint of its kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--examples", type=int, default=200, help="of each task's discovery split")
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: the shipped one")
    given = parser.parse_args()
    torch.set_num_threads(1)  # two threads are slower on a model this small
    make_ground_truth(given.out, given.tasks, given.examples, given.checkpoint or checkpoint_path())


if __name__ == "__main__":
    main()
