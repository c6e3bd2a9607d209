"""Several processes, as docs/distributed.md starts them: what one gives, and none waits for a failed one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_runs import answers, write_steering
from own_answers import assert_same_ranking, complaint, write_tasks
from PIL import Image
from safetensors import safe_open

from hones_eval.__main__ import main
from hones_eval.core.ranking import Ranking
from hones_eval.lmms.models import _own_device
from hones_eval.runs.lightning import _Pass

COUNT = 5
LAUNCHED = Path(__file__).parent / "helpers" / "launched.py"
OPEN_PICTURE = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""
ALONE = (
    "stopped because process {} ended; see the error of that process. If it was killed and printed none, run "
    "the same command again, with --resume where it has that flag"
)
REASON = "hones-eval: the camera fell into the sea"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model_args: str) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own", "llava_hf", model_args, COUNT)


@pytest.fixture(scope="module")
def one(tasks: Path, model_args: str, tmp_path_factory: pytest.TempPathFactory) -> Ranking:
    out = tmp_path_factory.mktemp("one") / "ranking"
    assert main(rank(tasks, model_args, out)) == 0
    return Ranking.load(out)


def rank(tasks: Path, model_args: str, out: Path, *others: str) -> list[str]:
    arguments = ["rank", "--method", "hones", "--model", "llava_hf", "--model_args", model_args]
    arguments += ["--tasks", "own_a", "--include_path", str(tasks), "--heads", "6", "--neurons", "0.03"]
    return [*arguments, "--out", str(out), *others]


def start(cwd: Path, *arguments: object) -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LMMS_", "SLURM_"))}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf_home")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_two_nodes_of_torchrun_give_the_ranking_of_one_process(
    tasks: Path, model_args: str, one: Ranking, tmp_path: Path
) -> None:
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = rank(tasks, model_args, tmp_path / "two", "--num_nodes", "2")
    nodes = [
        start(tmp_path, *launcher, "--node_rank", node, "-m", "hones_eval", *command) for node in range(2)
    ]
    runs = [ended(node) for node in nodes]
    assert [status for status, _, _ in runs] == [0, 0], runs
    assert [out.count("wrote ") for _, out, _ in runs] == [1, 0]
    assert_same_ranking(one, Ranking.load(tmp_path / "two"))


def test_a_node_of_srun_that_fails_ends_all_and_resume_goes_on(
    tasks: Path, model_args: str, one: Ranking, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    command = rank(tasks, model_args, out, "--num_nodes", "2")
    status, said, err = ended(start(tmp_path, LAUNCHED, "srun", free_port(), *command))
    assert status == 0, err
    failed, resumed = json.loads(said.splitlines()[-1])
    assert all(os.waitstatus_to_exitcode(status) == 1 for status in failed), err
    assert resumed == [0, 0], err
    lines = [line for line in err.splitlines() if line.startswith("hones-eval:")]
    assert sorted(lines) == sorted([REASON, f"hones-eval: process 0 of 2 {ALONE.format(1)}"])
    assert "Traceback" not in err
    assert_same_ranking(one, Ranking.load(out))
    assert not (out / "partial").exists()


def test_a_first_process_that_fails_takes_its_others_along(
    tasks: Path, model_args: str, tmp_path: Path
) -> None:
    """The other one sleeps for an hour in its second example; it has to be ended."""
    command = rank(tasks, model_args, tmp_path / "two", "--devices", "2")
    status, _, err = ended(start(tmp_path, LAUNCHED, "fails", 0, *command))
    assert status == 1, err
    assert complaint(err) == REASON
    assert not (tmp_path / "two" / "ranking.json").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_and_one_process_goes_on(
    killed: int,
    tasks: Path,
    model_args: str,
    one: Ranking,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL in the second example; the other process is in its own second one, for an hour."""
    out = tmp_path / "two"
    status, _, err = ended(
        start(tmp_path, LAUNCHED, "killed", killed, *rank(tasks, model_args, out, "--devices", "2"))
    )
    assert status == (1 if killed else -signal.SIGKILL), err
    assert complaint(err) == f"hones-eval: process {1 - killed} of 2 {ALONE.format(killed)}"
    assert {path.name[-18:] for path in (out / "partial").iterdir()} == {
        "0-of-2.safetensors",
        "1-of-2.safetensors",
    }
    measured = []
    step = _Pass.predict_step

    def counting(self: _Pass, batch: Any, batch_idx: int) -> None:
        measured.append((self.name, batch.index))
        step(self, batch, batch_idx)

    monkeypatch.setattr(_Pass, "predict_step", counting)
    assert main(rank(tasks, model_args, out, "--resume")) == 0
    first = [index for name, index in measured if name == measured[0][0]]
    assert first == [2, 3, 4], "what two processes had measured is not measured again"
    assert_same_ranking(one, Ranking.load(out))
    assert not (out / "partial").exists()


