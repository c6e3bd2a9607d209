"""The board on folders that lmms-eval itself wrote, with our wrappers, from a small LLaVA."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmms_runs
import pytest
import yaml
from make_logs import Questions, Steered, write_run
from PIL import Image

from hones_eval.__main__ import main
from hones_eval.leaderboard import Board, make_board
from hones_eval.leaderboard.example_images import ExampleImages
from hones_eval.leaderboard.examples import Example
from hones_eval.leaderboard.lmms_tasks import TaskImages
from hones_eval.leaderboard.scales import Scales, read_scales

SCALES_SEED, SPREAD = 3, 6.0


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory, llava_checkpoint: Path) -> Path:
    """A baseline and a steered run of one command, in one output folder.

    In another, `reused`, the run of a steering that was chosen on two of the four examples.
    """
    folder = tmp_path_factory.mktemp("real")
    task = lmms_runs.write_task(folder / "task", count=4)
    lmms_runs.write_steering(llava_checkpoint, folder / "steering", SCALES_SEED, spread=SPREAD)
    common = {
        "model": "hones_llava",
        "tasks": "tiny_colours",
        "include_path": str(task),
        "batch_size": 1,
        "log_samples": True,
        "output_path": "logs",
    }
    place = f"pretrained={llava_checkpoint},device=cpu,device_map=cpu,dtype=float32"
    chosen = choose(place, task, folder / "chosen")
    runs = [
        common | {"model_args": place},
        common | {"model_args": f"{place},steering=steering"},
        common | {"model_args": f"{place},steering={chosen}", "output_path": "reused"},
    ]
    (folder / "runs.yaml").write_text(yaml.safe_dump(runs))
    done = lmms_runs.run_command(["--config", "runs.yaml"], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((folder / "logs").rglob("*_results.json"))) == 2, done.stderr[-2000:]
    return folder / "logs"


def choose(place: str, task: Path, folder: Path) -> Path:
    """A steering made by our own commands, on the first two examples of the task that it is tested on."""
    model = ["--model", "hones_llava", "--model_args", place, "--tasks", "tiny_colours", "--limit", "2"]
    ranking, steering = str(folder / "ranking"), folder / "steering"
    given = [*model, "--include_path", str(task), "--neurons", "0.2", "--out", ranking]
    assert main(["rank", "--method", "random", *given]) == 0
    assert (
        main(["scale", "--ranking", ranking, "--how", "fixed", "--factor", "9", "--out", str(steering)]) == 0
    )
    return steering


@pytest.fixture(scope="module")
def board(logs: Path) -> Board:
    return make_board([logs], logs.parent / "board", resamples=199, include_path=logs.parent / "task")


def samples(logs: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(logs.rglob("*_samples_*.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())


def test_two_real_runs_give_a_row(board: Board, logs: Path) -> None:
    assert not board.warnings
    (row,) = board.rows
    assert (row.metric.name, row.kind, row.n) == ("exact_match", "right/wrong", 4)
    assert row.pair.baseline.has_manifest
    assert row.pair.steered.has_manifest
    listed = list(samples(logs))
    changed = sum(
        one["filtered_resps"] != two["filtered_resps"]
        for one, two in zip(listed[:4], listed[4:], strict=True)
    )
    assert ("the steering changed no answer" in row.notes) == (changed == 0)


def test_the_manifest_tells_the_steering_and_the_images(board: Board, logs: Path) -> None:
    (row,) = board.rows
    steering = row.pair.steered.steering
    assert steering is not None
    header = json.loads((logs.parent / "steering" / "steering.json").read_text())
    assert (steering.digest, steering.strength) == (header["digest"], 1.0)
    images = row.pair.steered.samples["none"].images
    assert images is not None
    assert len({name for shown in images for name in shown}) == 4


def test_examples_that_chose_a_steering_are_counted(logs: Path, tmp_path: Path) -> None:
    """By their images, which any task may show, and by their places in the task."""
    board = make_board([logs, logs.parent / "reused"], tmp_path, resamples=99, images=False)
    flags = {row.pair.steered.steering.label: row.flags for row in board.rows if row.pair.steered.steering}
    assert flags == {
        "drawn": (),
        "random fixed for tiny_colours": (
            "2 of 4 examples show images that were used to choose this steering",
            "2 of 4 examples were used to choose this steering",
        ),
    }
    assert "examples reused" in (tmp_path / "leaderboard.md").read_text()
    assert "examples reused" in (tmp_path / "index.html").read_text()


def test_images_come_from_the_task_and_are_checked(board: Board, logs: Path) -> None:
    """The page shows the data set's image of an example, unless it is not the one that the model saw."""
    (row,) = board.rows
    tasks = TaskImages(logs.parent / "task")
    shown = row.pair.steered.samples["none"].images
    assert shown is not None
    right, wrong = (Example(2, "gained", "?", "red", "a", "b", image=shown[k][0]) for k in (2, 3))
    assert set(ExampleImages(tasks).of("tiny_colours", [right])) == {2}
    assert ExampleImages(tasks).of("tiny_colours", [wrong]) == {}


