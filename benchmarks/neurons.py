"""Neuron attribution beside plain loops that run one full forward for each example and each head.

One plain loop reads z where `down_proj` receives it; the other runs the FFN's gate and up projections a
second time in a hook on the FFN, as the code released with HONES does. All three run in this process, on one
thread, over the same examples of the same model; printed are ratios of this thread's time, which other work
on the machine disturbs less than wall time, and the largest differences. Usage:

    python benchmarks/neurons.py [--examples 16] [--heads 10] [--repeats 3] [--dtype float32]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from plain_loop import TokenExample, add_dtype, examples_for, small_llava
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head
from hones_eval.engine.replay import Replayer
from hones_eval.methods.hones import NeuronAttribution
from hones_eval.runs.lightning import SumOverRanks
from hones_eval.runs.measure import Totals

LAYERS, HEADS, HIDDEN = 8, 8, 256
Hook = Callable[[Any, int, dict[int, Tensor]], Any]


def read_once(layer: Any, number: int, kept: dict[int, Tensor]) -> Any:
    """Keep the last token's input of `down_proj`."""

    def keep(_: Any, args: tuple[Tensor]) -> None:
        kept[number] = args[0][0, -1]

    return layer.mlp.down_proj.register_forward_pre_hook(keep)


def run_twice(layer: Any, number: int, kept: dict[int, Tensor]) -> Any:
    """Compute the activation again from the FFN's input."""

    def keep(ffn: Any, args: tuple[Tensor]) -> None:
        kept[number] = (ffn.act_fn(ffn.gate_proj(args[0])) * ffn.up_proj(args[0]))[0, -1]

    return layer.mlp.register_forward_pre_hook(keep)


def plain_contributions(model: Any, example: TokenExample, hook: Hook, head: Head | None) -> Tensor:
    """`z * <W_down, u_y>` [L, I] at the last prompt token, by one full forward."""
    layers, kept = model.get_decoder().layers, dict[int, Tensor]()
    handles = [hook(layer, number, kept) for number, layer in enumerate(layers)]
    if head is not None:

        def replace(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].unflatten(-1, (HEADS, -1)).clone()
            x[:, :, head.head] = (x.sum(2) - x[:, :, head.head]) / (HEADS - 1)
            return (x.flatten(2),)

        handles.append(layers[head.layer].self_attn.o_proj.register_forward_pre_hook(replace))
    try:
        model(**example.inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    direction = model.lm_head.weight[example.target_ids].float().sum(0)
    direction = direction / direction.norm()
    return torch.stack(
        [
            kept[i].float() * (layer.mlp.down_proj.weight.float().T @ direction)
            for i, layer in enumerate(layers)
        ]
    )


def plain(model: Any, examples: list[TokenExample], hook: Hook, weights: dict[Head, float]) -> Tensor:
    """Importance [L, I] from the formula (HONES 2)."""
    base = sum(plain_contributions(model, e, hook, None) for e in examples) / len(examples)
    total = torch.zeros_like(base)
    for head, weight in weights.items():
        edited = sum(plain_contributions(model, e, hook, head) for e in examples) / len(examples)
        total += weight * (base - edited).clamp(min=0)
    return total / sum(weights.values())


def ours(anatomy: Anatomy, examples: list[TokenExample], weights: dict[Head, float]) -> Tensor:
    """The same by the package's pass, with the sums that the loop keeps; its proof of replay included."""
    attribution = NeuronAttribution(Replayer(anatomy), list(weights))
    sums = SumOverRanks(attribution.zeros())
    for example in examples:
        sums.update(attribution.measure(example).sums)  # type: ignore[arg-type]
    return attribution.importance(Totals(sums.compute(), {}), torch.tensor(list(weights.values())))


@torch.no_grad()
def main(count: int, heads: int, repeats: int, dtype: str) -> None:
    """Warm up once; then `repeats` rounds, the three in turn, and the best time of each."""
    model = small_llava(layers=LAYERS, heads=HEADS, hidden=HIDDEN, image_side=168, spread=0.05, dtype=dtype)
    examples = examples_for(model, count, new_tokens=1, target_tokens=3)
    places = torch.linspace(0, LAYERS * HEADS - 1, heads).round().int().tolist()  # evenly from bottom to top
    weights = {Head(*divmod(place, HEADS)): 1 / (1 + rank) for rank, place in enumerate(places)}
    anatomy = Anatomy.of(model)
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(anatomy, examples, weights),
        "plain loop, z read once": lambda: plain(model, examples, read_once, weights),
        "plain loop, FFN run twice": lambda: plain(model, examples, run_twice, weights),
    }
    found = {name: way() for name, way in ways.items()}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.thread_time()
            way()
            best[name] = min(best[name], time.thread_time() - start)
    depth = sum(head.layer for head in weights) / len(weights)
    print(
        f"{count} examples of {examples[0].inputs['input_ids'].shape[1]} tokens; {LAYERS} layers, "
        f"{HEADS} heads, hidden {HIDDEN}; {len(weights)} heads, mean layer {depth:.1f}; best of {repeats}"
    )
    for name, seconds in best.items():
        worst = float((found[name] - found["ours"]).abs().max())
        print(
            f"{name}: {seconds:.2f} s, {seconds / best['ours']:.2f}x ours; largest difference {worst:.1e} "
            f"(largest importance {float(found[name].max()):.2g})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    add_dtype(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.examples, arguments.heads, arguments.repeats, arguments.dtype)
