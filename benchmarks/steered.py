"""What a steering costs at run time: baseline, hooked and folded generations, interleaved.

One process, one thread, the same prompts; printed are medians and their ratios to the baseline. Usage:

    python benchmarks/steered.py [--generations 200]
"""

import argparse
import statistics
import time

import torch
from localization import answer, examples_for, small_llava

from hones_eval.anatomy import Anatomy
from hones_eval.artefact import Provenance
from hones_eval.sites import neuron_count
from hones_eval.steer_model import attach_to
from hones_eval.steering import Steering

WAYS = ("baseline", "hook", "fold")


@torch.no_grad()
def run(generations: int) -> None:
    """One percent of the neurons times 1.5, and one head of every layer halved."""
    model = small_llava(layers=6, heads=8, hidden=128, image_side=56, spread=0.02)
    anatomy = Anatomy.of(model)
    shape = anatomy.shape
    neuron_scales = torch.ones(shape.layers, shape.neurons)
    order = torch.randperm(neuron_scales.numel(), generator=torch.Generator().manual_seed(0))
    neuron_scales.view(-1)[order[: neuron_count(neuron_scales, 0.01)]] = 1.5
    head_scales = torch.ones(shape.layers, shape.heads)
    head_scales[:, 0] = 0.5
    steering = Steering(head_scales, neuron_scales, Provenance("small", None, shape, "hones", {}, []))
    example = examples_for(model, 1, new_tokens=14, target_tokens=1)[0]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(generations + 5):
        for way in WAYS:
            attached = None if way == "baseline" else attach_to(anatomy, steering, way)  # type: ignore[arg-type]
            answer(model, example)  # not timed: attaching has just touched weights and hooks
            start = time.perf_counter()
            answer(model, example)
            seconds[way].append(time.perf_counter() - start)
            if attached is not None:
                attached.detach()
    medians = {way: statistics.median(times[5:]) for way, times in seconds.items()}
    print(f"{generations} generations of up to 14 tokens each, baseline {medians['baseline'] * 1e3:.1f} ms")
    for way in WAYS[1:]:
        print(f"  {way}: {medians[way] / medians['baseline']:.3f} times the baseline")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=200)
    torch.set_num_threads(1)
    run(parser.parse_args().generations)