def test_the_scales_are_those_of_the_steering(board: Board, logs: Path, llava_checkpoint: Path) -> None:
    steering = board.rows[0].pair.steered.steering
    assert steering is not None
    found = read_scales(steering, board.rows[0].pair.steered.results_path)
    assert isinstance(found, Scales)
    made = lmms_runs.write_steering(llava_checkpoint, logs.parent / "again", SCALES_SEED, spread=SPREAD)
    assert found.heads == pytest.approx(made.head_scales.numpy())
    assert list(found.scaled_neurons) == (made.neuron_scales != 1).sum(dim=1).tolist()


def test_a_steering_changed_in_place_is_not_drawn(board: Board, logs: Path, llava_checkpoint: Path) -> None:
    run = board.rows[0].pair.steered
    assert run.steering is not None
    kept = (logs.parent / "steering" / "steering.json").read_bytes()
    try:
        lmms_runs.write_steering(llava_checkpoint, logs.parent / "steering", 99, spread=SPREAD)
        found = read_scales(run.steering, run.results_path)
    finally:
        lmms_runs.write_steering(llava_checkpoint, logs.parent / "steering", SCALES_SEED, spread=SPREAD)
    assert found == "the folder steering now holds a different steering from the one that ran"
    assert (
        json.loads((logs.parent / "steering" / "steering.json").read_bytes())["digest"]
        == json.loads(kept)["digest"]
    )


def test_made_logs_have_the_shape_of_real_ones(logs: Path, tmp_path: Path) -> None:
    """Whatever `make_logs` writes, lmms-eval and the wrappers write too."""
    questions = Questions("tiny_colours", ["What?"], ["red"], [Image.new("RGB", (8, 8))])
    write_run(tmp_path, questions, ["red"], steered=Steered())
    real, made = (sorted(folder.rglob("*_results.json"))[-1] for folder in (logs, tmp_path))
    assert missing(json.loads(made.read_text()), json.loads(real.read_text())) == []
    (sample,) = samples(tmp_path)
    assert missing(sample, next(samples(logs))) == []
    real, made = (sorted(folder.rglob("hones_manifest_*.json"))[-1] for folder in (logs, tmp_path))
    assert missing(json.loads(made.read_text()), json.loads(real.read_text())) == []
    (only,) = (tmp_path / "tiny__llava").glob("*_samples_tiny_colours.jsonl")
    assert only.name.replace("_samples_tiny_colours.jsonl", "_results.json") in {
        p.name for p in only.parent.iterdir()
    }


def missing(made: Any, real: Any, where: str = "") -> list[str]:
    """Keys that the made one has and the real one has not, all the way down."""
    if not isinstance(made, dict) or not isinstance(real, dict):
        return []
    found = [f"{where}/{key}" for key in made if key not in real]
    return found + [
        one for key in made if key in real for one in missing(made[key], real[key], f"{where}/{key}")
    ]
