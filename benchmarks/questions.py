"""Generated answers to several questions about one image: checked together, beside one by one.

A LLaVA of random weights, so small that edits change few answers, with 144 image tokens and 26 words per
question. Both ways measure all heads on the same examples, in turn, timed by CPU time of the thread. Usage:

    python benchmarks/questions.py [--questions 4 8 16] [--dtype float32]
"""

import argparse
from typing import Any

import torch
from plain_loop import Clock, TokenTask, examples_for, multiply_adds, small_llava

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.answers import together
from hones_eval.methods.localization import HeadLocalization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.no_grad()
def row(questions: int, dtype: torch.dtype) -> None:
    """One image for the proofs, and one that is measured."""
    model = small_llava(4, 8, 128, 168, spread=0.005).to(dtype)
    examples = examples_for(model, 2 * questions, new_tokens=3, target_tokens=3, per_image=questions)
    for example in examples:
        example.inputs["pixel_values"] = example.inputs["pixel_values"].to(dtype)
        # Examples that show one image hold one tensor.
        example.inputs["pixel_values"] = examples[example.index // questions * questions].inputs[
            "pixel_values"
        ]
    task: Any = TokenTask(examples)
    ways = {name: HeadLocalization(Replayer(Anatomy.of(model)), task) for name in ("alone", "together")}
    ways["together"].run = ways["together"].run._replace(share=True)
    clock, sums, counted = Clock(), {}, {}

    def measured(way: HeadLocalization, first: int) -> list[Any]:
        return [way.measure(task[index]).sums for index in range(first, first + questions)]

    for name, way in ways.items():
        measured(way, 0)
        with clock(name):
            sums[name] = measured(way, questions)
        counted[name] = multiply_adds(lambda way=way: measured(way, questions))  # type: ignore[misc]
    pairs = list(zip(sums["alone"], sums["together"], strict=True))
    worst = max(float((a["log_probability_drop"] - b["log_probability_drop"]).abs().max()) for a, b in pairs)
    equal = all(torch.equal(a["metric_drop"], b["metric_drop"]) for a, b in pairs)
    differ = sum(float(a["differing_answers"]) for a, _ in pairs) / questions / len(ways["alone"].heads)
    shared = sum(float(b["shared"]) for _, b in pairs)
    print(
        f"| {questions} | {differ:.0%} | {shared:.0f} | {1e3 * clock.seconds['alone'] / questions:.0f} | "
        f"{1e3 * clock.seconds['together'] / questions:.0f} | "
        f"{clock.seconds['alone'] / clock.seconds['together']:.2f} | "
        f"{counted['alone'] / counted['together']:.2f} | {'equal' if equal else 'DIFFER'}, {worst:.1e} |",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--questions", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| questions | answers that differ | shared | alone, ms | together, ms | ratio | floor | scores |")
    print("|---:|---:|---:|---:|---:|---:|---:|---|")
    for count in given.questions:
        row(count, DTYPES[given.dtype])
    print(f"a group shares from {together.FEWEST} questions on")
