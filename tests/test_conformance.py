"""With the plug-in installed, lmms-eval is unchanged for all models of others."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import lmms_eval.models  # noqa: F401 - which loads the plug-in
import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.caching.response_cache import ResponseCache, compute_cache_key, extract_gen_kwargs
from lmms_eval.tasks import TaskManager
from lmms_own_tests import GIVEN, HOW, WITHOUT_PLUGIN, compare, kind
from lmms_runs import run_command, write_task

from hones_eval.model_wrappers import registry

SOME_TESTS = """
import lmms_eval.models
import pytest


def test_that_passes():
    pass


def test_that_fails():
    raise AssertionError("as ever")


@pytest.mark.skip
def test_that_is_skipped():
    pass


def test_that_the_plugin_breaks():
    assert "hones" not in lmms_eval.models.list_available_models()
"""


class Echo:
    """The part of a model that the cache uses."""

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


def _content_hash(request: Instance) -> str:
    from lmms_eval.caching import response_cache

    return str(response_cache._extract_content_hash(request))


def test_a_mock_of_a_model_is_not_ours(cache: ResponseCache) -> None:
    """A mock has every attribute, and lmms-eval's own tests pass mocks to the cache."""
    mock = MagicMock()
    mock.generate_until.return_value = ["answer 0", "answer 1"]
    cache.execute(mock, "generate_until", requests())
    again = Echo()
    assert cache.execute(again, "generate_until", requests()) == ["answer 0", "answer 1"]
    assert again.asked == [], "the mock's answers lie under lmms-eval's own keys"
    mock.record.add.assert_not_called()
    assert registry.base_name(mock) is mock


def test_answers_of_two_steerings_have_two_keys(cache: ResponseCache) -> None:
    before = cache._model_fingerprint_hash
    one, again, other = SteeredEcho("a1"), SteeredEcho("a1"), SteeredEcho("b2")
    for lm in (one, again, other):
        cache.execute(lm, "generate_until", requests())
    assert (one.asked, again.asked, other.asked) == ([0, 1], [], [0, 1])
    assert len(again.record.requests) == 2, "cached requests belong to the record of a run too"
    assert len(keys(cache)) == 4
    assert cache._model_fingerprint_hash == before


def test_a_task_manager_without_defaults_has_no_task_of_this_package(tmp_path: Path) -> None:
    given = str(write_task(tmp_path / "tasks"))
    assert TaskManager(include_path=given, include_defaults=False).all_tasks == ["tiny_colours"]


def test_other_names_and_objects_are_unchanged() -> None:
    for name in ("llava_hf", "qwen2_5_vl", None, 3):
        assert registry.base_name(name) is name
    assert registry.is_ours("hones_lava")
    assert not registry.is_ours("honest_llava")


def test_a_run_of_another_model_writes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results, samples and cache of the real command, with the plug-in and without."""
    tasks = str(write_task(tmp_path / "tasks"))
    command = ["--model", "dummy", "--tasks", "tiny_colours", "--include_path", tasks]
    command += ["--output_path", "logs", "--log_samples", "--use_cache", "cache"]
    left = {}
    for name in ("with", "without"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "without":
            (folder / "sitecustomize.py").write_text(WITHOUT_PLUGIN)
            monkeypatch.setenv("PYTHONPATH", str(folder))
        done = run_command(command, folder)
        assert done.returncode == 0, done.stderr[-3000:]
        left[name] = list(what_is_left(folder))
    assert left["with"] == left["without"]


def what_is_left(folder: Path) -> Iterator[Any]:
    """The files of a run without the dates in their names, and their contents without times and addresses."""
    passing = {"date", "start_time", "end_time", "total_evaluation_time_seconds", "efficiency", "git_hash"}
    keyed = {"created_at", "cache_key", "eval_version"}  # the key holds the version, which holds git's commit
    logs = sorted(path for path in (folder / "logs").rglob("*") if path.is_file())
    yield [re.sub(r"\d{8}_\d{6}", "", str(path.relative_to(folder))) for path in logs]
    results, samples = logs
    yield without_keys(json.loads(re.sub(r" at 0x[0-9a-f]+", "", results.read_text())), passing)
    yield [json.loads(line) for line in samples.read_text().splitlines()]
    cached = (folder / "cache" / "cache.audit.jsonl").read_text().splitlines()
    yield [without_keys(json.loads(line), keyed) for line in cached]


def without_keys(content: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in keys}


def test_lmms_evals_own_tests_end_as_without_the_plugin(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    given = os.environ.get(GIVEN)
    if not given:
        pytest.skip(f"neither wheel nor sdist of lmms-eval holds its tests: {HOW}")
    compared = compare(Path(given), tmp_path)
    if compared.differing or not any(outcome.kind == "passed" for outcome in compared.without.values()):
        pytest.fail(compared.summary())
    record_property("summary", compared.summary())


def test_a_comparison_finds_what_the_plugin_changes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "test" / "cache").mkdir(parents=True)
    (source / "test" / "models").mkdir()
    (source / "test" / "cache" / "test_some.py").write_text(SOME_TESTS)
    (source / "test" / "models" / "test_broken.py").write_text("import no_such_module")
    (source / "pyproject.toml").write_text('[project]\nversion = "9.8.7"\n')
    (tmp_path / "here").mkdir()
    compared = compare(source, tmp_path / "here")
    assert {name: (kind(a), kind(b)) for name, (a, b) in compared.differing.items()} == {
        "test.cache.test_some::test_that_the_plugin_breaks": ("passed", "failure")
    }
    assert "without the plug-in: 2 passed, 1 failed, 1 not collected, 1 skipped" in compared.summary()
    assert "with the plug-in:    1 passed, 2 failed, 1 not collected, 1 skipped" in compared.summary()
    assert (
        "fails in both: test.cache.test_some::test_that_fails: AssertionError: as ever" in compared.summary()
    )
    assert "breaks: passed without, failure with the plug-in: AssertionError" in compared.summary()
    assert "of 9.8.7" in compared.summary()
    assert "not in this source: test/cli" in compared.summary()


def test_a_folder_without_lmms_evals_tests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"LMMS_EVAL_SOURCE=.* holds none of .*git clone"):
        compare(tmp_path / "none", tmp_path)
