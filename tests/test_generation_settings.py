"""Generation settings that the user gives reach the model, or the run stops and says which did not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import make_logs
import pytest
from tiny_evaluations import Evaluated, evaluated, write_small

from hones_eval.errors import HonesError
from hones_eval.leaderboard import make_board
from hones_eval.lmms.examples import TaskExamples, load_lmm

Run = Callable[..., Evaluated]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that both `hones_hf` and lmms-eval's `llava_hf` load."""
    return families.save_checkpoint("llava", tmp_path_factory.mktemp("settings") / "llava")


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Run:
    def one(model: str, generation: dict[str, Any], **more: Any) -> Evaluated:
        folder = write_small(tmp_path / "tasks", generation=generation)
        arguments = f"pretrained={checkpoint}" + (",dtype=float32" if model == "hones_hf" else "")
        return evaluated(model, arguments, folder, tmp_path / "out", **more)

    return one


@pytest.mark.parametrize("model", ["hones_llava", "hones_hf"])
def test_a_temperature_on_a_task_that_does_not_sample_is_refused_by_every_wrapper(
    model: str, run: Run
) -> None:
    with pytest.raises(HonesError, match=r"temperature=3.0: .* add do_sample=true"):
        run(model, {"do_sample": False}, gen_kwargs="temperature=3.0")


@pytest.mark.parametrize("model", ["hones_llava", "hones_hf"])
def test_sampling_that_is_asked_for_reaches_the_model(model: str, run: Run) -> None:
    found = run(model, {"do_sample": False}, gen_kwargs="temperature=3.0,do_sample=true,max_new_tokens=6")
    reached = found.manifest["generation"]["small"]
    assert (reached["do_sample"], reached["temperature"], reached["max_new_tokens"]) == (True, 3.0, 6)


def test_a_setting_that_a_wrapper_drops_is_refused(run: Run) -> None:
    with pytest.raises(HonesError, match=r"repetition_penalty=2.5 did not reach the model.*hones_hf"):
        run("hones_llava", {}, gen_kwargs="repetition_penalty=2.5")
    with pytest.raises(HonesError, match="do_sample=True did not reach the model"):
        run("hones_llava", {}, gen_kwargs="do_sample=true")
    found = run("hones_hf", {}, gen_kwargs="repetition_penalty=2.5")
    assert found.manifest["generation"]["small"]["repetition_penalty"] == 2.5


def test_greedy_settings_are_not_refused(run: Run) -> None:
    found = run("hones_llava", {}, gen_kwargs="temperature=0,do_sample=False,num_beams=1,top_p=1.0")
    assert found.manifest["generation"]["small"]["do_sample"] is False


def test_a_misspelt_setting_and_text_without_a_value_are_refused(run: Run) -> None:
    with pytest.raises(HonesError, match="--gen_kwargs temprature: no such setting; did you mean temp"):
        run("hones_llava", {}, gen_kwargs="temprature=1")
    with pytest.raises(HonesError, match="--gen_kwargs: 'greedy' should have the form name=value"):
        run("hones_llava", {}, gen_kwargs="greedy")


def test_until_is_obeyed_or_the_manifest_says_that_it_is_not(run: Run) -> None:
    whole = run("hones_hf", {})
    stop = next(letter for letter in whole.answers[0].strip()[1:] if letter.strip())
    obeyed, ignored = run("hones_hf", {"until": [stop]}), run("hones_llava", {"until": [stop]})
    assert obeyed.manifest["until"] == {"small": {"strings": [stop], "obeyed": True}}
    assert ignored.manifest["until"] == {"small": {"strings": [stop], "obeyed": False}}
    assert obeyed.answers[0] == whole.answers[0].split(stop)[0].strip()
    assert stop in ignored.answers[0]


def test_a_list_of_until_arrives_as_a_list(run: Run) -> None:
    whole = run("hones_hf", {}).answers
    stop = next(letter for letter in whole[0].strip()[1:] if letter.strip())
    for given in (f'until=["{stop}","qqq"]', f"until=['{stop}','qqq']"):
        found = run("hones_hf", {}, gen_kwargs=given)
        assert found.answers[0] == whole[0].split(stop)[0].strip()
    with pytest.raises(HonesError, match=r"until=.* is not a list or mapping: write it as JSON"):
        run("hones_hf", {}, gen_kwargs="until=[a,b]")


def test_until_that_a_wrapper_ignores_is_refused_when_the_user_gives_it(run: Run) -> None:
    with pytest.raises(HonesError, match=r"--gen_kwargs until=\['e'\]: llava_hf does not end answers there"):
        run("hones_llava", {}, gen_kwargs='until=["e"]')


def test_a_ranking_parses_settings_as_lmms_eval_does(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_small(tmp_path / "tasks")
    lmm = load_lmm("hones_llava", f"pretrained={checkpoint}")
    shared: dict[str, Any] = {"model_name": "hones_llava", "include_path": folder, "target": "answer"}
    examples = TaskExamples(lmm, "small", gen_kwargs="max_new_tokens=2", metric="log_probability", **shared)
    assert examples[0].settings["max_new_tokens"] == 2
    with pytest.raises(HonesError, match="--gen_kwargs: 'greedy' should have the form name=value"):
        TaskExamples(lmm, "small", gen_kwargs="greedy", metric="log_probability", **shared)


def test_the_board_says_that_until_was_ignored(tmp_path: Path) -> None:
    questions = make_logs.Questions.drawn(count=12)
    steered = make_logs.Steered("runs/a")
    for folder, steering in (("baseline", None), ("steered", steered)):
        make_logs.write_run(tmp_path / folder, questions, questions.golds, steered=steering)
        (path,) = (tmp_path / folder).rglob("hones_manifest_*")
        content = json.loads(path.read_text())
        content["until"] = {questions.task: {"strings": ["\n"], "obeyed": False}}
        path.write_text(json.dumps(content))
    board = make_board([tmp_path], tmp_path / "board")
    assert any("llava_hf ignores the task's until=['\\n']" in note for note in board.rows[0].notes)
