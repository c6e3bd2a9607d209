"""How the cost of head localization grows, beside a plain loop, and that memory does not grow with examples.

By generation on LLaVAs with random weights, of which one size is changed at a time. The plain loop takes one
head of every layer for one example, scaled to all heads; both are timed by this thread's CPU time, and the
proofs that ours is exact are made before. `--memory` runs `hones-eval rank` on the embedded model, a process
for every number of examples, and prints the most memory that each ever held. Usage:

    python benchmarks/growth.py [--what examples heads layers answer image] [--dtype float32]
    python benchmarks/growth.py --what --memory 50 100 200 500 [--task scenes_vqa_relation_discovery]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from plain_loop import Clock, TokenTask, add_dtype, answer, examples_for, plain_head, small_llava

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.replay import Replayer
from hones_eval.methods.localization import HeadLocalization
from hones_eval.toy import checkpoint_path

HIDDEN, PATCH = 128, 14
BASE = {"examples": 4, "heads": 8, "layers": 4, "answer": 8, "image": 64}
STEPS = {
    "examples": (2, 4, 8, 16),
    "heads": (2, 4, 8, 16),
    "layers": (2, 4, 8, 16),
    "answer": (1, 4, 16, 64),
    "image": (16, 64, 144, 324),
}


@torch.no_grad()
def row(size: str, value: int, dtype: str) -> tuple[float, float]:
    """Print and return milliseconds of one head on one example, with one size changed: ours, plain loop."""
    sizes = BASE | {size: value}
    side = PATCH * round(sizes["image"] ** 0.5)
    model = small_llava(sizes["layers"], sizes["heads"], HIDDEN, side, spread=0.02, dtype=dtype)
    examples = examples_for(model, sizes["examples"] + 1, new_tokens=sizes["answer"], target_tokens=1)
    for example in examples:
        example.target_ids = answer(model, example)
    task: Any = TokenTask(examples)
    localization = HeadLocalization(Replayer(Anatomy.of(model)), task)
    localization.measure(task[sizes["examples"]])
    clock, differing = Clock(), 0.0
    with clock("ours"):
        for index in range(sizes["examples"]):
            differing += float(localization.measure(task[index]).sums["differing_answers"])
    some = [head for head in localization.heads if head.head == head.layer % sizes["heads"]]
    with clock("plain"):
        for head in some:
            plain_head(model, head, sizes["heads"], lambda: answer(model, examples[0]))
    measured = sizes["examples"] * len(localization.heads)
    ours, plain = 1e3 * clock.seconds["ours"] / measured, 1e3 * clock.seconds["plain"] / len(some)
    print(
        f"| {size} | {value} | {ours:.2f} | {plain:.1f} | {plain / ours:.1f} | {differing / measured:.0%} |",
        flush=True,
    )
    return ours, plain


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms, by least squares."""
    x, y = torch.tensor(sizes).log().double(), torch.tensor(values).log().double()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def memory(task: str, examples: int) -> None:
    """The peak of one `hones-eval rank`, heads and neurons, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hones_eval", "rank", "--method", "hones", "--model", "llava_hf"]
        command += ["--model_args", f"pretrained={checkpoint_path()}", "--tasks", task]
        command += ["--limit", str(examples), "--out", f"{folder}/ranking"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    print(f"| {task} | {examples} | {usage.ru_maxrss / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--what", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--memory", nargs="+", type=int, default=[], metavar="EXAMPLES")
    parser.add_argument("--task", default="scenes_vqa_relation_discovery")
    add_dtype(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what:
        print(", ".join(f"{name} {value}" for name, value in BASE.items()) + f"; hidden {HIDDEN}")
        print("| size | | ours, ms a head and example | plain loop, ms | ratio | answers that differ |")
        print("|---|---:|---:|---:|---:|---:|")
    exponents: list[str] = []
    for name in given.what:
        ours, plain = zip(*(row(name, step, given.dtype) for step in STEPS[name]), strict=True)
        slopes = f"{exponent(STEPS[name], ours):+.2f} (plain loop {exponent(STEPS[name], plain):+.2f})"
        exponents.append(f"{name} {slopes}")
    if exponents:
        print("exponents of the time per head and example: " + ", ".join(exponents))
    if given.memory:
        print("| task | examples | peak memory, MiB |\n|---|---:|---:|")
    for count in given.memory:
        memory(given.task, count)
