"""lmms-eval's own offline tests on the lmms-eval that is installed: once with our plug-in, once without."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import lmms_eval
import pytest

TESTS = (
    "test/cache",
    "test/cli",
    "test/models",
    "test/eval/test_benchmark_aliases.py",
    "test/eval/test_evaluator.py",
    "test/eval/test_protocol.py",
    "test/eval/test_request_construction_contract.py",
    "test/eval/test_task_pipeline.py",
)
"""What needs no network, no GPU and no data, and touches what the plug-in touches."""
GIVEN = "LMMS_EVAL_SOURCE"
HOW = (
    f"git clone --branch v{version('lmms_eval')} --depth 1 https://github.com/EvolvingLMMs-Lab/lmms-eval, "
    f"and set {GIVEN} to that folder"
)

PROBE = """
from lmms_eval.models import list_available_models


def test_the_plugin_is_there():
    assert "hones" in list_available_models()
"""
# Imported by Python as it starts: our entry point then gives lmms-eval no models, and patches nothing.
WITHOUT_PLUGIN = """
from importlib.metadata import EntryPoint

load = EntryPoint.load


def load_others(self):
    return () if (self.group, self.name) == ("lmms_eval.models", "hones_eval") else load(self)


EntryPoint.load = load_others
"""


class Outcome(NamedTuple):
    """How one test ended: passed, failure, error or skipped, and the first line of why."""

    kind: str
    why: str = ""


class Comparison(NamedTuple):
    """Both runs, by test, and what they ran on."""

    without: dict[str, Outcome]
    with_plugin: dict[str, Outcome]
    source_version: str
    missing: list[str]

    @property
    def differing(self) -> dict[str, tuple[Outcome | None, Outcome | None]]:
        """Tests that do not end the same way, without the plug-in and with it."""
        pairs = {
            name: (self.without.get(name), self.with_plugin.get(name))
            for name in self.without | self.with_plugin
        }
        return {name: pair for name, pair in pairs.items() if kind(pair[0]) != kind(pair[1])}

    def summary(self) -> str:
        """The counts of both runs, what differs, and what fails in both."""
        lines = [
            f"lmms-eval's own tests, of {self.source_version}, on the installed {version('lmms_eval')}:",
            f"  without the plug-in: {counts(self.without)}",
            f"  with the plug-in:    {counts(self.with_plugin)}",
        ]
        lines += [f"  not in this source: {name}" for name in self.missing]
        for name, (before, after) in self.differing.items():
            why = (after or before or Outcome("")).why
            lines.append(f"  differs: {name}: {kind(before)} without, {kind(after)} with the plug-in: {why}")
        lines += [
            f"  fails in both: {name}: {outcome.why}"
            for name, outcome in self.without.items()
            if name not in self.differing and outcome.kind in ("failure", "error")
        ]
        return "\n".join(lines)


def compare(source: Path, folder: Path) -> Comparison:
    """Run the tests of a checkout twice, each in a process of its own, with `folder` to write into.

    Fails the test that calls it when `source` holds none of them, when pytest could not run them, and when
    the plug-in was not there in the one run or was there in the other.
    """
    there = [name for name in TESTS if (source / name).exists()]
    if not there:
        pytest.fail(f"{GIVEN}={source} holds none of lmms-eval's tests ({', '.join(TESTS)}): {HOW}")
    shutil.copytree(source / "test", folder / "test", ignore=shutil.ignore_patterns("__pycache__"))
    # Some tests read lmms-eval's source beside them, which has to be the installed one.
    (folder / "lmms_eval").symlink_to(Path(lmms_eval.__file__).parent)
    (folder / "test_probe.py").write_text(PROBE)
    (folder / "hidden").mkdir()
    (folder / "hidden" / "sitecustomize.py").write_text(WITHOUT_PLUGIN)
    with_plugin = _outcomes(folder, "with", there)
    without = _outcomes(folder, "without", there, folder / "hidden")
    probe = "test_probe::test_the_plugin_is_there"
    probed = kind(without.pop(probe, None)), kind(with_plugin.pop(probe, None))
    if probed != ("failure", "passed"):
        pytest.fail(f"one run is to have the plug-in and the other not, but the probes ended so: {probed}")
    missing = [name for name in TESTS if name not in there]
    return Comparison(without, with_plugin, _version_of(source), missing)


def counts(outcomes: dict[str, Outcome]) -> str:
    """`297 passed, 6 failed`, and errors and skipped ones where there are any."""
    found = Counter(outcome.kind for outcome in outcomes.values())
    words = {"passed": "passed", "failure": "failed", "error": "not collected", "skipped": "skipped"}
    return ", ".join(f"{found[kind]} {word}" for kind, word in words.items() if found[kind])


def kind(outcome: Outcome | None) -> str:
    """How it ended, or that it did not run."""
    return outcome.kind if outcome else "not run"


def _outcomes(folder: Path, name: str, tests: list[str], *first: Path) -> dict[str, Outcome]:
    """Run tests in a process whose modules are looked for in the folders `first` before all others."""
    report = folder / f"{name}.xml"
    # The plug-in is loaded from the start: some of the tests would not import lmms_eval.models themselves.
    options = ["-q", "-p", "lmms_eval.models", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", "test_probe.py", *tests]
    path = os.pathsep.join(filter(None, (*map(str, first), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OPENAI_API_KEY": "none", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode not in (0, 1):
        said = (done.stdout + done.stderr)[-2000:]
        pytest.fail(f"pytest ended with {done.returncode} on lmms-eval's tests, {name} the plug-in:\n{said}")
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ended = [child for child in case if child.tag in ("failure", "error", "skipped")]
        why = (ended[0].get("message") or "").partition("\n")[0] if ended else ""
        where = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        outcomes[where] = Outcome(ended[0].tag if ended else "passed", why)
    return outcomes


def _version_of(source: Path) -> str:
    project = source / "pyproject.toml"
    found = re.search(r'^version\s*=\s*"(.+)"', project.read_text(), re.M) if project.is_file() else None
    return found[1] if found else "an unknown version"
