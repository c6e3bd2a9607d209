"""HONES and V-SEAM on recorded examples equal the plain loop of one head, one item, one full pass.

The answers that small random models give are random too: the gold answers here are what each model says
itself, unedited or with a head replaced, so that metrics move.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import plain
import pytest
import torch
from drawn_data import write_folder
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.jobs.rank import Discovery, discover, provenance
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods import hones
from hones_eval.methods.hones import NeuronAttribution
from hones_eval.methods.localization import HeadLocalization
from hones_eval.methods.projection import inverse_document_frequency
from hones_eval.methods.registry import MethodName as Method
from hones_eval.methods.vseam import HeadContribution
from hones_eval.runs.lightning import Loop

CHECKPOINTS = {"llava_hf": "llava", "qwen2_5_vl": "qwen", "instructblip": "instructblip"}
SETTINGS = "max_new_tokens=4,min_new_tokens=2"
LONG_SETTINGS = "max_new_tokens=14,min_new_tokens=14"
CHOSEN = 6


class Task(NamedTuple):
    """A model as its stock wrapper loads it, cast to float32, with examples it can lose something on."""

    model: PreTrainedModel
    examples: TaskExamples
    items: list[plain.Item]

    @property
    def replayer(self) -> Replayer:
        return Replayer(Anatomy.of(self.model))

    def metric(self, answers: list[list[int]]) -> float:
        """VQA accuracy, one answer after the other; or whatever the corpus gives."""
        decoded = [self.examples.decode(i, tokens) for i, tokens in enumerate(answers)]
        results = [self.examples.score(i, text) for i, text in enumerate(decoded)]
        if self.examples.metric != "vqa_accuracy":
            return self.examples.aggregate(results)
        return sum(result["vqa_accuracy"] for result in results) / len(results)

    def discover(self, method: Method, rows: int | None = None) -> Ranking:
        replayer = Replayer(Anatomy.of(self.model), rows)
        source = provenance(replayer.anatomy, self.examples, method, {"neurons": 0.02}, 0)
        loop = Loop("cpu", progress=False)
        ranking = discover(Discovery(replayer, self.examples, loop, source, CHOSEN, 0.02))
        assert replayer.inexact is None
        assert ranking.report is not None
        return ranking


@pytest.fixture(scope="module")
def load(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], Task]]:
    """A wrapper's model with examples of a task, made once."""
    made: dict[tuple[str, str], Task] = {}
    models: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:

        def make(wrapper: str, task: str) -> Task:
            if wrapper not in models:
                checkpoint = request.getfixturevalue(f"{CHECKPOINTS[wrapper]}_checkpoint")
                models[wrapper] = load_lmm(wrapper, f"pretrained={checkpoint}")
                inner_model(models[wrapper]).float()
            if (wrapper, task) not in made:
                folder = write_folder(tmp_path_factory.mktemp("drawn") / "data", 5)
                patch.setenv("HONES_EVAL_DATA", str(folder))
                examples = open_task(models[wrapper], wrapper, task)
                write_own_answers(folder / "drawn.json", inner_model(models[wrapper]), examples)
                examples = open_task(models[wrapper], wrapper, task)
                made[wrapper, task] = Task(inner_model(models[wrapper]), examples, items_of(examples))
            return made[wrapper, task]

        yield make


def open_task(lmm: Any, wrapper: str, task: str) -> TaskExamples:
    if task == "hones_vqa":
        return TaskExamples(lmm, task, model_name=wrapper, gen_kwargs=SETTINGS)
    return TaskExamples(lmm, task, model_name=wrapper, gen_kwargs=LONG_SETTINGS, limit=3)


def items_of(examples: TaskExamples) -> list[plain.Item]:
    recorded = [examples[i] for i in range(len(examples))]
    return [plain.Item(one.inputs, one.settings, one.target_ids) for one in recorded]


def write_own_answers(file: Path, model: PreTrainedModel, examples: TaskExamples) -> None:
    """Some answers are right unedited, some with one head replaced or another; one is never right."""
    content = json.loads(file.read_text())
    heads = ((0, 1), (1, 0), (1, 2), (2, 0), (2, 3))
    for i, (item, entry) in enumerate(zip(items_of(examples), content["data"], strict=False)):
        base = examples.decode(i, plain.answer(model, item)).strip()
        texts = [examples.decode(i, plain.answer(model, item, plain.Edit(*head))) for head in heads]
        a, b, c = [text.strip() for text in dict.fromkeys(texts) if text.strip() not in ("", base)][:3]
        answers = [
            [base] * 10,
            [base] + [a] * 3 + [b] * 3 + [c] * 3,
            [a] * 5 + [b] * 5,
            ["plate"] * 10,
            [base] * 2 + [b] * 4 + [c] * 4,
        ]
        entry["vqa"]["answers"] = answers[i]
        captions = [[base, a], [base, b], [base], ["a red plate"], [c]]
        entry["captions"] = [{"caption": text} for text in captions[i]]
    file.write_text(json.dumps(content))


