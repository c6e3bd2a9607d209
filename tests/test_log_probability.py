"""`--metric log_probability`: how likely gold answers are, for tasks whose own metric cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_answers
import plain
import pytest
import torch

from hones_eval.__main__ import main
from hones_eval.core.ranking import Ranking
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm

SCORED = "  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
SUBMITTED = "  - metric: submission\n    aggregation: !function utils.written\n    higher_is_better: true\n"


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def items(own: own_answers.Prepared) -> tuple[Any, list[plain.Item]]:
    lmm = load_lmm(own_answers.MODEL, own.model_args)
    examples = TaskExamples(lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks)
    found = [examples[index] for index in range(8)]
    return inner_model(lmm), [plain.Item(one.inputs, {}, one.target_ids) for one in found]


def test_heads_are_ranked_by_the_drop_of_the_gold_answer(
    own: own_answers.Prepared, items: tuple[Any, list[plain.Item]], tmp_path: Path
) -> None:
    chosen = ["--method", "hones", "--limit", 4, "--heads", 4, "--metric", "log_probability"]
    assert main(own.command("rank", *chosen, "--out", tmp_path)) == 0
    ranking, (model, questions) = Ranking.load(tmp_path), items
    sure = [plain.log_probability(model, one) for one in questions[:4]]
    assert ranking.report["base_metric"] == pytest.approx(sum(sure) / 4, abs=1e-4)
    assert ranking.report["answers_that_differ"].startswith("not asked for")
    for edit in plain.all_heads(model):
        drop = sum(sure) / 4 - sum(plain.log_probability(model, one, edit) for one in questions[:4]) / 4
        assert float(ranking.head_scores[edit.layer, edit.site]) == pytest.approx(drop, abs=1e-4)
    assert torch.equal(ranking.head_scores, ranking.head_log_probability)
    decoded = Ranking.load(own.rankings / "hones")  # of the same examples, by the task's own metric
    torch.testing.assert_close(ranking.head_scores, decoded.head_log_probability, atol=1e-5, rtol=0)


def test_masking_and_racing_use_it_too(
    own: own_answers.Prepared, items: tuple[Any, list[plain.Item]], tmp_path: Path
) -> None:
    by = ["--metric", "log_probability"]
    raced = ["--method", "hones", "--limit", 4, "--heads", 4, "--race", 0.1, "--race_span", 50]
    assert main(own.command("rank", *raced, *by, "--out", tmp_path / "ranking")) == 0
    ranking = Ranking.load(tmp_path / "ranking")
    chosen = ["--ranking", tmp_path / "ranking", "--sites", "heads", "--heads", 1, "--trials", 5]
    assert main(own.command("verify", *chosen, *by, "--offset", 4, "--limit", 4, "--out", tmp_path)) == 0
    report = json.loads((tmp_path / "verify.json").read_text())
    model, questions = items
    top = max(plain.all_heads(model), key=lambda one: float(ranking.head_scores[one.layer, one.site]))
    base = sum(plain.log_probability(model, one) for one in questions[4:]) / 4
    masked = top._replace(kind="zero head")
    value = sum(plain.log_probability(model, one, masked) for one in questions[4:]) / 4
    assert report["baseline"]["metric"] == pytest.approx(base, abs=1e-4)
    (bank,) = [one for name, one in report["banks"].items() if not name.startswith("random")]
    assert bank["metric"] == pytest.approx(value, abs=1e-4)


@pytest.fixture
def task(own: own_answers.Prepared, tmp_path: Path) -> Callable[[str, str], Path]:
    """A copy of a task's file with changed lines, under a name whose gold answer is unknown."""

    def write(old: str, new: str) -> Path:
        text = (own.tasks / "own_a.yaml").read_text().replace("task: own_a", "task: own_judged")
        assert old in text
        (tmp_path / "own_judged.yaml").write_text(text.replace(old, new))
        utils = (own.tasks / "utils.py").read_text()
        utils += "\n\ndef written(results):\n    return {'written': len(results)}\n\n\n"
        utils += "def kept(doc, results):\n    return {'submission': results[0]}\n"
        (tmp_path / "utils.py").write_text(utils)
        return tmp_path

    return write


def rank(own: own_answers.Prepared, folder: Path, *more: Any) -> int:
    model = ["--model", own_answers.MODEL, "--model_args", own.model_args, "--limit", 2, "--heads", 4]
    command = ["rank", "--method", "hones", *model, "--include_path", folder, "--tasks", "own_judged"]
    return main([str(part) for part in [*command, "--out", folder / "ranking", *more]])


def test_a_task_with_a_remote_judge_is_ranked_only_by_a_named_gold_answer(
    own: own_answers.Prepared,
    task: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = task(SCORED, SCORED + "metadata:\n  gpt_eval_model_name: somebody\n")
    assert rank(own, folder) == 1
    says = own_answers.complaint(capsys.readouterr().err)
    assert says.endswith("how likely a gold answer is instead: --metric log_probability --target COLUMN"), (
        says
    )
    assert rank(own, folder, "--metric", "log_probability") == 1
    says = own_answers.complaint(capsys.readouterr().err)
    assert "no metric that can prove a gold answer: name its column" in says, says
    assert says.endswith("the columns are question, answer"), says
    assert rank(own, folder, "--metric", "log_probability", "--target", "answer") == 0
    settings = json.loads((folder / "ranking" / "ranking.json").read_text())["settings"]
    assert settings["metric"] == "log_probability"
    assert settings["target"] == "--target answer, which no score proves"


def test_a_task_without_numeric_metrics_falls_back_to_it_and_says_so(
    own: own_answers.Prepared,
    task: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = task(SCORED, SUBMITTED + "process_results: !function utils.kept\n")
    assert rank(own, folder) == 1
    says = own_answers.complaint(capsys.readouterr().err)
    assert says.endswith("--metric log_probability with --target measures how likely its gold answers are")
    assert rank(own, folder, "--target", "answer") == 0
    assert "log_probability -" in capsys.readouterr().out
    assert (
        json.loads((folder / "ranking" / "ranking.json").read_text())["settings"]["metric"]
        == "log_probability"
    )
