"""Rankings of neurons beside the exhaustive ground truth, and why projection without heads rivals HONES.

    python benchmarks/scenes_methods.py --study runs/scenes_study --out leaderboards/scenes/methods

takes the rankings of `scenes_study.py`, measures every bank below on each task's test split in one pass (kept
in the work folder), and writes tables and figures. Banks: every method's top 0.25 to 5 percent; without the
last layer; the same number in each layer; one method's order with the other's numbers in each layer; HONES
with other numbers and weights of heads. `truth` is the order of the ground truth itself: each neuron masked
alone, by the drop of the target's log-probability; for retrieval by how far the right candidate's margin is
above the others', which is measured here on `--truth` discovery candidates.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scenes_methods_report
import torch
from safetensors.torch import load_file, save_file
from scenes_board import CHECKPOINT
from scenes_study import CANDIDATES, TASKS
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import write_json
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron, matched_random, neuron_count, top_heads, top_neurons
from hones_eval.engine.passes import SiteEdit
from hones_eval.engine.replay import Replayer
from hones_eval.jobs.verify import Measured, masked
from hones_eval.lmms.answers.next_token import NumberTexts
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.answers import AnswersUnder, answered
from hones_eval.methods.hones import NeuronAttribution
from hones_eval.methods.projection import inverse_document_frequency
from hones_eval.runs.ablation import Ablation
from hones_eval.runs.lightning import Loop
from hones_eval.runs.measure import Totals
from hones_eval.toy import checkpoint_path
from hones_eval.toy.ground_truth import load_ground_truth

METHODS = ("hones", "dvp", "write_norm", "activation", "entropy", "random")
SIZES = (0.0025, 0.005, 0.01, 0.02, 0.05)
HEADS = 8  # that the study's rankings are conditioned on
RANDOM = 5


class Truth(NamedTuple):
    """What masking each neuron alone costs [L, I]."""

    metric: Tensor
    answer: Tensor
    """Of the target's log-probability; for margins of how far the right candidate is above the others."""


class Task(NamedTuple):
    """What is known of a task before any bank is masked: scores [L, I] by name, and the truth."""

    name: str
    ranking: Ranking
    scores: dict[str, Tensor]
    truth: Truth


def scores_of(lmm: Any, replayer: Replayer, name: str, study: Path, work: Path, truth_examples: int) -> Task:
    """The study's rankings, HONES with other heads and weights, and the ground truth."""
    folder = study / "rankings" / f"scenes_{name}"
    rankings = {method: Ranking.load(folder / method) for method in METHODS}
    truth = truth_of(lmm, replayer, name, work, truth_examples)
    hones = rankings["hones"]
    scores = {method: one.neuron_scores for method, one in rankings.items()}
    scores |= {"truth": truth.answer}
    drops = head_drops(lmm, replayer, name, hones, work)
    assert hones.head_scores is not None
    assert hones.head_log_probability is not None
    metric, log_p = hones.head_scores, hones.head_log_probability
    again = importance(drops, metric, top_heads(metric, HEADS))
    torch.testing.assert_close(again, hones.neuron_scores)  # the variants start from what HONES is
    everything = top_heads(metric, metric.numel())
    scores |= {f"hones, {count} heads": importance(drops, metric, everything[:count]) for count in (2, 4, 16)}
    scores["hones, all heads alike"] = importance(drops, torch.ones_like(metric), everything)
    chosen = [head for head in everything[:HEADS] if metric[head] > 0]
    scores["hones, 8 heads alike"] = importance(drops, torch.ones_like(metric), chosen)
    scores["hones, heads by log-probability"] = importance(drops, log_p, top_heads(log_p, HEADS))
    return Task(name, hones, scores, truth)  # type: ignore[arg-type]


