"""Ranking baselines: against loops written out from their definitions, through the command."""

import math
from pathlib import Path
from typing import Any

import own_answers
import plain
import pytest
import torch
from torch import Tensor

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.baselines import NeuronActivity, entropy
from hones_eval.runs.measure import Totals

LIMIT = 3


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def lmm(own: own_answers.Prepared) -> Any:
    return load_lmm(own_answers.MODEL, own.model_args)


def last_activations(lmm: Any, own: own_answers.Prepared, task: str) -> list[tuple[Tensor, Any]]:
    """`z` [L, I] at the last prompt token of every example, by hooks of the reference."""
    examples = TaskExamples(lmm, task, model_name=own_answers.MODEL, include_path=own.tasks, limit=LIMIT)
    found = []
    for i in range(len(examples)):
        passed = plain.forward(inner_model(lmm), examples[i].inputs)
        found.append((torch.stack([z[-1] for z in passed.neurons]), examples[i]))
    return found


def expected_scores(method: str, lmm: Any, own: own_answers.Prepared) -> Tensor:
    model = inner_model(lmm)
    rows = last_activations(lmm, own, "own_a")
    if method == "dvp":
        items = [plain.Item(example.inputs, {}, example.target_ids) for _, example in rows]
        return plain.hones_neurons(model, items, {})
    size = torch.stack([z.abs() for z, _ in rows]).mean(0)
    if method == "write_norm":
        for layer, block in enumerate(plain.layers(model)):
            for neuron in range(size.shape[1]):
                size[layer, neuron] *= float(block.mlp.down_proj.weight[:, neuron].detach().norm())
    return size


@pytest.mark.parametrize("method", ["activation", "write_norm", "dvp"])
def test_the_command_scores_as_the_definition_says(
    method: str, own: own_answers.Prepared, lmm: Any, tmp_path: Path
) -> None:
    assert main(own.command("rank", "--method", method, "--limit", LIMIT, "--out", tmp_path)) == 0
    found = Ranking.load(tmp_path)
    assert found.head_scores is None
    torch.testing.assert_close(
        found.neuron_scores, expected_scores(method, lmm, own).float(), rtol=1e-4, atol=1e-6
    )


def test_random_scores_come_from_the_seed(own: own_answers.Prepared, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        chosen = ["--limit", LIMIT, "--seed", seed, "--out", tmp_path / name]
        assert main(own.command("rank", "--method", "random", *chosen)) == 0
    a, b, c = (Ranking.load(tmp_path / name) for name in "abc")
    assert a.digest == b.digest != c.digest
    assert 0.4 < float(a.neuron_scores.mean()) < 0.6


def plain_entropy(p: list[float]) -> float:
    total = sum(p)
    chaos = -sum(q / total * math.log(q / total) for q in p if q > 0) if total else math.log(len(p))
    most = max(p)
    return (p[0] if p[0] == most and most > 0 else -most) * max(0.0, math.log(len(p)) - chaos)


def test_entropy_tells_tasks_apart_and_names_all_examples(
    own: own_answers.Prepared, lmm: Any, tmp_path: Path
) -> None:
    given = own.command(
        "rank", "--method", "entropy", "--limit", LIMIT, "--out", tmp_path, task="own_a,own_b"
    )
    assert main(given) == 0
    found = Ranking.load(tmp_path)
    assert [one.task for one in found.provenance.examples] == ["own_a", "own_b"]
    p = torch.stack(
        [
            torch.stack([(z > 0).float() for z, _ in last_activations(lmm, own, task)]).mean(0)
            for task in ("own_a", "own_b")
        ]
    )
    expected = [[plain_entropy(p[:, i, j].tolist()) for j in range(p.shape[2])] for i in range(p.shape[1])]
    torch.testing.assert_close(found.neuron_scores, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert bool((found.neuron_scores > 0).any())


def test_entropy_prefers_what_only_the_first_task_uses() -> None:
    def totals(active: list[float]) -> Totals:
        return Totals({"active": torch.tensor([active]), "examples": torch.tensor(4.0)}, {})

    scores = entropy([totals([4, 4, 0, 1, 0]), totals([0, 4, 4, 0, 0])])[0].tolist()
    assert scores == pytest.approx([math.log(2), 0, -math.log(2), math.log(2) / 4, 0], abs=1e-6)
    with pytest.raises(HonesError, match="--tasks a,b,c"):
        entropy([totals([1.0])])


def test_bad_requests_are_one_line(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(own.command("rank", "--method", "entropy", "--limit", LIMIT, "--out", tmp_path)) == 1
    assert "give the task to rank for and then the others" in own_answers.complaint(capsys.readouterr().err)
    for tasks, says in (("own_a,own_a", "a task is named twice"), ("own_a,", "a name is empty")):
        assert main(own.command("rank", "--method", "entropy", "--out", tmp_path, task=tasks)) == 1
        assert says in own_answers.complaint(capsys.readouterr().err)
    given = own.command("rank", "--method", "random", "--limit", LIMIT, "--neurons", 2, "--out", tmp_path)
    assert main(given) == 1
    assert "share of neurons" in own_answers.complaint(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_activations_that_are_not_finite_are_named_with_their_layer(
    own: own_answers.Prepared, lmm: Any
) -> None:
    examples = TaskExamples(lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, limit=LIMIT)
    anatomy = Anatomy.of(inner_model(lmm))
    weight = plain.layers(inner_model(lmm))[2].mlp.up_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data[5] = float("inf")
        with pytest.raises(HonesError, match="doc_id 0: the FFN activations of layer 2 are not finite"):
            NeuronActivity(anatomy).measure(examples[0])
    finally:
        weight.data.copy_(kept)
