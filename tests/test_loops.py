"""Loops over examples: one process or several give the same, and every example is counted once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_answers import assert_same_ranking, complaint, write_tasks
from torch import Tensor

from hones_eval.__main__ import main
from hones_eval.core.ranking import Ranking
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples, load_lmm
from hones_eval.runs.checkpoint import Partial
from hones_eval.runs.lightning import Loop, SumOverRanks
from hones_eval.runs.measure import Measurement

COUNT = 5


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model_args: str) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own", "llava_hf", model_args, COUNT)


@pytest.fixture(scope="module")
def examples(tasks: Path, model_args: str) -> TaskExamples:
    lmm = load_lmm("llava_hf", model_args)
    return TaskExamples(lmm, "own_a", model_name="llava_hf", include_path=tasks)


class Count:
    """Counts examples, and sums a number that float32 could not hold."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def zeros(self) -> dict[str, Tensor]:
        return {"examples": torch.zeros(()), "large": torch.zeros(2, dtype=torch.float64)}

    def measure(self, example: Example) -> Measurement:
        self.seen.append(example.index)
        large = torch.tensor([1e9, 1e-9], dtype=torch.float64)
        return Measurement({"examples": torch.ones(()), "large": large}, {"doc": example.doc_id})


def test_every_example_is_measured_once_and_added_up(examples: TaskExamples) -> None:
    measure = Count()
    totals = Loop("cpu", progress=False).run(examples, measure, "count")
    assert measure.seen == list(range(COUNT))
    assert totals.sums["examples"] == COUNT
    assert totals.sums["large"].dtype == torch.float64
    assert totals.sums["large"].tolist() == pytest.approx([5e9, 5e-9], rel=1e-15)
    assert totals.records == {index: {"doc": index} for index in range(COUNT)}


def test_one_loop_runs_several_passes(examples: TaskExamples) -> None:
    loop = Loop("cpu", progress=False)
    first, second = (loop.run(examples, Count(), name) for name in ("a", "b"))
    assert first.sums["examples"] == second.sums["examples"] == COUNT


def test_a_pass_that_other_processes_have_finished_is_only_added_up(
    examples: TaskExamples, tmp_path: Path
) -> None:
    """As when two processes are killed after a pass and another number goes on: nothing is left to do."""
    loop = Loop("cpu", progress=False)
    loop.partial = Partial(tmp_path, "fingerprint", resume=True)
    first = loop.run(examples, Count(), "count")
    (kept,) = tmp_path.iterdir()
    kept.rename(kept.with_name(kept.name.replace("-0-of-1", "-0-of-2")))
    again = Count()
    found = loop.run(examples, again, "count")
    assert again.seen == []
    assert found.records == first.records
    assert found.sums["examples"] == COUNT


def test_an_error_in_an_example_ends_the_pass(examples: TaskExamples) -> None:
    class Fails(Count):
        def measure(self, example: Example) -> Measurement:
            if example.index == 3:
                raise HonesError("example 3 is broken")
            return super().measure(example)

    with pytest.raises(HonesError, match="example 3 is broken"):
        Loop("cpu", progress=False).run(examples, Fails(), "fails")


def test_an_example_that_was_passed_over_is_an_error(
    examples: TaskExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Merges(Count):
        def measure(self, example: Example) -> Measurement:
            object.__setattr__(example, "index", min(example.index, 3))
            return super().measure(example)

    with pytest.raises(HonesError, match="1 of 5 examples were not measured in merges"):
        Loop("cpu", progress=False).run(examples, Merges(), "merges")


def test_fewer_examples_than_processes_are_refused(
    tasks: Path, model_args: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(tasks, model_args, out, "--limit", "1", "--devices", "2")) == 1
    says = "1 examples cannot be shared by 2 processes: raise --limit or lower --devices"
    assert says in complaint(capfd.readouterr().err)
    assert not out.exists()


def test_sums_are_kept_in_the_type_of_their_zeros() -> None:
    metric = SumOverRanks({"a": torch.zeros(2, dtype=torch.float64)})
    for _ in range(10):
        metric.update({"a": torch.tensor([0.1, 1e-12])})
    assert metric.compute()["a"].dtype == torch.float64
    assert metric.compute()["a"].tolist() == pytest.approx([1.0, 1e-11], rel=1e-6)
    metric.reset()
    assert metric.sums()["a"].tolist() == [0, 0]


@pytest.mark.filterwarnings("error")
def test_a_rank_without_examples_adds_nothing_and_warns_of_nothing() -> None:
    assert SumOverRanks({"a": torch.zeros(2)}).compute()["a"].tolist() == [0, 0]


def test_two_processes_give_the_ranking_of_one(tasks: Path, model_args: str, tmp_path: Path) -> None:
    """Through the installed command: an odd number of examples on two processes (gloo)."""
    assert main(command(tasks, model_args, tmp_path / "one")) == 0
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-m", "hones_eval", *command(tasks, model_args, tmp_path / "two", "--devices", "2")],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("wrote ") == 1
    one = Ranking.load(tmp_path / "one")
    assert one.report is not None
    assert one.report["examples"] == COUNT
    assert one.report["heads_with_positive_score"] > 0
    assert_same_ranking(one, Ranking.load(tmp_path / "two"))


def command(tasks: Path, model_args: str, out: Path, *others: str) -> list[str]:
    arguments = ["rank", "--method", "hones", "--model", "llava_hf", "--model_args", model_args]
    arguments += ["--tasks", "own_a", "--include_path", str(tasks), "--heads", "6", "--neurons", "0.03"]
    return [*arguments, "--out", str(out), *others]
