"""Caption metrics of lmms-eval, before and after the plug-in shares their Java programs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hones_eval.model_wrappers.caption_tools import REMEMBERED_CALLS, share_caption_tools

METEOR = "pycocoevalcap.meteor.meteor"
TOKENIZER = "pycocoevalcap.tokenizer.ptbtokenizer"
needs_java = pytest.mark.skipif(
    not shutil.which("java"), reason="lmms-eval's caption metrics tokenize with java"
)

# In a separate process, as the plug-in may be installed in this one.
SCRIPT = """
import argparse, json, subprocess, sys
from lmms_eval.tasks.coco_cap import utils

class Counted(subprocess.Popen):
    started = 0

    def __init__(self, command, *args, **kwargs):
        Counted.started += command[0] == "java"
        super().__init__(command, *args, **kwargs)

subprocess.Popen = Counted

answers = [
    ["A small red circle is left of a sign.", "the red circle, and a sign that says 'stop'"],
    ["a blue square -- on grass", "there's a blue square (and nothing else)"],
    ["two green triangles", "Green triangles; a caf\\u00e9"],
]
said = ["a red circle next to a stop sign", "A blue square on the grass!", "green triangles"]
again = [*said[:2], "a caf\\u00e9 with two triangles"]  # only the last answer is another one

def entries(captions):
    rows = enumerate(zip(captions, answers, strict=True))
    return [{"pred": one, "answer": right, "image_id": i, "id": i} for i, (one, right) in rows]

def measured():
    args, before = argparse.Namespace(output_path=sys.argv[1]), Counted.started
    metrics = [utils.coco_meteor, utils.coco_bleu4, utils.coco_cider]
    values = [metric(entries(said), args) for metric in metrics]
    values.append(utils.coco_meteor(entries(again), args))
    return {"values": values, "java": Counted.started - before}

assert "hones_eval.model_wrappers.plugin" not in sys.modules
found = {"untouched": measured()}
import lmms_eval.models  # installs the plug-in
found["shared"] = measured()
try:  # the second image has two answers, which METEOR refuses when it has asked for the first one's score
    utils.Meteor().compute_score({0: ["a"], 1: ["b"]}, {0: ["a"], 1: ["b", "c"]})
except AssertionError:
    found["after a failure"] = measured()
print(json.dumps(found))
"""

# Implements METEOR's protocol: the statistics of a line are its length, its score is its statistics.
STAND_IN = """\
#!{python}
import os, sys
with open({starts!r}, "a") as file:
    print(os.getpid(), file=file)
for line in sys.stdin:
    if "poison" in line:
        sys.exit(3)
    if line.startswith("SCORE"):
        print(len(line), flush=True)
    else:
        lengths = [float(part) for part in line.split("|||")[1:]]
        print(*lengths, sum(lengths), sep="\\n", flush=True)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four values are, and how many Java programs they start: without the plug-in, with it, and after a
    METEOR that failed.
    """
    folder = tmp_path_factory.mktemp("captions")
    program = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_java
def test_shared_programs_give_the_same_values(found: dict[str, Any]) -> None:
    values = found["untouched"]["values"]
    assert all(value > 0 for value in values)
    assert values[0] != values[-1]  # METEOR of the first captions and of the others
    assert found["shared"]["values"] == values


@needs_java
def test_they_are_four_programs_instead_of_twelve(found: dict[str, Any]) -> None:
    """The gold answers are tokenized once, the two sets of captions once each, and METEOR runs once."""
    assert found["untouched"]["java"] == 4 * 3
    assert found["shared"]["java"] == 1 + 2 + 1


@needs_java
def test_a_meteor_that_failed_is_not_asked_again(found: dict[str, Any]) -> None:
    assert found["after a failure"] == {"values": found["untouched"]["values"], "java": 1}


def fresh(name: str) -> Any:
    """A module as it stands in its file, whatever the plug-in did to the imported one."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared_tools() -> Any:
    tools = SimpleNamespace(Meteor=fresh(METEOR).Meteor, PTBTokenizer=fresh(TOKENIZER).PTBTokenizer)
    share_caption_tools(tools)  # type: ignore[arg-type]
    return tools


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A stand-in for java, and how often it was started."""
    program, log = tmp_path / "bin" / "java", tmp_path / "starts"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable, starts=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def meteor() -> Any:
    return shared_tools().Meteor


def said(*texts: str) -> dict[int, list[str]]:
    return {i: [text] for i, text in enumerate(texts)}


def lengths(*texts: str) -> list[float]:
    """The stand-in's scores for texts compared with themselves."""
    return [float(len(f"SCORE ||| {text} ||| {text}\n")) for text in texts]


