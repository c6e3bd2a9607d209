"""What every single head and neuron of the small VLM does for every task: exhaustive ablation.

The yardstick for attribution methods. Made by

    python -m hones_eval.toy.ground_truth --out hones_eval/toy/ground_truth --examples 100

on the discovery splits, through replay; the same command gives the same bytes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import digest, read_json, write_bytes, write_json
from hones_eval.core.sites import Head, Neuron
from hones_eval.engine.passes import SiteEdit
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.runs.ablation import Ablation
from hones_eval.runs.measure import Totals
from hones_eval.toy import checkpoint_path

FOLDER = Path(__file__).resolve().parent / "ground_truth"
TASKS = ("vqa_object", "vqa_attribute", "vqa_relation", "ocr", "caption", "retrieval", "grounding")
KINDS = ("heads_by_mean", "heads_by_zero", "neurons")


class Effects(NamedTuple):
    """Drops of a task's metric and of its target's log-probability under one edit at a time.

    `[L, H]` for heads and `[L, I]` for neurons, float32; the metric's sign is flipped where lower is better.
    """

    metric: Tensor
    log_probability: Tensor


class GroundTruth(NamedTuple):
    """Effects by task and kind of edit, and how they were made."""

    effects: dict[str, dict[str, Effects]]
    report: dict[str, Any]


def load_ground_truth(folder: Path = FOLDER) -> GroundTruth:
    """The stored ground truth of the shipped model; a file that does not match its digest is an error."""
    report = read_json(folder / "ground_truth.json")
    path = folder / "ground_truth.safetensors"
    if not path.is_file():
        raise HonesError(f"{path} does not exist: install hones-eval again")
    tensors = load_file(path)
    if digest(tensors) != report["digest"]:
        raise HonesError(f"{path} is not the file that ground_truth.json was written with")
    effects = {
        task: {
            kind: Effects(tensors[f"{task}.{kind}.metric"], tensors[f"{task}.{kind}.log_probability"])
            for kind in KINDS
        }
        for task in report["tasks"]
    }
    return GroundTruth(effects, report)


def make_ground_truth(out: Path, tasks: Sequence[str], examples: int, checkpoint: Path) -> None:
    """Ablate every site on the first examples of every task's discovery split, and write the effects."""
    lmm = load_lmm("llava_hf", f"pretrained={checkpoint}", device="cpu")
    anatomy = Anatomy.of(inner_model(lmm))
    tensors: dict[str, Tensor] = {}
    reports: dict[str, Any] = {}
    for task in tasks:
        name = f"scenes_{task}_discovery"
        discovery = TaskExamples(lmm, name, model_name="llava_hf", limit=examples)
        ablation = Ablation(Replayer(anatomy), discovery, all_edits(anatomy))
        totals = _run(ablation, discovery, task)
        for kind, effects in _by_kind(ablation, totals, anatomy).items():
            tensors[f"{task}.{kind}.metric"] = effects.metric
            tensors[f"{task}.{kind}.log_probability"] = effects.log_probability
        chosen = discovery.example_set()
        reports[task] = {
            "task": name,
            "metric": discovery.metric,
            "base_metric": ablation.base_metric(totals),
            "examples": chosen.count,
            "examples_hash": chosen.hash,
        }
    write_bytes(out / "ground_truth.safetensors", save(tensors))
    weights = (checkpoint / "model.safetensors.sha256").read_text(encoding="utf-8").split()[0]
    report = {"digest": digest(tensors), "checkpoint_sha256": weights, "tasks": reports}
    write_json(out / "ground_truth.json", report)


def all_edits(anatomy: Anatomy) -> list[SiteEdit]:
    """Every head by the mean of the others, every head by zero, every neuron masked, in this order."""
    shape = anatomy.shape
    heads = [Head(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
    neurons = [Neuron(layer, neuron) for layer in range(shape.layers) for neuron in range(shape.neurons)]
    return [
        *(SiteEdit(head, "mean") for head in heads),
        *(SiteEdit(head, "zero") for head in heads),
        *(SiteEdit(neuron, "mask") for neuron in neurons),
    ]


def _run(ablation: Ablation, examples: TaskExamples, name: str) -> Totals:
    sums = ablation.zeros()
    records: dict[int, Any] = {}
    for index in tqdm(range(len(examples)), desc=name):
        measured = ablation.measure(examples[index])
        sums = {key: value + measured.sums[key] for key, value in sums.items()}
        records[index] = measured.record
    return Totals(sums, records)


def _by_kind(ablation: Ablation, totals: Totals, anatomy: Anatomy) -> dict[str, Effects]:
    shape = anatomy.shape
    sizes = [shape.layers * shape.heads, shape.layers * shape.heads, shape.layers * shape.neurons]
    return {
        kind: Effects(metric.reshape(shape.layers, -1).float(), log_p.reshape(shape.layers, -1).float())
        for kind, metric, log_p in zip(
            KINDS,
            ablation.metric_drops(totals).split(sizes),
            ablation.log_probability_drops(totals).split(sizes),
            strict=True,
        )
    }


def main() -> None:
    """Make the ground truth of the shipped model, or of another checkpoint of its kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--examples", type=int, default=100, help="of each task's discovery split")
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: the shipped one")
    given = parser.parse_args()
    torch.set_num_threads(1)  # two are slower on a model this small
    make_ground_truth(given.out, given.tasks, given.examples, given.checkpoint or checkpoint_path())


if __name__ == "__main__":
    main()
