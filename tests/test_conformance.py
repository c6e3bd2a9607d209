"""lmms-eval with the plug-in does what it does without, for every model that is not ours."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from xml.etree import ElementTree

import lmms_eval.models  # noqa: F401 - which loads the plug-in
import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.caching.response_cache import ResponseCache, compute_cache_key, extract_gen_kwargs
from lmms_eval.tasks import TaskManager
from lmms_runs import write_task

from hones_eval.model_wrappers import plugin

THEIR_TESTS = (
    "test/models",
    "test/cache",
    "test/cli",
    "test/eval/test_protocol.py",
    "test/eval/test_request_construction_contract.py",
)
WITHOUT_PLUGIN = """
import importlib.metadata as metadata

everything = metadata.entry_points


def others(**wanted):
    return metadata.EntryPoints(one for one in everything(**wanted) if one.name != "hones_eval")


metadata.entry_points = others
"""


class Echo:
    """As much of a model as the cache touches."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.task_dict: dict[str, Any] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked += [request.doc_id for request in requests]
        return [f"answer {request.doc_id}" for request in requests]


class Record:
    def add(self, requests: list[Instance], task_dict: dict[str, Any]) -> None:
        self.requests = requests


class SteeredEcho(Echo):
    base_wrapper = "echo"

    def __init__(self, fingerprint: str) -> None:
        super().__init__()
        self.record = Record()
        self.fingerprint = fingerprint


def requests() -> list[Instance]:
    return [
        Instance(
            request_type="generate_until",
            arguments=("What is it?", {"max_new_tokens": 4}, None, doc_id, "echo", "test"),
            idx=0,
            metadata={"task": "echo", "doc_id": doc_id, "repeats": 1},
        )
        for doc_id in range(2)
    ]


@pytest.fixture
def cache(tmp_path: Path) -> ResponseCache:
    return ResponseCache(str(tmp_path / "a.db"), str(tmp_path / "a.jsonl"), model_fingerprint="echo|")


def keys(cache: ResponseCache) -> set[str]:
    return {key for (key,) in cache.db.execute("SELECT cache_key FROM responses")}


def test_answers_of_other_models_keep_their_keys(cache: ResponseCache) -> None:
    cache.execute(Echo(), "generate_until", requests())
    stock = {
        compute_cache_key(
            "generate_until",
            "echo",
            request.doc_id,
            extract_gen_kwargs(request),
            content_hash=_content_hash(request),
            model_fingerprint_hash=cache._model_fingerprint_hash,
        )
        for request in requests()
    }
    assert keys(cache) == stock
    cache.execute(SteeredEcho(""), "generate_until", requests())
    assert keys(cache) == stock, "a baseline of ours has nothing to add to the key"


def _content_hash(request: Instance) -> str:
    from lmms_eval.caching import response_cache

    return str(response_cache._extract_content_hash(request))


def test_a_mock_of_a_model_is_not_ours(cache: ResponseCache) -> None:
    """A mock has whatever it is asked for, and lmms-eval's own tests hand mocks to the cache."""
    mock = MagicMock()
    mock.generate_until.return_value = ["answer 0", "answer 1"]
    cache.execute(mock, "generate_until", requests())
    again = Echo()
    assert cache.execute(again, "generate_until", requests()) == ["answer 0", "answer 1"]
    assert again.asked == [], "the mock's answers lie under lmms-eval's own keys"
    mock.record.add.assert_not_called()
    assert plugin.base_name(mock) is mock


def test_answers_of_two_steerings_have_two_keys(cache: ResponseCache) -> None:
    before = cache._model_fingerprint_hash
    one, again, other = SteeredEcho("a1"), SteeredEcho("a1"), SteeredEcho("b2")
    for lm in (one, again, other):
        cache.execute(lm, "generate_until", requests())
    assert (one.asked, again.asked, other.asked) == ([0, 1], [], [0, 1])
    assert len(again.record.requests) == 2, "cached requests belong to the record of a run too"
    assert len(keys(cache)) == 4
    assert cache._model_fingerprint_hash == before


def test_a_task_manager_without_defaults_has_none_of_ours(tmp_path: Path) -> None:
    given = str(write_task(tmp_path / "tasks"))
    assert TaskManager(include_path=given, include_defaults=False).all_tasks == ["tiny_colours"]


def test_other_names_and_objects_stay_as_they_are() -> None:
    for name in ("llava_hf", "qwen2_5_vl", None, 3):
        assert plugin.base_name(name) is name


def test_their_own_tests_do_the_same_with_the_plugin(tmp_path: Path) -> None:
    """lmms-eval's offline tests, with and without our entry point: the same ones pass, the same ones fail."""
    given = os.environ.get("LMMS_EVAL_SOURCE")
    if not given:
        pytest.skip(
            "neither wheel nor sdist of lmms-eval holds its tests: set LMMS_EVAL_SOURCE to a checkout of the "
            "installed version (git clone --branch v0.7.3 https://github.com/EvolvingLMMs-Lab/lmms-eval)"
        )
    shutil.copytree(Path(given) / "test", tmp_path / "test")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(WITHOUT_PLUGIN)
    with_plugin = _outcomes(tmp_path, "with", {})
    without = _outcomes(tmp_path, "without", {"PYTHONPATH": str(tmp_path / "without")})
    assert sum(outcome == "passed" for outcome in without.values()) > 0
    differing = {name: (without.get(name), with_plugin.get(name)) for name in without | with_plugin}
    assert not {name: pair for name, pair in differing.items() if pair[0] != pair[1]}


def _outcomes(folder: Path, name: str, extra: dict[str, str]) -> dict[str, str]:
    """By test, whether it passed, failed or was skipped."""
    report = folder / f"{name}.xml"
    there = [test for test in THEIR_TESTS if (folder / test).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *there]
    environment = os.environ | {"OPENAI_API_KEY": "none"} | extra
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return outcomes
