"""Caption metrics of lmms-eval, before and after the plug-in shares their Java programs."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not shutil.which("java"), reason="lmms-eval's caption metrics tokenize with java"
)

# In a process of its own: in this one the plug-in may have been installed, and a process starts programs.
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
try:  # the second picture has two answers, which METEOR refuses when it has asked for the first one's score
    utils.Meteor().compute_score({0: ["a"], 1: ["b"]}, {0: ["a"], 1: ["b", "c"]})
except AssertionError:
    found["after a failure"] = measured()
print(json.dumps(found))
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


def test_shared_programs_give_the_same_values(found: dict[str, Any]) -> None:
    values = found["untouched"]["values"]
    assert all(value > 0 for value in values)
    assert values[0] != values[-1]  # METEOR of the first captions and of the others
    assert found["shared"]["values"] == values


def test_they_are_four_programs_instead_of_twelve(found: dict[str, Any]) -> None:
    """The gold answers are tokenized once, the two sets of captions once each, and METEOR runs once."""
    assert found["untouched"]["java"] == 4 * 3
    assert found["shared"]["java"] == 1 + 2 + 1


def test_a_meteor_that_failed_is_not_asked_again(found: dict[str, Any]) -> None:
    assert found["after a failure"] == {"values": found["untouched"]["values"], "java": 1}
