"""Light commands stay light: what a command imports, seen in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from make_logs import Questions, Steered, write_run

from hones_eval.commands import COMMANDS

HEAVY = ("torch", "transformers", "lightning", "lmms_eval", "datasets", "scipy", "matplotlib")
SPIKE_IN = ["spike-in", "--ranking", "r", "--model", "m", "--tasks", "t", "--out", "o"]
WRONG_VALUES = [
    ["rank", "--method", "honse"],
    ["rank", "--method", "hones", "--model", "llava_hf", "--dtype", "float23"],
    ["scale", "--how", "fxed"],
    ["export", "--to", "chekpoint"],
    ["task", "nwe"],
    [*SPIKE_IN, "--damp", "1.5"],
    [*SPIKE_IN, "--trials", "0"],
    [*SPIKE_IN, "--parts", "[3, 4]"],
]
# Runs a command and prints which heavy libraries it imported, on the last line of standard error.
CHILD = """
import json, sys
from hones_eval.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code or 0
print(json.dumps([status, [name for name in {heavy!r} if name in sys.modules]]), file=sys.stderr)
"""


def imported(*arguments: object) -> tuple[int, set[str]]:
    """The exit status of a command, and the heavy libraries that it imported."""
    command = [sys.executable, "-c", CHILD.format(heavy=HEAVY), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    status, names = json.loads(done.stderr.splitlines()[-1])
    return status, set(names)


def test_version_and_help_of_the_program_import_nothing_heavy() -> None:
    assert imported("--version") == (0, set())
    assert imported("--help") == (0, set())


def test_help_and_refused_flags_of_every_command_import_nothing_heavy() -> None:
    """Flags that are unknown, missing or of a wrong value, in one process, which keeps what it imports."""
    code = "\n".join(
        [
            "import contextlib, io, json, sys",
            "from hones_eval.__main__ import main",
            "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):",
            f"    for name in {COMMANDS!r}:",
            "        with contextlib.suppress(SystemExit):",
            "            main([name, '--help'])",
            "        assert main([name, '--limt', '3']) == 2",
            "        assert name == 'demo' or main([name]) == 2",
            f"    for given in {WRONG_VALUES!r}:",
            "        assert main(given) in (1, 2), given",
            f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("how", ["fixed", "signed"])
def test_scaling_by_given_values_imports_no_model_library(how: str, tmp_path: Path) -> None:
    import torch

    from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance
    from hones_eval.core.ranking import Ranking

    scores = torch.arange(96.0).reshape(12, 8) / 96
    examples = [ExampleSet("task", "test", 1, 0, "0" * 64, [0], ["0" * 64])]
    source = Provenance("base", None, ModelShape(12, 8, 4, 32, 64, 99), "hones", {}, examples)
    made = Ranking(source, head_scores=scores, neuron_scores=torch.rand(12, 64))
    made.save(tmp_path / "ranking")
    given = ["scale", "--ranking", tmp_path / "ranking", "--how", how, "--out", tmp_path / "steering"]
    assert imported(*given) == (0, {"torch"})
    assert (tmp_path / "steering" / "steering.json").is_file()


def test_a_leaderboard_of_logs_with_images_imports_no_torch(tmp_path: Path) -> None:
    questions = Questions.drawn(count=20)
    write_run(tmp_path / "logs", questions, questions.answers(0.5, 1), date="20260101_000000", media=True)
    write_run(tmp_path / "logs", questions, questions.answers(0.9, 2), steered=Steered(), media=True)
    status, names = imported("leaderboard", tmp_path / "logs", "--out", tmp_path / "board")
    assert status == 0
    assert names <= {"scipy"}
