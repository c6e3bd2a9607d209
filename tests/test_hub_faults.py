"""A hub that does not give what it should: one clear line, exit status 1, and nothing half-written."""

import io
import socket
from collections.abc import Iterator
from pathlib import Path

import benchmark_data
import pyarrow.parquet as pq
import pytest
from hub import Repositories, serving
from huggingface_hub import constants
from lmms_runs import HONES_EVAL, LMMS_EVAL, Ended, run_command, run_each

from hones_eval.lmms.failures import failure
from hones_eval.toy import checkpoint_path

MODEL = ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}"]
FAULTS = {
    "": "slow",
    "lmms-lab-encoder/textvqa": "slow",
    "lmms-lab-encoder/VQAv2": "gated",
    "lmms-lab-encoder/MME": "cut",
}
SAYS = {
    "vqav2_val": ("is a gated dataset on the Hub", "set HF_TOKEN to a token that has access"),
    "mme": ("peer closed connection without sending complete message body", "reachable?"),
    "pope": ("Parquet magic bytes not found in footer", "to fetch it again"),
    "refcoco_bbox_rec_val": (
        "KeyError: 'bbox', which may be a column or a split that its data set does not have",
    ),
    "ocrbench": (
        "KeyError: 'answer', which is not a column of the data set (dataset, question, question_type",
    ),
    "vizwiz_vqa_val": ("doesn't exist on the Hub or cannot be accessed", "reachable?"),
}
EVALUATED = [task for task in SAYS if task != "mme"]
"""huggingface_hub's own pauses over a file that is cut are long, and the same for both commands."""


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
def url() -> Iterator[str]:
    with serving(damaged(), FAULTS) as url:
        yield url


def rank(task: str, out: str) -> list[str]:
    return ["rank", "--method", "hones", *MODEL, "--tasks", task, "--out", out]


def evaluate(task: str, logs: str) -> list[str]:
    return [*MODEL, "--tasks", task, "--limit", "2", "--log_samples", "--output_path", logs]


@pytest.fixture(scope="module")
def ranked(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The last is well, but for the hub's pauses."""
    folder = tmp_path_factory.mktemp("ranked")
    tasks = [*SAYS, "textvqa_val"]
    ended = run_each(HONES_EVAL, [rank(task, task) for task in tasks], folder, url)
    assert [path.parent.name for path in folder.glob("*/ranking.json")] == tasks[-1:]
    return dict(zip(tasks, ended, strict=True))


@pytest.fixture(scope="module")
def evaluated(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("evaluated")
    ended = run_each(LMMS_EVAL, [evaluate(task, task) for task in EVALUATED], folder, url)
    assert not list(folder.rglob("*_results.json"))
    return dict(zip(EVALUATED, ended, strict=True))


@pytest.mark.parametrize("task", SAYS)
def test_what_the_hub_does_not_give_is_one_line(task: str, ranked: dict[str, Ended]) -> None:
    is_one_line(task, ranked[task])


@pytest.mark.parametrize("task", EVALUATED)
def test_an_evaluation_says_the_same(task: str, evaluated: dict[str, Ended]) -> None:
    """lmms-eval by itself fetches five times, prints a trace and exits with 0."""
    is_one_line(task, evaluated[task])
    assert "Traceback" not in evaluated[task].stderr


def is_one_line(task: str, ended: Ended) -> None:
    last = ended.stderr.rstrip().splitlines()[-1]
    assert ended.status == 1
    assert last.startswith("hones-eval: ")
    for part in (task, *SAYS[task]):
        assert part in last


def test_a_slow_hub_is_waited_for(ranked: dict[str, Ended]) -> None:
    assert ranked["textvqa_val"].status == 0, ranked["textvqa_val"].stderr[-3000:]


def test_offline_the_way_out_is_to_go_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = str(failure("task pope cannot be built", ConnectionError("Couldn't reach 'POPE' on the Hub")))
    assert said.endswith("; HF_HUB_OFFLINE is set, so it has to be in the cache: unset it to fetch it")


def test_an_evaluation_without_a_hub_ends_with_one_line(tmp_path: Path) -> None:
    done = run_command(evaluate("pope", "logs"), tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("hones-eval: task pope cannot be built: "), last
    assert "; is http://127.0.0.1:9 reachable? Data that was downloaded before works without it" in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("logs/*/*_results.json"))


@pytest.mark.parametrize(
    ("door", "command"), [(HONES_EVAL, rank("pope", "out")), (LMMS_EVAL, evaluate("pope", "out"))]
)
def test_a_hub_that_accepts_and_says_nothing_is_not_waited_for(
    door: str, command: list[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, and nobody reads
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (ended,) = run_each(door, [command], tmp_path, url, HF_HUB_ETAG_TIMEOUT="1")
    last = ended.stderr.rstrip().splitlines()[-1]
    assert ended.status == 1
    assert last.startswith(f"hones-eval: task pope: {url} did not answer within 1 s; try later"), last
    assert not list((tmp_path / "out").rglob("*_results.json"))
    assert not (tmp_path / "out" / "ranking.json").exists()
