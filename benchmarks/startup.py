"""CPU seconds that commands take before and without any work on a model.

    python benchmarks/startup.py [--repeat 5]

Every line is a process of its own, measured by the kernel (user plus system time of the child). The smallest
of several runs is shown, next to an empty Python program and one that only imports torch.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODULE = [sys.executable, "-m", "hones_eval"]
PREPARE = """
import sys
import torch
from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance
from hones_eval.core.ranking import Ranking
examples = [ExampleSet("task", "test", 1, 0, "0" * 64, [0], ["0" * 64])]
source = Provenance("base", None, ModelShape(32, 32, 128, 4096, 11008, 32000), "hones", {}, examples)
Ranking(source, torch.randn(32, 32), neuron_scores=torch.randn(32, 11008)).save(sys.argv[1])
"""


def seconds(command: list[str], repeat: int) -> float:
    """The CPU seconds of a command, the least of several runs. Raises: SystemExit when it fails."""
    found = []
    for _ in range(repeat):
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = os.times()
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr}")
        found.append(
            after.children_user - before.children_user + after.children_system - before.children_system
        )
    return min(found)


def logs(folder: Path) -> Path:
    """A baseline and a steered run of 60 examples, as lmms-eval writes them."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
    from make_logs import Questions, Steered, write_run

    questions = Questions.drawn(count=60)
    write_run(folder, questions, questions.answers(0.6, 1), date="20260101_000000", media=True)
    write_run(
        folder, questions, questions.answers(0.7, 2), date="20260102_000000", steered=Steered(), media=True
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", PREPARE, str(folder / "ranking")], check=True)
        scale = ["scale", "--ranking", str(folder / "ranking"), "--how", "fixed", "--out"]
        board = ["leaderboard", str(logs(folder / "logs")), "--out", str(folder / "board")]
        lines = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "hones-eval --version": [*MODULE, "--version"],
            "hones-eval --help": [*MODULE, "--help"],
            "hones-eval rank --help": [*MODULE, "rank", "--help"],
            "hones-eval scale --how fixed": [*MODULE, *scale, str(folder / "steering"), "--overwrite"],
            "hones-eval leaderboard (1 pair, 60 examples)": [*MODULE, *board],
        }
        print("| command | CPU seconds |\n|---|---|")
        for label, command in lines.items():
            print(f"| `{label}` | {seconds(command, repeat):.2f} |", flush=True)


if __name__ == "__main__":
    main()
