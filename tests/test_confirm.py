"""`rank --confirm`: exact effects of the best sites of an estimate, compared with a plain loop."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import own_answers
import plain
import pytest
import torch

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Neuron
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.confirm import missed_bound

COUNT = 3
CONFIRM = 12
TENSORS = ("scores", "examples", "estimate")
ATP = ["--method", "atp", "--limit", COUNT, "--heads", 4, "--neurons", 0.02]


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def folder(own: own_answers.Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("confirmed")
    assert main(own.command("rank", *ATP, "--confirm", CONFIRM, "--out", out)) == 0
    return out


@pytest.fixture(scope="module")
def confirmed(folder: Path) -> Ranking:
    return Ranking.load(folder)


def test_confirmed_scores_are_those_of_a_plain_loop(own: own_answers.Prepared, confirmed: Ranking) -> None:
    """Each head replaced, each neuron masked, alone; the drop of the gold answer's log-probability."""
    lmm = load_lmm(own_answers.MODEL, own.model_args)
    examples = TaskExamples(lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, limit=COUNT)
    model = inner_model(lmm)
    items = [plain.Item(examples[i].inputs, {}, examples[i].target_ids) for i in range(COUNT)]
    base = [plain.log_probability(model, item) for item in items]
    for kind, edit in (("head", "mean"), ("neuron", "zero neuron")):
        scores, counts, _ = (getattr(confirmed, f"{kind}_{name}") for name in TENSORS)
        sites = counts.nonzero().tolist()
        assert len(sites) > CONFIRM  # the best and the sample of the others
        for layer, site in sites[:: max(1, len(sites) // 12)]:
            edited = [plain.log_probability(model, item, plain.Edit(layer, site, edit)) for item in items]
            drop = sum(before - after for before, after in zip(base, edited, strict=True)) / COUNT
            assert float(scores[layer, site]) == pytest.approx(drop, abs=2e-5)
        assert scores.abs().max() > 1e-3


def test_only_measured_sites_are_selected_and_the_estimate_is_kept(
    own: own_answers.Prepared, confirmed: Ranking, tmp_path: Path
) -> None:
    assert main(own.command("rank", *ATP, "--out", tmp_path)) == 0
    estimate = Ranking.load(tmp_path)
    assert confirmed.report is not None
    for kind, selected in (("head", confirmed.heads(4)), ("neuron", confirmed.neurons())):
        scores, counts, kept = (getattr(confirmed, f"{kind}_{name}") for name in TENSORS)
        torch.testing.assert_close(kept, getattr(estimate, f"{kind}_scores"), rtol=1e-6, atol=1e-9)
        assert set(counts.unique().tolist()) <= {0.0, float(COUNT)}
        assert all(counts[site] == COUNT for site in selected)
        best = kept.flatten().topk(CONFIRM).indices
        assert bool((counts.flatten()[best] == COUNT).all())
        about = confirmed.report["confirmed"][f"{kind}s"]
        assert about["candidates"] == CONFIRM
        assert about["candidates"] + about["sampled"] == int((counts > 0).sum())
        assert about["selected"] == len(selected)
        own_order = sorted(scores.flatten()[best].tolist(), reverse=True)
        assert about["effect_of_the_last_selected"] == pytest.approx(own_order[len(selected) - 1], abs=1e-6)
        assert about["share_of_others_above_at_most"] == pytest.approx(
            missed_bound(about["sampled_above_the_last_selected"], about["sampled"])
        )


def masked(model: Any, item: plain.Item, neurons: Sequence[Neuron]) -> float:
    """The log-probability of an item's target with some neurons masked, by hooks of this test's own."""
    layers = Anatomy.of(model).neurons_in
    handles = []
    for layer, site in enumerate(layers):
        own = [neuron.neuron for neuron in neurons if neuron.layer == layer]

        def hook(_: object, args: tuple[torch.Tensor], own: list[int] = own) -> torch.Tensor:
            changed = args[0].clone()
            changed[..., own] = 0
            return changed

        handles.append(site.module.register_forward_pre_hook(hook))
    found = plain.log_probability(model, item)
    for handle in handles:
        handle.remove()
    return found


def test_joint_effects_are_those_of_a_plain_loop(
    own: own_answers.Prepared, confirmed: Ranking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All candidates masked together, and each alone restored; heads and single effects are as without."""
    assert main(own.command("rank", *ATP, "--confirm", CONFIRM, "--joint", "--out", tmp_path)) == 0
    assert f"masked together, the {CONFIRM} neurons cost" in capsys.readouterr().out
    found = Ranking.load(tmp_path)
    single, joint, scores = found.neuron_single, found.neuron_joint, found.neuron_scores
    assert single is not None
    assert joint is not None
    assert scores is not None
    torch.testing.assert_close(single, confirmed.neuron_scores)
    torch.testing.assert_close(found.head_scores, confirmed.head_scores)
    estimate = found.neuron_estimate
    assert estimate is not None
    best = estimate.flatten().topk(CONFIRM).indices.tolist()
    bank = [Neuron(*divmod(place, estimate.shape[1])) for place in best]
    assert {Neuron(*place) for place in joint.nonzero().tolist()} <= set(bank)
    lmm = load_lmm(own_answers.MODEL, own.model_args)
    examples = TaskExamples(lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, limit=COUNT)
    model = inner_model(lmm)
    items = [plain.Item(examples[i].inputs, {}, examples[i].target_ids) for i in range(COUNT)]
    together = [masked(model, item, bank) for item in items]
    for neuron in bank[::3]:
        rest = [other for other in bank if other != neuron]
        returned = sum(masked(model, item, rest) - all_ for item, all_ in zip(items, together, strict=True))
        assert float(joint[neuron]) == pytest.approx(returned / COUNT, abs=2e-5)
    assert joint.abs().max() > 1e-3
    cost = sum(plain.log_probability(model, item) - all_ for item, all_ in zip(items, together, strict=True))
    assert found.report is not None
    about = found.report["confirmed"]["neurons"]
    assert about["drop_when_all_are_masked"] == pytest.approx(cost / COUNT, abs=2e-5)
    torch.testing.assert_close(scores, (single / single.max() + joint / joint.max()) / 2)


def test_two_processes_confirm_the_same_sites(
    own: own_answers.Prepared, confirmed: Ranking, tmp_path: Path
) -> None:
    given = own.command("rank", *ATP, "--confirm", CONFIRM, "--devices", 2, "--out", tmp_path)
    run = [sys.executable, "-m", "hones_eval", *given]
    done = subprocess.run(run, timeout=300, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    two = Ranking.load(tmp_path)
    for kind in ("head", "neuron"):
        for name in TENSORS:
            mine, theirs = (getattr(ranking, f"{kind}_{name}") for ranking in (two, confirmed))
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert two.neurons() == confirmed.neurons()


def test_all_sites_of_a_kind_may_be_confirmed(own: own_answers.Prepared, tmp_path: Path) -> None:
    """With more candidates than heads, every head is measured and none is left to sample."""
    assert main(own.command("rank", *ATP, "--confirm", 40, "--limit", 1, "--out", tmp_path)) == 0
    report = Ranking.load(tmp_path).report
    assert report is not None
    heads = report["confirmed"]["heads"]
    assert heads["candidates"] < 40
    assert heads["sampled"] == heads["others"] == 0
    assert heads["share_of_others_above_at_most"] is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--confirm", 10**6], r"--confirm 1000000: the model has \d+ neurons; give 1 to that many"),
        (["--confirm", 0], r"--confirm 0: the model has \d+ neurons; give 1 to that many"),
        (["--confirm", 3], "--confirm 3 is fewer than the 4 heads to select"),
        (["--confirm", 5, "--heads", 2, "--neurons", 0.5], r"--confirm 5 is fewer than the \d+ neurons"),
        (["--confirm", 5, "--method", "vseam"], "--confirm has nothing to do for --method vseam"),
        (["--joint"], "--joint needs --confirm N, and a method that estimates effects of neurons"),
    ],
)
def test_a_number_that_cannot_be_confirmed_is_refused(
    own: own_answers.Prepared,
    flags: list[object],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The message names the number and the way out, and nothing is written."""
    command = own.command("rank", *ATP, *flags, "--out", tmp_path / "new")
    if "vseam" in command:
        command = own.command("rank", "--limit", COUNT, "--heads", 4, *flags, "--out", tmp_path / "new")
    capsys.readouterr()
    assert main(command) == 1
    assert re.search(says, own_answers.complaint(capsys.readouterr().err))
    assert not (tmp_path / "new").exists()