def truth_of(lmm: Any, replayer: Replayer, name: str, work: Path, count: int) -> Truth:
    """As stored beside the model; for margins measured on `count` candidates and kept in the work folder."""
    if not name.endswith("_margin"):
        stored = load_ground_truth().effects[name]["neurons"]
        return Truth(stored.metric, stored.log_probability)
    shape, path = replayer.anatomy.shape, work / f"{name}_truth_{count}.safetensors"
    if not path.is_file():
        examples = TaskExamples(lmm, f"scenes_{name}_discovery", model_name="llava_hf", limit=count)
        neurons = [Neuron(layer, i) for layer in range(shape.layers) for i in range(shape.neurons)]
        work.mkdir(parents=True, exist_ok=True)
        save_file(margin_drops(replayer, examples, neurons)._asdict(), path)
    found = load_file(path)
    return Truth(**{what: one.unflatten(0, (shape.layers, shape.neurons)) for what, one in found.items()})


def margin_drops(replayer: Replayer, examples: TaskExamples, neurons: Sequence[Neuron]) -> Truth:
    """What masking each of some neurons alone costs [E]: NDCG@5, and the right candidate's lead.

    The lead is its margin minus the mean of the others' of its query, and its drop the mean over queries.
    What raises or lowers all candidates alike, and changes no rank, is no part of it, unlike of the
    log-probability of the right word.
    """
    ablation = Ablation(replayer, examples, [SiteEdit(neuron, "mask") for neuron in neurons])
    totals = Loop("cpu", progress=False).run(examples, ablation, examples.task)
    documents = [examples.document(index) for index in range(len(examples))]
    sizes = Counter(document["query"] for document in documents)
    lead = torch.zeros(len(neurons), dtype=torch.float64)
    for index, one in enumerate(documents):
        record = totals.records[index]
        margins = torch.tensor(
            [float(text) for text in NumberTexts.unpack(record["margins"]).values()]
        ).double()
        weight = 1.0 if one["answer"] == "Yes" else -1 / (sizes[one["query"]] - 1)
        lead += weight * (float(record["base"]) - margins)
    return Truth(ablation.metric_drops(totals).float(), (lead / len(sizes)).float())


