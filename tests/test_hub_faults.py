"""A hub that does not give what it should: one clear line, exit status not 0, and no half-written ranking."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import benchmark_data
import pyarrow.parquet as pq
import pytest
from hub import Repositories, serving
from lmms_runs import run_command

from hones_eval.toy import checkpoint_path

RANK = """
import json, sys
from hones_eval.__main__ import main
for command in json.loads(sys.argv[1]):
    status = main(command)
    print(json.dumps(["status", status]), file=sys.stderr, flush=True)
"""
FAULTS = {
    "lmms-lab-encoder/VQAv2": "gated",
    "lmms-lab-encoder/MME": "cut",
}
SAYS = {
    "vqav2_val": ("is a gated dataset on the Hub", "set HF_TOKEN to a token that has access"),
    "mme": ("peer closed connection without sending complete message body", "within reach?"),
    "pope": ("Parquet magic bytes not found in footer", "to fetch it again"),
    "refcoco_bbox_rec_val": ("KeyError: 'bbox', which may be a column that its data set does not have",),
    "ocrbench": (
        "KeyError: 'answer', which is no column of the data set (dataset, question, question_type)",
    ),
    "vizwiz_vqa_val": ("doesn't exist on the Hub or cannot be accessed", "within reach?"),
}


def damaged() -> Repositories:
    """POPE ends in the middle of its file; RefCOCO and OCRBench lack a column."""
    found = benchmark_data.repositories()
    for name, change in (
        ("lmms-lab-encoder/POPE", lambda content: content[: len(content) // 2]),
        ("lmms-lab-encoder/RefCOCO", lambda content: without(content, "bbox")),
        ("echo840/OCRBench", lambda content: without(content, "answer")),
    ):
        found[name] = {path: change(content) for path, content in found[name].items()}
    return found


def without(content: bytes, column: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(content)).drop([column]), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """The last line and the exit status of `hones-eval rank` on each task, all in one process."""
    folder = tmp_path_factory.mktemp("faults")
    model = ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}"]
    commands = [
        ["rank", "--method", "hones", *model, "--tasks", task, "--out", str(folder / task)] for task in SAYS
    ]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LMMS_"))}
    env |= {"HF_HOME": str(folder / "hf_home"), "HF_TOKEN": "hf_nobody"}
    with serving(damaged(), FAULTS) as url:
        program = [sys.executable, "-c", RANK, json.dumps(commands)]
        done = subprocess.run(
            program,
            cwd=folder,
            env=env | {"HF_ENDPOINT": url},
            stderr=subprocess.PIPE,
            text=True,
            timeout=400,
        )
    assert not list(folder.glob("*/ranking.json"))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    ends = [k for k, line in enumerate(lines) if line.startswith('["status"')]
    return {task: (lines[k - 1], json.loads(lines[k])[1]) for task, k in zip(SAYS, ends, strict=True)}


@pytest.mark.parametrize("task", SAYS)
def test_what_the_hub_does_not_give_is_one_line(task: str, said: dict[str, tuple[str, int]]) -> None:
    line, status = said[task]
    assert status == 1
    assert line.startswith("hones-eval: task "), line
    for part in SAYS[task]:
        assert part in line


def test_an_evaluation_without_a_hub_ends_with_one_line(tmp_path: Path) -> None:
    """lmms-eval prints a trace and exits with 0."""
    model = ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}"]
    done = run_command([*model, "--tasks", "pope", "--log_samples", "--output_path", "logs"], tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("hones-eval: "), last
    assert "pope" in last or "POPE" in last or "127.0.0.1:9" in last or "connect" in last.lower(), last
    assert not list(tmp_path.glob("logs/*/*_results.json"))


def test_a_hub_that_accepts_and_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    model = ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}"]
    command = ["rank", "--method", "hones", *model, "--tasks", "pope", "--out", str(tmp_path / "ranking")]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LMMS_"))}
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, and nobody reads
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": url, "HF_HUB_ETAG_TIMEOUT": "1"}
        program = [sys.executable, "-m", "hones_eval", *command]
        done = subprocess.run(program, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, timeout=200)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith(f"hones-eval: task pope: {url} did not answer within 1 s; try later"), last
    assert not (tmp_path / "ranking").exists()
