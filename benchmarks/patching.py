"""The token-wise patching map beside a plain loop: one token, one layer, one full forward with hooks.

Both run in this process, on one thread, over the same pairs of the same model; printed are the ratio of wall
times and the largest difference of the answer's logit. Usage:

    python benchmarks/patching.py [--pairs 3] [--text 20] [--pretrained FOLDER] [--dtype float32]

Without --pretrained the model is a LLaVA of the embedded model's shape with random weights: 6 layers, hidden
128, 8 heads, 16 image tokens.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from plain_loop import DTYPES, add_dtype, small_llava
from torch import Tensor
from transformers import AutoModelForImageTextToText

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.patching import Patch, Patcher
from hones_eval.engine.tokens import positions

Inputs = dict[str, Tensor]
Part = Literal["attention", "ffn"]


def pairs_for(model: Any, count: int, text: int) -> list[tuple[Inputs, Inputs]]:
    """Prompts of two random images and the same random words."""
    config = model.config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(20, config.text_config.vocab_size, (1, text), generator=generator)
        words[words == config.image_token_id] = 10
        ids = torch.cat([torch.full((1, patches), config.image_token_id), words], dim=1)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        side = config.vision_config.image_size
        clean, edited = torch.randn(2, 1, 3, side, side, generator=generator).to(model.dtype)
        made.append((prompt | {"pixel_values": clean}, prompt | {"pixel_values": edited}))
    return made


@torch.no_grad()
def fast(
    patcher: Patcher, part: Part, clean: Inputs, edited: Inputs, cells: Sequence[tuple[int, int]]
) -> Tensor:
    """The last position's logits [cells, vocabulary] by rows of replayed batches."""
    patches = patcher.record(clean, edited)
    found: list[Tensor | None] = [None] * len(cells)
    for rows in patches.patched([Patch(part, layer, (at,), (at,)) for at, layer in cells]):
        for place, logits in zip(rows.places, rows.logits, strict=True):
            found[place] = logits
    return torch.stack([match for match in found if match is not None])


@torch.no_grad()
def plain(model: Any, part: Part, clean: Inputs, edited: Inputs, cells: Sequence[tuple[int, int]]) -> Tensor:
    """The same by one forward a cell, as in V-SEAM's code."""
    layers = model.get_decoder().layers
    modules = [layer.self_attn if part == "attention" else layer.mlp for layer in layers]
    kept: dict[int, Tensor] = {}

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def keep(layer: int) -> Any:
        return lambda module, args, output: kept.update({layer: first(output)})

    handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
    model(**clean, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for at, layer in cells:

        def patch(module: Any, args: Any, output: Any, at: int = at, layer: int = layer) -> Any:
            changed = first(output).clone()
            changed[:, at] = kept[layer][:, at]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = modules[layer].register_forward_hook(patch)
        found.append(model(**edited, use_cache=False).logits[0, -1])
        handle.remove()
    return torch.stack(found)


def compare(model: Any, part: Part, count: int, text: int) -> None:
    """Warm both up on the first pair, then time one run of each over all pairs."""
    anatomy = Anatomy.of(model)
    patcher = Patcher(anatomy)
    work = []
    for clean, edited in pairs_for(model, count, text):
        places = positions(anatomy, edited)[1].tolist()
        work.append((clean, edited, [(at, layer) for at in places for layer in range(anatomy.shape.layers)]))
    fast(patcher, part, *work[0])
    plain(model, part, *work[0][:2], work[0][2][:6])
    start = time.perf_counter()
    found = [fast(patcher, part, *item) for item in work]
    middle = time.perf_counter()
    expected = [plain(model, part, *item) for item in work]
    end = time.perf_counter()
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    effect = max(float((b - b.mean(0)).abs().max()) for b in expected)
    print(
        f"{part}: {count} pairs of {len(work[0][2])} cells, plain loop {end - middle:.2f} s, ours "
        f"{middle - start:.2f} s, ratio {(end - middle) / (middle - start):.2f}; replay "
        f"{patcher.inexact or 'exact'}; largest difference of logits {worst:.1e} (effects up to {effect:.1f})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--text", type=int, default=20)
    parser.add_argument("--pretrained")
    add_dtype(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.pretrained:
        chosen = AutoModelForImageTextToText.from_pretrained(arguments.pretrained).eval()
    else:
        chosen = small_llava(layers=6, heads=8, hidden=128, image_side=56, spread=0.05)
    chosen = chosen.to(DTYPES[arguments.dtype])
    for name in ("attention", "ffn"):
        compare(chosen, name, arguments.pairs, arguments.text)