def head_drops(lmm: Any, replayer: Replayer, name: str, hones: Ranking, work: Path) -> Tensor:
    """Every neuron's drop of its mean write-in contribution under every head's replacement [L, H, L, I]."""
    shape, path = replayer.anatomy.shape, work / f"{name}_head_drops.safetensors"
    if not path.is_file():
        source = hones.provenance.examples[0]
        examples = TaskExamples(lmm, source.task, model_name="llava_hf", limit=source.count)
        assert examples.example_set().hash == source.hash
        heads = [Head(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
        references = examples.caption_references()
        weights = None if references is None else inverse_document_frequency(references, shape.vocabulary)
        found = Loop("cpu", progress=False).run(
            examples, NeuronAttribution(replayer, heads, token_weights=weights), name
        )
        work.mkdir(parents=True, exist_ok=True)
        save_file({"drop": found.sums["drop"] / found.sums["examples"]}, path)
    return load_file(path)["drop"].unflatten(0, (shape.layers, shape.heads))


def importance(drops: Tensor, weights: Tensor, heads: Sequence[Head]) -> Tensor:
    """HONES 2: rectified drops, weighted by what heads score; heads without a positive weight are skipped."""
    kept = [head for head in heads if weights[head] > 0]
    total = sum(float(weights[head]) * drops[head].clamp(min=0) for head in kept)
    return (total / sum(float(weights[head]) for head in kept)).float()  # type: ignore[union-attr]


def banks_of(task: Task, seed: int) -> dict[str, list[Neuron]]:
    """Every bank that is masked, by name."""
    scores = task.scores
    layers, width = task.truth.metric.shape
    whole = {name: top_neurons(one, neuron_count(one, 0.01)) for name, one in scores.items()}
    banks = {
        f"{name} {size:.2%}": top_neurons(scores[name], neuron_count(scores[name], size))
        for name in (*METHODS, "truth")
        for size in SIZES
    }
    banks |= {name: bank for name, bank in whole.items() if name.startswith("hones,")}
    count = len(whole["hones"])
    for name in ("hones", "dvp", "random", "truth"):
        lower = scores[name].clone()
        lower[-1] = float("-inf")
        banks[f"{name}, no last layer"] = top_neurons(lower, count)
        banks[f"{name}, alike in all layers"] = by_layer(scores[name], shares(count, layers))
    numbers = {
        name: [sum(n.layer == layer for n in bank) for layer in range(layers)] for name, bank in whole.items()
    }
    banks["hones, numbers of dvp"] = by_layer(scores["hones"], numbers["dvp"])
    banks["dvp, numbers of hones"] = by_layer(scores["dvp"], numbers["hones"])
    banks["truth, numbers of hones"] = by_layer(scores["truth"], numbers["hones"])
    for name in ("hones", "dvp"):
        banks |= {
            f"random like {name} {i + 1}": matched_random(whole[name], width, seed + i) for i in range(RANDOM)
        }
    return banks


def by_layer(scores: Tensor, counts: Sequence[int]) -> list[Neuron]:
    """The best `counts[l]` neurons of every layer `l`."""
    orders = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return [Neuron(layer, int(i)) for layer, count in enumerate(counts) for i in orders[layer, :count]]


def shares(count: int, layers: int) -> list[int]:
    """`count` shared out over the layers as evenly as can be, the last layers first."""
    return [(count + layer) // layers for layer in range(layers)]


def measured(
    lmm: Any, replayer: Replayer, task: Task, banks: dict[str, list[Neuron]], work: Path, limit: int
) -> tuple[Measured, str]:
    """All banks masked on the task's test split, and the metric; answers are kept in the work folder."""
    examples = TaskExamples(lmm, f"scenes_{task.name}", model_name="llava_hf", limit=limit)
    path = work / f"{task.name}_answers.json"
    key = {"banks": {name: [list(n) for n in bank] for name, bank in banks.items()}}
    key["examples"] = examples.example_set().hash  # type: ignore[assignment]
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if {name: known.get(name) for name in key} != key:
        steerings = {name: masked(task.ranking, bank) for name, bank in banks.items()}
        totals = Loop("cpu", progress=False).run(
            examples, AnswersUnder(replayer, examples, steerings), task.name
        )
        known = key | {"answers": {str(index): one for index, one in totals.records.items()}}
        write_json(path, known)
    records = {int(index): one for index, one in known["answers"].items()}
    return Measured(examples, answered(Totals({}, records)), 0), examples.metric


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/scenes_study"))
    parser.add_argument("--work", type=Path, default=Path("runs/scenes_methods"))
    parser.add_argument("--out", type=Path, default=Path("leaderboards/scenes/methods"))
    parser.add_argument("--limit", type=int, default=200, help="test examples of each task")
    parser.add_argument(
        "--tasks", nargs="+", default=TASKS, choices=TASKS, help="others stay as they are in --out"
    )
    parser.add_argument(
        "--truth", type=int, default=200, help="discovery candidates of retrieval, ten a query, for its truth"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    lmm = load_lmm("llava_hf", f"pretrained={checkpoint_path(CHECKPOINT)}", device="cpu")
    replayer = Replayer(Anatomy.of(inner_model(lmm)))
    reports = scenes_methods_report.known(given.out)
    for name in given.tasks:
        task = scores_of(lmm, replayer, name, given.study, given.work, given.truth)
        banks = banks_of(task, seed=0)
        limit = int(CANDIDATES["test_limit"] * given.limit) if "retrieval" in name else given.limit
        found, metric = measured(lmm, replayer, task, banks, given.work, limit)
        reports[name] = scenes_methods_report.task_report(task, banks, found, metric)
    scenes_methods_report.write([reports[name] for name in TASKS if name in reports], given.out)


if __name__ == "__main__":
    main()
