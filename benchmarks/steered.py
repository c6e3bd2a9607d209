"""What a steering costs at run time: baseline, hooked and folded generations, interleaved.

One process, one thread, the same prompts, timed by the thread's CPU time. A round has one generation of each
kind in random order; printed are the medians over rounds of the ratio to the same round's baseline, with 95 %
intervals by bootstrap over rounds. `baseline again` shows the noise, and `bare hook`, hooks that multiply and
check nothing, what any hook costs. `scope=` are hooks that act on some tokens only. `condition` are hooks
that act if a condition holds, as it always does here: one is read before the first steered layer, one in
the middle, which takes half a pass over the prompt of its own. `shift` are hooks that scale and add. `(IA)^3`
is the same steering exported as an adapter and run by PEFT. Usage:

    python benchmarks/steered.py [--generations 200] [--profile] [--dtype float32]
"""

import argparse
import cProfile
import pstats
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from plain_loop import Clock, add_dtype, answer, examples_for, small_llava

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.attach import attach_to_anatomy
from hones_eval.core.changes import site_changes
from hones_eval.core.condition import Condition
from hones_eval.core.export import export_ia3
from hones_eval.core.sites import neuron_count
from hones_eval.core.steering import Steering

SCOPES = ("scope=image", "scope=last+generated", "scope=generated")
CONDITIONS = {"condition, first layer": 0, "condition, middle layer": 3}
OTHERS = ("shift", "(IA)^3 in PEFT")
WAYS = ("baseline", "baseline again", "hook", "bare hook", "fold", *SCOPES, *CONDITIONS, *OTHERS)
WARM_UP, RESAMPLES = 5, 10_000


def steering_of(anatomy: Anatomy) -> Steering:
    """One percent of the neurons times 1.5, and one head of every layer halved."""
    shape = anatomy.shape
    neuron_scales = torch.ones(shape.layers, shape.neurons)
    order = torch.randperm(neuron_scales.numel(), generator=torch.Generator().manual_seed(0))
    neuron_scales.view(-1)[order[: neuron_count(neuron_scales, 0.01)]] = 1.5
    head_scales = torch.ones(shape.layers, shape.heads)
    head_scales[:, 0] = 0.5
    return Steering(head_scales, neuron_scales, Provenance("small", None, shape, "hones", {}, []))


def attach(anatomy: Anatomy, steering: Steering, way: str) -> Callable[[], object]:
    """Steer in one of the ways; what is given back takes it off."""
    if way in ("hook", "fold"):
        return attach_to_anatomy(anatomy, steering, way).detach  # type: ignore[arg-type]
    if way in SCOPES:
        scope = way.removeprefix("scope=")
        return attach_to_anatomy(anatomy, steering, scope=scope).detach
    if way in CONDITIONS:
        source = Provenance("small", None, anatomy.shape, "condition", {}, [])
        condition = Condition(CONDITIONS[way], torch.ones(anatomy.shape.hidden), -1e9, source)
        return attach_to_anatomy(anatomy, steering, condition=condition).detach
    if way == "shift":
        shifts = 0.01 * (steering.neuron_scales != 1)
        return attach_to_anatomy(anatomy, replace(steering, neuron_shifts=shifts)).detach
    if way == "(IA)^3 in PEFT":
        return adapted(anatomy, steering)
    changes = site_changes(anatomy, steering) if way == "bare hook" else []
    sites = [(site, scales.to(anatomy.model.dtype)) for site, scales, _ in changes]
    handles = [
        site.module.register_forward_pre_hook(lambda _, args, scales=scales: args[0] * scales)
        for site, scales in sites
    ]
    return lambda: [handle.remove() for handle in handles]


def adapted(anatomy: Anatomy, steering: Steering) -> Callable[[], object]:
    """Load the steering into the model as an (IA)^3 adapter of PEFT; what is given back takes it off."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        export_ia3(anatomy.model, steering, Path(folder))
        return PeftModel.from_pretrained(anatomy.model, folder).unload


@torch.no_grad()
def run(generations: int, profiled: bool, dtype: str) -> None:
    """A LLaVA of 6 layers, 8 heads, hidden 128; 16 image tokens, answers of up to 14."""
    model = small_llava(layers=6, heads=8, hidden=128, image_side=56, spread=0.02, dtype=dtype)
    anatomy = Anatomy.of(model)
    steering = steering_of(anatomy)
    example = examples_for(model, 1, new_tokens=14, target_tokens=1)[0]
    drawn = random.Random(0)
    rounds = []
    for _ in range(WARM_UP + generations):
        clock = Clock()
        for way in drawn.sample(WAYS, len(WAYS)):
            detach = attach(anatomy, steering, way)
            answer(model, example)  # not timed: attaching has just touched weights and hooks
            with clock(way):
                answer(model, example)
            detach()
        rounds.append([clock.seconds[way] for way in WAYS])
    seconds = np.array(rounds[WARM_UP:])
    print(
        f"{generations} generations of up to 14 tokens each, baseline {np.median(seconds[:, 0]) * 1e3:.1f} ms"
    )
    for way, ratios in zip(WAYS[1:], (seconds[:, 1:] / seconds[:, :1]).T, strict=True):
        low, high = interval(ratios)
        print(f"  {way}: {np.median(ratios):.3f} [{low:.3f}, {high:.3f}] times the baseline")
    if profiled:
        attach_to_anatomy(anatomy, steering, "hook")
        with cProfile.Profile() as profile:
            for _ in range(10):
                answer(model, example)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % of the medians of resampled rounds."""
    drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--profile", action="store_true", help="show where a hooked generation's time goes")
    add_dtype(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run(given.generations, given.profile, given.dtype)
