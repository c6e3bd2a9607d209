"""Localization over the 270 heads of the small pretrained model, beside a careful batch and a restart.

    hones-eval smol build --out smol
    python benchmarks/smol_speed.py --model smol

Per element type, on gold answers of relation questions: CPU milliseconds per head of one forward pass per
head (*naive*), of all heads as the rows of one batch (*batch*), of rows that restart at the recorded layer
inputs (*restart*) and of ours, in turn in one process; the rate of ours' arithmetic; and the peak memory of
each way in a process of its own. The last line projects ours to LLaVA-1.5-7B: the multiply-adds of a forward
pass at its shape are counted without weights, and a head costs the same share of a forward pass.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from careful_batch import batch_values, restart_values
from plain_loop import DTYPES, Clock, log_probability, multiply_adds, plain_head
from real_shape import SIDE, llava_1_5_7b
from torch import Tensor
from transformers import AutoModelForImageTextToText

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.localization import HeadLocalization

TASK = "scenes_vqa_relation_discovery"
WAYS = ("naive", "batch", "restart", "ours")
NAIVE_HEADS = 27
"""One forward pass per head is measured on every tenth head only."""
TOKENS = 40 + SIDE * SIDE
RATE = 150e12
"""Operations per second of the accelerator in the projection: half of an A100's peak in bfloat16."""
GIB = 2**30

Way = Callable[[int], Tensor]


class Setting:
    """The model in one element type, and the ways to measure all heads on an example."""

    def __init__(self, folder: str, dtype: str, examples: int) -> None:
        """Load the model and its examples; the first is for the proofs and to warm up."""
        lmm = load_lmm("llava_hf", f"pretrained={folder},dtype={dtype}", device="cpu")
        self.model = inner_model(lmm).to(DTYPES[dtype])
        self.examples = TaskExamples(lmm, TASK, model_name="llava_hf", limit=examples + 1)
        self.localization = HeadLocalization(Replayer(Anatomy.of(self.model)), self.examples)
        self.heads = self.localization.heads
        self.per_layer = self.localization.replayer.anatomy.shape.heads

    def run(self, way: str, index: int) -> Tensor:
        """The gold answer's log-probability under each head's replacement; `naive` takes a tenth of them."""
        example = self.examples[index]
        if way == "ours":
            drops, base = self.localization.log_probability_drop(example)
            return base - drops
        if way == "naive":
            some = self.heads[:: len(self.heads) // NAIVE_HEADS]
            forward = partial(log_probability, self.model, example)
            return torch.tensor([plain_head(self.model, head, self.per_layer, forward) for head in some])
        values = batch_values if way == "batch" else restart_values
        return values(self.model, example, self.heads, self.per_layer)


def compare(setting: Setting, dtype: str) -> float:
    """Print a row of times; return the share of a forward pass that a head costs ours, in multiply-adds."""
    clock, found = Clock(), {}
    for way in WAYS:
        setting.run(way, 0)
    count = len(setting.examples)
    for index in range(1, count):
        for way in WAYS:
            with clock(way):
                found[way] = setting.run(way, index)
    heads = len(setting.heads)
    each = {way: clock.seconds[way] / (count - 1) / heads for way in WAYS}
    each["naive"] *= heads / len(found["naive"])
    apart = max(float((found[way] - found["ours"]).abs().max()) for way in ("batch", "restart"))
    ours = multiply_adds(partial(setting.run, "ours", 1))
    example = setting.examples[1]
    forward = multiply_adds(partial(log_probability, setting.model, example))
    ratios = " | ".join(f"{each[way] / each['ours']:.2f}" for way in WAYS[:-1])
    print(
        f"| {dtype} | {1e3 * each['ours']:.1f} | {heads * each['ours']:.1f} | {ratios} | "
        f"{2e-9 * ours / (heads * each['ours']):.0f} | {apart:.1e} |",
        flush=True,
    )
    return ours / heads / forward


def peak(folder: str, dtype: str, way: str) -> float:
    """The peak resident memory of a process that runs one way on two examples, in GiB."""
    command = [sys.executable, __file__, "--model", folder, "--one", dtype, way]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1])["peak"])


def one(folder: str, dtype: str, way: str) -> None:
    """Run one way on two examples, and print the peak memory of this process."""
    setting = Setting(folder, dtype, 1)
    for index in range(2):
        setting.run(way, index)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}))


def project(share: float) -> None:
    """Print the arithmetic of LLaVA-1.5-7B's 1,024 heads."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(llava_1_5_7b(trial=False))
    decoder = model.get_decoder()
    embedded = torch.zeros(1, TOKENS, decoder.config.hidden_size, device="meta")
    # A mask of this form is used as it is; making one reads values, which tensors without storage lack.
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")
    forward = multiply_adds(lambda: decoder(inputs_embeds=embedded, attention_mask=mask, use_cache=False))
    shape: Any = decoder.config
    heads = shape.num_hidden_layers * shape.num_attention_heads
    operations = 2 * forward * share * heads
    print(
        f"LLaVA-1.5-7B, {TOKENS} tokens: {2e-12 * forward:.1f} TFLOP per forward pass, {heads} heads at "
        f"{share:.2f} of it: {1e-15 * operations:.1f} PFLOP per example, {operations / RATE:.0f} s at "
        f"{1e-12 * RATE:.0f} TFLOP/s, {500 * operations / RATE / 3600:.1f} hours per 500 examples"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smol", help="the folder of hones-eval smol build")
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        one(given.model, *given.one)
        return
    print(f"CPU time of one thread, {given.examples} examples of {TASK}")
    print("| type | ours, ms per head | s per example | naive | batch | restart | GFLOP/s | largest gap |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    shares = [compare(Setting(given.model, dtype, given.examples), dtype) for dtype in given.dtype]
    print("\n| type | " + " | ".join(f"peak memory, {way}" for way in WAYS) + " |\n|---|---:|---:|---:|---:|")
    for dtype in given.dtype:
        cells = " | ".join(f"{peak(given.model, dtype, way):.1f} GiB" for way in WAYS)
        print(f"| {dtype} | {cells} |", flush=True)
    project(shares[0])


if __name__ == "__main__":
    main()
