"""The cost of hooks on the neurons of experts, and of a dense model of the same active size, in one run.

A mixture of experts routes each token to `TOP` experts of `WIDTH` neurons; the dense model's FFN is as wide
as these together. Both have random weights, and read one prompt. Each runs the same forward pass unsteered
and under a steering of 1 % of the neurons, alternating, on one thread. Printed per model:

- ratios of the thread's CPU time: steered / unsteered, and steered / steered dense model
- the peak of resident memory in the steered pass, above what was resident before it
- that peak with a plain hook on [rows, tokens, neurons], which holds the zeros of all other experts too
- that peak without a hook

Linux only, for the peak of resident memory. Usage:

    python benchmarks/experts.py [--tokens 1024] [--rounds 7] [--dtype float32]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_loop import DTYPES, add_dtype
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.attach import attach_to_anatomy
from hones_eval.core.sites import neuron_count
from hones_eval.core.steering import Steering

TOP, WIDTH = 4, 64
COUNTS = (8, 32, 128)
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 512,
}


def model_of(experts: int | None, dtype: str) -> PreTrainedModel:
    """A mixture of `experts`, or the dense model for None."""
    torch.manual_seed(0)
    if experts is None:
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=TOP * WIDTH)).eval().to(DTYPES[dtype])
    routing = {"num_experts": experts, "num_experts_per_tok": TOP, "moe_intermediate_size": WIDTH}
    config = Qwen3MoeConfig(**SIZES, **routing, intermediate_size=TOP * WIDTH)
    return Qwen3MoeForCausalLM(config).eval().to(DTYPES[dtype])


def steering_of(anatomy: Anatomy) -> Steering:
    """One percent of the neurons times 1.5."""
    shape = anatomy.shape
    scales = torch.ones(shape.layers, shape.neurons)
    order = torch.randperm(scales.numel(), generator=torch.Generator().manual_seed(0))
    scales.view(-1)[order[: neuron_count(scales, 0.01)]] = 1.5
    heads = torch.ones(shape.layers, shape.heads)
    return Steering(heads, scales, Provenance("random", None, shape, "drawn", {}, []))


def plain_hooks(anatomy: Anatomy, steering: Steering) -> Callable[[], object]:
    """Hooks on the tensors [rows, tokens, neurons] of all experts; returns what removes them."""
    scales_in_dtype = steering.neuron_scales.to(anatomy.model.dtype)
    handles = [
        site.module.register_forward_pre_hook(lambda _, args, scales=scales: args[0] * scales)
        for site, scales in zip(anatomy.neurons_in, scales_in_dtype, strict=True)
    ]
    return lambda: [handle.remove() for handle in handles]


def resident(name: str) -> float:
    """`VmRSS`, the resident memory, or `VmHWM`, its peak since the last reset, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def peak_of(run: Callable[[], object]) -> float:
    """The peak of resident memory in MB while something runs, above what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


@torch.no_grad()
def measured(experts: int | None, tokens: int, rounds: int, dtype: str) -> dict[str, float]:
    """Seconds of the unsteered and the steered pass (medians), and peaks in MB."""
    model = model_of(experts, dtype)
    anatomy = Anatomy.of(model)
    steering = steering_of(anatomy)
    ids = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {"plain": [], "steered": []}
    for way in ("plain", "steered") * (rounds + 1):  # the first round warms up
        attached = attach_to_anatomy(anatomy, steering) if way == "steered" else None
        start = time.thread_time()
        model(ids, use_cache=False)
        seconds[way].append(time.thread_time() - start)
        if attached is not None:
            attached.detach()
    found = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    found["peak_unsteered"] = peak_of(lambda: model(ids, use_cache=False))
    detach = attach_to_anatomy(anatomy, steering).detach
    found["peak"] = peak_of(lambda: model(ids, use_cache=False))
    detach()
    remove = plain_hooks(anatomy, steering)
    found["peak_of_plain_hooks"] = peak_of(lambda: model(ids, use_cache=False))
    remove()
    return found


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    add_dtype(parser)
    given = parser.parse_args()
    sizes = (given.tokens, given.rounds, given.dtype)
    torch.set_num_threads(1)
    dense = measured(None, *sizes)
    print("| experts | steered / unsteered | / steered dense | peak MB | of plain hooks | unsteered |")
    print("|---|---:|---:|---:|---:|---:|")
    for experts in (None, *COUNTS):
        found = dense if experts is None else measured(experts, *sizes)
        print(
            f"| {experts or 'dense'} | {found['steered'] / found['plain']:.2f} "
            f"| {found['steered'] / dense['steered']:.2f} | {found['peak']:.1f} "
            f"| {found['peak_of_plain_hooks']:.1f} | {found['peak_unsteered']:.1f} |"
        )


if __name__ == "__main__":
    main()