@pytest.fixture(params=CHECKPOINTS)
def task(request: pytest.FixtureRequest, load: Callable[[str, str], Task]) -> Task:
    return load(request.param, "hones_vqa")


def close(found: Tensor | None, expected: Tensor, tolerance: float) -> None:
    """Within a share of the largest."""
    assert found is not None
    worst = (found.double() - expected).abs().max() / expected.abs().max()
    assert worst <= tolerance, f"{worst:.1e}"


def best(scores: Tensor, count: int) -> list[tuple[int, int]]:
    sites = [(layer, site) for layer in range(scores.shape[0]) for site in range(scores.shape[1])]
    return sorted(sites, key=lambda site: (-float(scores[site]), site))[:count]


def test_hones_heads_and_neurons(task: Task) -> None:
    """Both passes of HONES, as `hones-eval rank` runs them."""
    ranking = task.discover("hones")
    drops, log_drops = plain.hones_heads(task.model, task.items, task.metric)
    assert (drops > 0).any()
    assert (drops < 0).any()
    torch.testing.assert_close(ranking.head_scores, drops.float(), atol=1e-6, rtol=0)
    close(ranking.head_log_probability, log_drops, 1e-5)
    chosen = best(ranking.head_scores, CHOSEN)
    assert [tuple(one["head"]) for one in ranking.report["heads"]] == chosen
    weights = {plain.Edit(*site): float(drops[site]) for site in chosen if drops[site] > 0}
    assert ranking.report["heads_with_positive_score"] == len(weights) > 1
    importance = plain.hones_neurons(task.model, task.items, weights)
    close(ranking.neuron_scores, importance, 1e-5)
    large = importance > 0.01 * importance.max()
    torch.testing.assert_close(ranking.neuron_scores.double()[large], importance[large], rtol=1e-4, atol=0)
    count = round(0.02 * importance.numel())
    assert [tuple(one) for one in ranking.neurons()] == best(importance, count)
    base = task.metric([plain.answer(task.model, item) for item in task.items])
    assert ranking.report["base_metric"] == pytest.approx(base)
    assert ranking.report["examples"] == 5
    assert ranking.report["replay"] == "exact"


def test_neurons_below_the_lowest_chosen_head_have_no_importance(task: Task) -> None:
    top = len(plain.layers(task.model)) - 1
    attribution = NeuronAttribution(task.replayer, [Head(top, 0), Head(top, 1)])
    totals = Loop("cpu", progress=False).run(task.examples, attribution, "neurons")
    importance = attribution.importance(totals, torch.ones(2))
    assert torch.equal(importance[:top], torch.zeros_like(importance[:top]))
    assert (importance[top] > 0).any()


def test_drops_rectified_item_by_item(load: Callable[[str, str], Task]) -> None:
    task = load("llava_hf", "hones_vqa")
    weights = {plain.Edit(0, 1): 0.25, plain.Edit(2, 3): 0.5}
    attribution = NeuronAttribution(task.replayer, [Head(0, 1), Head(2, 3)], rectify="item")
    totals = Loop("cpu", progress=False).run(task.examples, attribution, "neurons")
    found = attribution.importance(totals, torch.tensor([0.25, 0.5]))
    expected = plain.hones_neurons(task.model, task.items, weights, per_item=True)
    close(found, expected, 1e-5)
    of_means = plain.hones_neurons(task.model, task.items, weights)
    assert (expected - of_means).abs().max() > 0.01 * expected.max()


def test_without_a_head_of_weight_importance_is_the_mean_contribution(
    load: Callable[[str, str], Task],
) -> None:
    task = load("llava_hf", "hones_vqa")
    attribution = NeuronAttribution(task.replayer, [])
    totals = Loop("cpu", progress=False).run(task.examples, attribution, "neurons")
    close(
        attribution.importance(totals, torch.ones(0)), plain.hones_neurons(task.model, task.items, {}), 1e-5
    )


def test_a_corpus_metric_is_computed_again_for_every_head(load: Callable[[str, str], Task]) -> None:
    """Captions: BLEU-4 of the corpus, and targets weighed by the rarity of their tokens."""
    task = load("llava_hf", "hones_caption")
    assert task.examples.metric == "bleu_4"
    ranking = task.discover("hones")
    drops, log_drops = plain.hones_heads(task.model, task.items, task.metric)
    assert len(drops.unique()) > 2
    torch.testing.assert_close(ranking.head_scores, drops.float(), atol=1e-6, rtol=0)
    close(ranking.head_log_probability, log_drops, 1e-5)
    rarity = plain.rarities([item.target for item in task.items])
    weighed = [item._replace(rarity=rarity) for item in task.items]
    weights = {plain.Edit(*site): float(drops[site]) for site in best(drops, CHOSEN) if drops[site] > 0}
    assert weights
    importance = plain.hones_neurons(task.model, weighed, weights)
    close(ranking.neuron_scores, importance, 1e-5)
    unweighed = plain.hones_neurons(task.model, task.items, weights)
    assert (importance - unweighed).abs().max() > 1e-3 * importance.max()