def test_sigterm_saves_the_progress_of_all_processes(tasks: Path, model_args: str, tmp_path: Path) -> None:
    """A scheduler may signal the first process alone; no checkpoint is due yet."""
    out = tmp_path / "two"
    given = rank(tasks, model_args, out, "--devices", "2")
    status, _, err = ended(start(tmp_path, LAUNCHED, "stopped", 0, *given))
    assert status == 128 + signal.SIGTERM, err
    assert "hones-eval: stopped by SIGTERM; with --resume the same command goes on" in err
    done = {}
    for path in (out / "partial").iterdir():
        with safe_open(path, "pt") as file:
            done[path.name[-18:]] = json.loads(file.metadata()["about"])["done"]
    assert done == {"0-of-2.safetensors": 2, "1-of-2.safetensors": 2}, "the examples that they were in too"


def test_lmms_eval_steered_on_two_processes(
    tasks: Path, llava_checkpoint: Path, model_args: str, tmp_path: Path
) -> None:
    """Two evaluations by two processes: an odd number of examples, and one with a picture that is none."""
    write_steering(llava_checkpoint, tmp_path / "steering", seed=1)
    steered = f"{model_args},steering={tmp_path / 'steering'}"
    manager = TaskManager("ERROR", str(tasks), model_name="hones_llava")
    alone: Any = simple_evaluate(
        "hones_llava", steered, tasks=["own_a"], task_manager=manager, batch_size=1, bootstrap_iters=0
    )
    # As the samples file has them, which leaves off spaces at the ends.
    expected = {one["doc_id"]: one["filtered_resps"][0].strip() for one in alone["samples"]["own_a"]}
    assert len(expected) == COUNT

    evaluation = {
        "model": "hones_llava",
        "model_args": steered,
        "include_path": str(tasks),
        "log_samples": True,
    }
    evaluations = [
        evaluation | {"tasks": "own_a", "output_path": "whole"},
        evaluation | {"tasks": broken_picture(tasks), "output_path": "broken"},
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(evaluations))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    status, _, err = ended(start(tmp_path, *launcher, "-m", "lmms_eval", "--config", "config.yaml"))

    assert answers(tmp_path / "whole", "own_a") == expected, err
    (results,) = (tmp_path / "whole").glob("*/*_results.json")
    score = json.loads(results.read_text())["results"]["own_a"]["exact_match,none"]
    assert score == alone["results"]["own_a"]["exact_match,none"]
    manifests = [
        json.loads(path.read_text()) for path in (tmp_path / "whole").glob("*/hones_manifest_*.json")
    ]
    shares = {one["rank"]: sorted(one["requests"]["own_a"]) for one in manifests}
    assert shares == {0: ["0", "2", "4"], 1: ["1", "3"]}

    assert status != 0
    # The other process may notice before the launcher ends it, or have left a progress bar on the line.
    assert err.count("hones-eval: llava_hf, task own_broken, doc 3") == 1, err
    assert not list((tmp_path / "broken").glob("*/*_results.json"))


@pytest.mark.parametrize(
    ("environment", "flags", "says"),
    [
        ({}, ["--num_nodes", "2"], "--num_nodes 2 needs a launcher that starts the command on every node"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
            [],
            "torchrun has started 2 processes and --devices 1 --num_nodes 1 is 1: the numbers have to agree",
        ),
        (
            {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "discovery"},
            ["--devices", "2"],
            "SLURM_NTASKS says 4 processes and --devices 2 --num_nodes 1 is 2: the numbers have to agree",
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "discovery"},
            ["--devices", "2"],
            "--devices 2 needs `srun --ntasks-per-node 2`, not None",
        ),
    ],
    ids=["no launcher", "torchrun", "srun", "tasks a node"],
)
def test_flags_and_launcher_have_to_agree(
    environment: dict[str, str],
    flags: list[str],
    says: str,
    tasks: Path,
    model_args: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(rank(tasks, model_args, tmp_path / "out", *flags)) == 1
    assert says in complaint(capfd.readouterr().err)


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_a_process_takes_the_gpu_of_its_number(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert _own_device() == "cuda:0"
    monkeypatch.setenv(variable, "3")
    assert _own_device() == "cuda:3"


def broken_picture(tasks: Path) -> str:
    """Write a task of four pictures into the folder of the others; the last file is not a picture."""
    folder = tasks / "pictures"
    folder.mkdir()
    rows = []
    for i in range(4):
        path = folder / f"{i}.png"
        Image.new("RGB", (40, 40), "red").save(path)
        rows.append({"image": str(path), "question": f"What is in picture {i}?", "answer": "red"})
    path.write_bytes(b"no picture")
    (folder / "rows.json").write_text(json.dumps(rows))
    text = (tasks / "own_a.yaml").read_text()
    data = text.split("test: ")[1].splitlines()[0]
    text = text.replace("task: own_a", "task: own_broken").replace(data, str(folder / "rows.json"))
    text = text.replace("dataset_path: parquet", "dataset_path: json").replace("utils.doc", "broken.doc")
    (tasks / "own_broken.yaml").write_text(text)
    (tasks / "broken.py").write_text(OPEN_PICTURE)
    return "own_broken"
