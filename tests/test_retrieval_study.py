"""`study` and `compare` on retrieval by margins, compared with plain forward passes of the embedded model."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from margins import Slow
from torch import Tensor

from hones_eval.__main__ import main
from hones_eval.api import model as loading
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Neuron, matched_random, top_neurons
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.jobs.study import WAYS
from hones_eval.lmms.examples import TaskExamples
from hones_eval.toy import checkpoint_path

MODEL, ARGUMENTS = "llava_hf", f"pretrained={checkpoint_path()}"
# On shifted images, where the model makes errors; scales for retrieval are also tested on normal images.
RETRIEVAL, OTHER = "scenes_retrieval_margin_shifted", "scenes_vqa_relation_shifted"
PLAIN = "scenes_retrieval_margin"
CANDIDATES = 20  # two queries of ten
TRIALS = 2
WIDTH = 344  # neurons in a layer of the embedded model
SHARE, FACTOR = 0.2, -3.0  # large enough to change ranks: one percent changes none


@pytest.fixture(scope="module", autouse=True)
def once(models_loaded_once: None) -> Iterator[None]:
    """Load the embedded model once, by the real loader."""
    return


def command(name: str, out: Path, candidates: int, *more: str) -> list[str]:
    few = json.dumps({RETRIEVAL: candidates})
    given = ["--model", MODEL, "--model_args", ARGUMENTS, "--tasks", f"{RETRIEVAL},{OTHER}"]
    return [name, *more, *given, "--limit", "2", "--limits", few, "--neurons", str(SHARE), "--out", str(out)]


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    tested = ["--test_limit", "2", "--test_limits", json.dumps({RETRIEVAL: CANDIDATES})]
    learning = ["--shifted", f"{RETRIEVAL}={PLAIN}", "--learning_rate", "0.3", "--epochs", "1"]
    chosen = ["--methods", '["hones", "dvp"]', "--heads", "4", "--trials", str(TRIALS)]
    assert main(command("study", out, 10, *tested, *learning, *chosen, "--factor", str(FACTOR))) == 0
    return out


@lru_cache
def slow(task: str) -> Slow:
    return Slow(MODEL, ARGUMENTS, task, ("Yes", "No"), CANDIDATES)


def test_a_study_tests_every_steering_like_plain_forward_passes(studied: Path) -> None:
    rows = json.loads((studied / "study.json").read_text())["steering"]
    seen = []
    for split, task in (("test", RETRIEVAL), ("shifted", PLAIN)):
        reference = slow(task)
        base = reference.ndcg(reference.logits())
        for row in rows:
            if row["measured_on"] != RETRIEVAL or row["split"] != split:
                continue
            steering = Steering.load(studied / "steerings" / row["chosen_for"] / row["how"])
            steered = reference.ndcg(reference.scaled(steering.neuron_scales))
            assert row["metric"] == "ndcg_at_5"
            assert row["baseline"] == pytest.approx(base)
            assert row["steered"] == pytest.approx(steered), (split, row["chosen_for"], row["how"])
            assert row["gain"] == pytest.approx(steered - base)
            seen.append((split, row["chosen_for"], row["how"], steered - base))
    own = [("test", RETRIEVAL, how) for how in WAYS] + [("test", OTHER, how) for how in WAYS]
    assert sorted(one[:3] for one in seen) == sorted([*own, *(("shifted", RETRIEVAL, how) for how in WAYS)])
    for split in ("test", "shifted"):
        gains = {gain for where, *_, gain in seen if where == split}
        assert len(gains) > 1, f"{split}: all scales have the same effect, so this test is uninformative"


def test_a_study_masks_like_plain_forward_passes(studied: Path) -> None:
    reference = slow(RETRIEVAL)
    base = reference.ndcg(reference.logits())
    rows = json.loads((studied / "study.json").read_text())["attribution"]
    found = {row["method"]: row for row in rows if row["task"] == RETRIEVAL}
    drops = {}
    for method in ("hones", "dvp"):
        bank = selected(studied / "rankings" / RETRIEVAL / method)
        drops[method] = base - reference.ndcg(reference.steered(bank, 0.0))
        assert found.pop(method)["drop"] == pytest.approx(drops[method])
    (random,) = found.values()
    like = selected(studied / "rankings" / RETRIEVAL / "hones")
    banks = [matched_random(like, WIDTH, seed) for seed in range(TRIALS)]
    others = [base - reference.ndcg(reference.steered(bank, 0.0)) for bank in banks]
    assert random["drop"] == pytest.approx(sum(others) / TRIALS)
    assert [random["drop_low"], random["drop_high"]] == pytest.approx([min(others), max(others)])
    assert len({*drops.values(), *others}) > 1, (
        "all banks have the same effect, so this test is uninformative"
    )


def selected(folder: Path) -> list[Neuron]:
    scores = Ranking.load(folder).neuron_scores
    return top_neurons(scores, round(SHARE * scores.numel()))


def test_the_cross_task_matrix_matches_plain_forward_passes(studied: Path, tmp_path: Path) -> None:
    folders = {task: studied / "rankings" / task / "hones" for task in (RETRIEVAL, OTHER)}
    out = tmp_path / "compared"
    assert main(command("compare", out, CANDIDATES, *map(str, folders.values()), "--seed", "3")) == 0
    report: dict[str, Any] = json.loads((out / "compare.json").read_text())
    banks = {f"{task}_discovery": selected(folder) for task, folder in folders.items()}
    reference = slow(RETRIEVAL)
    base = reference.ndcg(reference.logits())
    rows = {row["masked"]: row for row in report["cross_task"] if row["measured"] == RETRIEVAL}
    assert list(rows) == list(banks)
    drops = []
    for name, bank in banks.items():
        masked = reference.ndcg(reference.steered(bank, 0.0))
        random = reference.ndcg(reference.steered(matched_random(bank, WIDTH, 3), 0.0))
        row = rows[name]
        assert [row["baseline"], row["metric"]] == pytest.approx([base, masked])
        assert row["drop"]["value"] == pytest.approx(base - masked)
        assert row["relative_drop"]["value"] == pytest.approx((base - masked) / base)
        assert row["random_drop"] == pytest.approx(base - random)
        drops += [base - masked, base - random]
    assert len(set(drops)) > 1, "all banks have the same effect, so this test is uninformative"
    one, other = (set(bank) for bank in banks.values())
    (overlap,) = report["neuron_overlaps"]
    assert overlap["jaccard"] == pytest.approx(len(one & other) / len(one | other))
    assert report["groups"] == {
        f"{RETRIEVAL}_discovery": len(one - other),
        f"{OTHER}_discovery": len(other - one),
        "+".join(banks): len(one & other),
    }


def test_the_truth_of_single_neurons_matches_plain_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the values of `benchmarks/scenes_methods.py`: NDCG@5, and the correct candidate's lead."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import scenes_methods

    reference = slow(RETRIEVAL)
    lmm = loading.load_lmm(MODEL, ARGUMENTS)
    examples = TaskExamples(lmm, RETRIEVAL, model_name=MODEL, limit=CANDIDATES)
    neurons = [Neuron(0, 304), Neuron(0, 270), Neuron(2, 17), Neuron(4, 100), Neuron(5, 3)]
    found = scenes_methods.margin_drops(Replayer(Anatomy.of(reference.model)), examples, neurons)
    base = reference.logits()
    masked = [reference.steered([neuron], 0.0) for neuron in neurons]
    leads = [lead(reference, base) - lead(reference, one) for one in masked]
    assert found.answer.tolist() == pytest.approx(leads, abs=1e-5)
    assert found.metric.tolist() == pytest.approx(
        [reference.ndcg(base) - reference.ndcg(one) for one in masked], abs=1e-6
    )
    assert max(map(abs, leads)) > 1e-2, "no neuron has an effect, so this test is uninformative"


def lead(reference: Slow, logits: Tensor) -> float:
    """The correct candidate's margin minus the mean margin of the others, averaged over queries."""
    members: dict[str, dict[bool, list[float]]] = {}
    for query, right, margin in zip(
        reference.queries, reference.right, reference.margins(logits), strict=True
    ):
        members.setdefault(query, {True: [], False: []})[right].append(margin)
    leads = [sum(one[True]) - sum(one[False]) / len(one[False]) for one in members.values()]
    return sum(leads) / len(leads)