def test_neurons_take_no_pass_of_their_own_where_their_sums_fit(
    load: Callable[[str, str], Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass gives the importance that two passes give, of every head that may be chosen."""
    task = load("qwen2_5_vl", "hones_vqa")
    with monkeypatch.context() as patch:
        patch.setattr(hones, "NEURON_BYTES", 0)
        apart = task.discover("hones")

    def separate(*_: object) -> None:
        raise AssertionError("neurons took a pass of their own")

    monkeypatch.setattr(NeuronAttribution, "measure", separate)
    together = task.discover("hones")
    assert torch.equal(together.head_scores, apart.head_scores)
    close(together.neuron_scores, apart.neuron_scores.double(), 1e-5)
    assert together.report == apart.report


def test_where_lower_is_better_scores_change_their_sign(
    load: Callable[[str, str], Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load("llava_hf", "hones_vqa")
    localization = HeadLocalization(task.replayer, task.examples)
    totals = Loop("cpu", progress=False).run(task.examples, localization, "heads")
    scores = localization.scores(totals)
    monkeypatch.setattr(task.examples, "higher_is_better", False)
    assert torch.equal(localization.scores(totals), -scores)
    assert scores.any()


def test_vseam_heads(task: Task) -> None:
    ranking = task.discover("vseam")
    expected = plain.vseam_heads(task.model, task.items)
    assert 0 < expected["correct"] < len(task.items)
    assert ranking.report["correct_examples"] == expected["correct"]
    assert ranking.report["incorrect_examples"] == len(task.items) - expected["correct"]
    close(ranking.head_scores, expected["signed"], 1e-5)
    close(ranking.head_positive, expected["positive"], 1e-5)
    close(ranking.head_negative, expected["negative"], 1e-5)
    positive = expected["positive"]
    named = [tuple(one["head"]) for one in ranking.report["top_positive"]]
    assert named == [site for site in best(positive, CHOSEN) if positive[site] > 0]


@pytest.mark.parametrize("method", ["hones", "vseam"])
def test_however_many_rows_are_replayed_at_once(load: Callable[[str, str], Task], method: Method) -> None:
    task = load("qwen2_5_vl", "hones_vqa")
    whole, cut = task.discover(method), task.discover(method, rows=3)
    close(cut.head_scores, whole.head_scores.double(), 1e-5)
    if method == "hones":
        close(cut.neuron_scores, whole.neuron_scores.double(), 1e-5)


def test_where_replay_is_not_exact_full_passes_give_the_same(load: Callable[[str, str], Task]) -> None:
    task = load("llava_hf", "hones_vqa")
    replayed = task.discover("vseam")
    replayer = task.replayer
    replayer.inexact = "for this test"
    source = provenance(replayer.anatomy, task.examples, "vseam", {}, 0)
    full = discover(Discovery(replayer, task.examples, Loop("cpu", progress=False), source, CHOSEN, 0.02))
    close(full.head_scores, replayed.head_scores.double(), 1e-5)
    assert full.report["replay"] == "full forward passes: for this test"


def test_sums_do_not_grow_with_the_number_of_examples(load: Callable[[str, str], Task]) -> None:
    task = load("llava_hf", "hones_vqa")
    shape = task.replayer.anatomy.shape
    measures = [
        HeadLocalization(task.replayer, task.examples),
        NeuronAttribution(task.replayer, [Head(0, 0), Head(1, 1)]),
        HeadContribution(task.replayer, task.examples),
    ]
    largest = [shape.layers * shape.heads, 2 * shape.layers * shape.neurons, shape.layers * shape.heads]
    for measure, size in zip(measures, largest, strict=True):
        totals = Loop("cpu", progress=False).run(task.examples, measure, "pass")
        assert {name: total.shape for name, total in totals.sums.items()} == {
            name: zero.shape for name, zero in measure.zeros().items()
        }
        assert max(total.numel() for total in totals.sums.values()) == size
        assert all(record is None for record in totals.records.values())


def test_activations_that_are_not_finite_are_an_error(
    load: Callable[[str, str], Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load("llava_hf", "hones_vqa")
    weight = plain.layers(task.model)[1].mlp.up_proj.weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight, float("inf")))
    (replayer := task.replayer).inexact = "for this test"
    with pytest.raises(
        HonesError, match="hones_vqa, doc_id 0: the FFN activations of layer 1 are not finite"
    ):
        NeuronAttribution(replayer, []).measure(task.examples[0])
    for measure in (HeadLocalization(replayer, task.examples), HeadContribution(replayer, task.examples)):
        with pytest.raises(HonesError, match="hones_vqa, doc_id 0: the FFN activations of layer 1 are not"):
            measure.measure(task.examples[0])


def test_inverse_document_frequencies() -> None:
    documents = [[1, 1, 2], [2, 3], [2]]
    found = inverse_document_frequency(documents, 5)
    expected = plain.rarities(documents)
    assert {token: float(found[token]) for token in (1, 2, 3)} == pytest.approx(expected)
    assert float(found[0]) == pytest.approx(torch.log(torch.tensor(4.0)).item() + 1)
