"""`rank --race` and `rank --screen` through the command, beside every head on every example."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from own_answers import complaint, write_tasks
from torch import Tensor

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.localization import HeadLocalization
from hones_eval.toy import checkpoint_path

TASK, COUNT, KEEP = "scenes_vqa_attribute_discovery", 64, 1
MODEL_ARGS = f"pretrained={checkpoint_path()},device=cpu"


def command(out: Path, *others: object, task: str = TASK, method: str = "hones") -> list[str]:
    arguments = ["rank", "--method", method, "--model", "llava_hf", "--model_args", MODEL_ARGS]
    arguments += ["--tasks", task, "--limit", COUNT, "--heads", KEEP, "--out", out]
    return [*map(str, [*arguments, *others])]


@pytest.fixture(scope="module")
def drops() -> Tensor:
    """Every head's drop of the metric on every example [examples, L, H]."""
    lmm = load_lmm("llava_hf", MODEL_ARGS)
    examples = TaskExamples(lmm, TASK, model_name="llava_hf", limit=COUNT)
    localization = HeadLocalization(Replayer(Anatomy.of(inner_model(lmm))), examples)
    measured = [localization.measure(examples[i]).sums["metric_drop"] for i in range(COUNT)]
    return torch.stack(measured).unflatten(1, (6, 8))


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Ranking:
    out = tmp_path_factory.mktemp("raced")
    assert main(command(out, "--race", "0.5", "--seed", "3")) == 0
    return Ranking.load(out)


def test_a_raced_head_scores_its_mean_over_the_examples_it_saw(raced: Ranking, drops: Tensor) -> None:
    assert raced.head_scores is not None
    assert raced.head_examples is not None
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    seen = raced.head_examples.long()
    expected = torch.tensor(
        [[float(drops[order[: seen[i, j]], i, j].mean()) for j in range(8)] for i in range(6)]
    )
    (best,) = raced.heads(KEEP)
    assert drops.mean(0)[best] == drops.mean(0).max()
    torch.testing.assert_close(raced.head_scores[best], expected[best])
    below = expected.clamp(max=float(expected[best]))  # what left early and by luck stands below the chosen
    torch.testing.assert_close(raced.head_scores, below)
    assert int(seen.min()) < int(seen.max()), "no head left early: the test has shown nothing"


def test_options_of_what_is_not_asked_for_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, value, of in (("race_span", "9", "race"), ("screen_share", "0.1", "screen")):
        assert main(command(tmp_path, f"--{flag}", value)) == 1
        assert f"--{flag} {float(value)} has no effect without --{of}" in capsys.readouterr().err


def test_the_report_says_how_the_race_went(raced: Ranking) -> None:
    assert raced.report is not None
    assert raced.head_examples is not None
    race, seen = raced.report["race"], raced.head_examples
    assert race["delta"] == 0.5
    assert race["bound"] == "betting"
    assert race["order_seed"] == raced.provenance.seed == 3
    assert race["examples_run"] == int(seen.max())
    assert race["undecided"] == [[i, j] for i in range(6) for j in range(8) if seen[i, j] == COUNT]
    assert race["work_saved"] == pytest.approx(1 - float(seen.sum()) / (48 * COUNT))
    assert race["work_saved"] > 0.1
    assert raced.provenance.settings["race"] == 0.5
    assert "screen" not in raced.provenance.settings


def test_a_screen_measures_the_best_and_marks_the_rest(
    tmp_path: Path, drops: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, "--screen", "first_order", "--screen_share", "0.1", "--limit", "16")) == 0
    assert (
        "by first-order estimates (with gradients): 5 heads measured; the other 43 are stored as 0"
        in capsys.readouterr().out
    )
    ranking = Ranking.load(tmp_path)
    assert ranking.head_scores is not None
    assert ranking.head_examples is not None
    assert ranking.report is not None
    screen, measured = ranking.report["screen"], ranking.head_examples > 0
    assert "needs gradients" in screen["by"]
    assert set(ranking.head_examples.flatten().tolist()) == {0, 16}
    best = torch.tensor(screen["estimates"]).flatten().topk(5).indices
    assert sorted(best.tolist()) == measured.flatten().nonzero()[:, 0].tolist()
    exact = drops[:16].mean(0).float()
    torch.testing.assert_close(ranking.head_scores, torch.where(measured, exact, 0))
    assert len(ranking.heads(5)) == 5
    with pytest.raises(HonesError, match="cannot choose 6 of the 5 heads that were measured"):
        ranking.heads(6)