@needs_java
def test_captions_are_tokenized_as_before() -> None:
    captions = {
        "b": [
            {"caption": "A man's dog, isn't it?\nTwo lines."},
            {"caption": "ein Käfer & 3 (three)..."},
        ],
        7: [{"caption": "Hello -- 'World'!"}, {"caption": ""}],
    }
    turned = {key: captions[key] for key in (7, "b")}
    expected = [fresh(TOKENIZER).PTBTokenizer().tokenize(given) for given in (captions, turned)]
    tokenizer = shared_tools().PTBTokenizer
    for _ in range(2):
        for given, tokens in zip((captions, turned), expected, strict=True):
            found = tokenizer().tokenize(given)
            assert list(found.items()) == list(tokens.items())
            found["b"].clear()  # what a caller does with its answer is its own business


def test_a_tokenization_is_remembered_unless_it_failed() -> None:
    asked: list[list[str]] = []

    class Tokenizer:
        def tokenize(self, captions: Any) -> Any:
            asked.append([answer["caption"] for said in captions.values() for answer in said])
            return {} if len(asked) == 1 else {key: ["words"] for key in captions}

    share_caption_tools(SimpleNamespace(Meteor=fresh(METEOR).Meteor, PTBTokenizer=Tokenizer))  # type: ignore[arg-type]
    first = {0: [{"caption": "first"}]}
    answers = [Tokenizer().tokenize(first) for _ in range(3)]
    assert answers == [{}, {0: ["words"]}, {0: ["words"]}]
    assert len(asked) == 2, "what was lost is asked again, what was said is not"
    for i in range(REMEMBERED_CALLS):
        Tokenizer().tokenize({0: [{"caption": str(i)}]})
    Tokenizer().tokenize(first)
    assert len(asked) == 2 + REMEMBERED_CALLS + 1, "the oldest call makes room"


def test_no_scorer_starts_meteor_before_it_scores(meteor: Any, starts: Callable[[], int]) -> None:
    scorers = [meteor() for _ in range(3)]
    assert starts() == 0
    for scorer in scorers:
        assert scorer.compute_score(said("a", "bb"), said("a", "bb"))[1] == lengths("a", "bb")
    assert starts() == 1


def test_scorers_in_threads_do_not_read_each_others_answers(meteor: Any, starts: Callable[[], int]) -> None:
    texts = [[f"{'x' * (7 * thread)}{'y' * i}" for i in range(40)] for thread in range(8)]
    scored: dict[int, list[float]] = {}

    def score(thread: int) -> None:
        scored[thread] = meteor().compute_score(said(*texts[thread]), said(*texts[thread]))[1]

    # If a thread reads another one's answer, one of them waits forever.
    threads = [threading.Thread(target=score, args=(i,), daemon=True) for i in range(len(texts))]
    for item in threads:
        item.start()
    for element in threads:
        element.join(timeout=60)
    assert scored == {i: lengths(*mine) for i, mine in enumerate(texts)}
    assert starts() == 1


def test_after_a_failure_the_next_score_has_a_new_program(meteor: Any, starts: Callable[[], int]) -> None:
    scorer = meteor()
    with pytest.raises((OSError, ValueError)):  # as without us: METEOR is gone, and its answer is no number
        scorer.compute_score(said("a", "poison", "c"), said("a", "poison", "c"))
    for item in (scorer, meteor()):
        assert item.compute_score(said("a"), said("a"))[1] == lengths("a")
    assert starts() == 2


def test_a_forked_process_has_a_program_of_its_own(
    meteor: Any, starts: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert meteor().compute_score(said("a"), said("a"))[1] == lengths("a")
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        assert meteor().compute_score(said("bb"), said("bb"))[1] == lengths("bb")
    assert meteor().compute_score(said("ccc"), said("ccc"))[1] == lengths("ccc")
    assert starts() == 2


def test_without_java_the_error_says_java(
    meteor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="java"):
            meteor().compute_score(said("a"), said("a"))