def test_a_race_among_screened_heads(tmp_path: Path) -> None:
    assert main(command(tmp_path, "--screen", "first_order", "--race", "0.5", "--limit", "24")) == 0
    ranking = Ranking.load(tmp_path)
    assert ranking.head_examples is not None
    assert int((ranking.head_examples > 0).sum()) == 12
    assert ranking.report is not None
    assert {"race", "screen"} <= ranking.report.keys()


def test_a_budget_finds_the_best_head_and_says_what_it_spent(
    tmp_path: Path, drops: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, "--budget", "0.125", "--metric_only")) == 0
    ranking = Ranking.load(tmp_path)
    assert ranking.head_scores is not None
    assert ranking.head_examples is not None
    assert ranking.report is not None
    assert ranking.head_log_probability is None
    assert ranking.report["base_log_probability"] is None
    budget, seen = ranking.report["budget"], ranking.head_examples
    exact = drops.mean(0)
    (best,) = ranking.heads(KEEP)
    assert exact[best] == exact.max()
    everywhere = seen == COUNT
    torch.testing.assert_close(ranking.head_scores[everywhere], exact[everywhere].float())
    assert budget["head_examples"] == int(seen.sum()) <= 0.125 * 48 * COUNT
    assert budget["head_examples_of_an_exact_search"] == 48 * COUNT
    assert budget["heads_measured_on_all_examples"] == int(everywhere.sum()) >= 2 * KEEP
    assert int(everywhere.sum()) < int((seen > 0).sum()) == round(2 * 0.125 * 48)
    assert budget["gradient_examples"] == COUNT
    assert ranking.provenance.settings["budget"] == 0.125
    said = capsys.readouterr().out
    assert f"budget 0.125: measured {budget['head_examples']} of 3072 head-examples" in said


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (["--budget", "1"], "--budget must lie between 0 and 1, but is 1.0"),
        (
            ["--budget", "0.1", "--race", "0.1"],
            "--budget screens and drops heads by itself: leave out --race",
        ),
        (["--budget", "0.1", "--heads", "5"], "--budget 0.1 pays for 4 of 48 heads on all examples"),
        (["--budget", "0.1", "--devices", "9"], "at most 8 processes, or leave out --budget"),
        (["--race", "1.5"], "the risk of a race must lie between 0 and 1, not 1.5"),
        (["--race", "0.1", "--heads", "48"], "all 48 heads are wanted, so there is nothing to race for"),
        (
            ["--race", "0.1", "--race_span", "0.5"],
            "two answers differ by 1 in exact_match, more than the 0.5",
        ),
        (["--race", "0.1", "--race_span", "0"], "--race_span must be above 0, but is 0.0"),
        (
            ["--screen", "first_order", "--screen_share", "0.05", "--heads", "3"],
            "keeps 2 of 48 heads, fewer than the 3",
        ),
        (["--screen", "first_order", "--screen_share", "0"], "--screen_share must lie above 0"),
        (["--race", "0.1", "--method", "vseam"], "only apply to --method hones, not to vseam"),
        (["--race", "0.1", "--devices", "9"], "evaluated every 8 examples, so of 9 processes some"),
        (["--race", "0.1", "--tasks", "scenes_caption_discovery"], "bleu4 of scenes_caption_discovery is"),
    ],
)
def test_what_cannot_be_saved_is_refused(
    others: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "out", *others)) == 1
    assert says in complaint(capsys.readouterr().err)
    assert not (tmp_path / "out" / "ranking.json").exists()


def test_two_processes_race_to_the_same_bytes(tmp_path: Path, llava_checkpoint: Path) -> None:
    """Two processes share the examples between two looks, and an odd number of them at the end."""
    model_args = f"pretrained={llava_checkpoint}"
    tasks = write_tasks(tmp_path / "own", "llava_hf", model_args, 11)
    shared: list[Any] = ["rank", "--method", "hones", "--model", "llava_hf", "--model_args", model_args]
    shared += ["--tasks", "own_a", "--include_path", tasks, "--heads", "3", "--race", "0.9"]
    shared += ["--screen", "first_order", "--screen_share", "0.8", "--neurons", "0.03"]
    assert main([*map(str, shared), "--out", str(tmp_path / "one")]) == 0
    ran = subprocess.run(
        [sys.executable, "-m", "hones_eval", *map(str, shared), "--out", tmp_path / "two", "--devices", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    one, two = Ranking.load(tmp_path / "one"), Ranking.load(tmp_path / "two")
    assert one.report is not None
    assert two.report is not None
    assert two.report["race"] == one.report["race"]
    for name in ("head_scores", "head_log_probability", "head_examples"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
