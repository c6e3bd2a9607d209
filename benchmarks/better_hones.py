"""Is there a better HONES? Variants of its neuron scores compared by captured effect and by joint masking.

    python benchmarks/better_hones.py --out leaderboards/scenes/methods --work runs/better_hones

HONES scores a neuron by what it writes along the answer's unembedding at the last prompt token, and keeps
what drops when a task head is replaced. The variants change one part each:

- `gradient direction`: the contribution is activation times gradient of the gold answer's log-probability,
  over all positions, in place of the projection on the unembedding at the last prompt token;
- `heads by log-probability`: the weights of the heads are exact drops of the answer's log-probability, in
  place of those of the metric;
- `group`: the best 200 neurons of attribution patching are masked together, and each is scored by how much
  the answer's log-probability recovers when it alone is restored;
- `single and group`: the mean of that and of the exact effect of masking the neuron alone.

The cells, the two measures and the table are those of `captured_effect.py`. Differences to HONES are paired
over the test images of all seeds.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captured_effect import CEILING, SHARES, ceiling_of, losses
from torch import Tensor

from hones_eval import api
from hones_eval.core.artifact import read_json, write_json, write_text
from hones_eval.core.hooks import editing
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import neuron_count, top_neurons
from hones_eval.engine.decoding import Decoder, repeat_example
from hones_eval.lmms.examples import Example
from hones_eval.methods.learning import Fold, TargetLosses
from hones_eval.methods.scaling import scaled_neurons
from hones_eval.reports.comparison import markdown_table
from hones_eval.toy import checkpoint_path
from hones_eval.toy.ground_truth import TASKS, load_ground_truth
from hones_eval.toy.yardstick import captured_effect

HONES = "hones"
HEADS = 8
CANDIDATES = 200


@contextmanager
def recorded(model: api.Model) -> Iterator[list[Tensor]]:
    """The inputs of every down projection [rows, tokens, I], in the order of the layers."""
    kept: list[Tensor] = []
    handles = [
        site.module.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
        for site in model.anatomy.neurons_in
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def replaced(model: api.Model) -> list[tuple[Any, Any]]:
    """Edits that replace head `r` in row `r` of a batch by the mean of the other heads of its layer."""
    shape = model.anatomy.shape

    def edit(layer: int) -> Any:
        def replace(x: Tensor) -> Tensor:
            split = x.unflatten(-1, (shape.heads, -1)).clone()
            for head in range(shape.heads):
                row = split[layer * shape.heads + head]
                row[:, head] = (row.sum(1) - row[:, head]) / (shape.heads - 1)
            return split.flatten(-2)

        return replace

    return [(model.anatomy.heads_in[layer], edit(layer)) for layer in range(shape.layers)]


def with_gradients(
    model: api.Model, inputs: dict[str, Any], target: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """Per layer the FFN activations [1, tokens, I] and the gradient of the target's log-probability."""

    def start(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    kept: list[Tensor] = []
    handles = [model.anatomy.layers[0].register_forward_pre_hook(start, with_kwargs=True)]
    handles += [
        site.module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        for site in model.anatomy.neurons_in
    ]
    try:
        logits = model.model(**inputs, use_cache=False).logits[0, -len(target) :].float()
        value = logits.log_softmax(-1)[range(len(target)), target].sum()
        gradients = torch.autograd.grad(value, kept)
    finally:
        for handle in handles:
            handle.remove()
    return [(z.detach(), gradient) for z, gradient in zip(kept, gradients, strict=True)]


def conditioned(model: api.Model, examples: list[Example]) -> Tensor:
    """Mean drops of gradient times activation [heads, L, I] when each head is replaced."""
    append = Decoder(model.replayer).append_answer
    edits, shape = replaced(model), model.anatomy.shape
    count = shape.layers * shape.heads
    total = torch.zeros(count, shape.layers, shape.neurons, dtype=torch.float64)
    for example in examples:
        inputs = append(example.inputs, example.settings, example.target_ids[:-1])
        with torch.enable_grad():
            found = with_gradients(model, inputs, example.target_ids)
        with torch.no_grad(), recorded(model) as rows, editing(edits):
            model.model(**repeat_example(inputs, count), use_cache=False)
        for layer, (z, gradient) in enumerate(found):
            total[:, layer] += ((z - rows[layer]) * gradient).sum(1).double()
    return total / len(examples)


def importance(drops: Tensor, weights: Tensor) -> Tensor:
    """HONES 2 for any drops [heads, L, I]: rectified, weighted by the positive scores of the best heads."""
    flat = weights.flatten().double().clamp(min=0)
    kept = flat.topk(HEADS).indices
    return torch.einsum("h,hli->li", flat[kept], drops[kept].clamp(min=0)) / flat[kept].sum()


def group_effects(
    model: api.Model, task: str, ranking: Ranking, count: int, offset: int
) -> tuple[Tensor, Tensor]:
    """Scores [L, I] of the best neurons: the rise of the loss when masked alone, and in the group."""
    assert ranking.neuron_scores is not None
    bank = top_neurons(ranking.neuron_scores, CANDIDATES)
    whole = scaled_neurons(ranking, bank, 0.0, {})
    banks = {"all": whole}
    for place, neuron in enumerate(bank):
        banks[f"alone {place}"] = scaled_neurons(ranking, [neuron], 0.0, {})
        others = [other for other in bank if other != neuron]
        banks[f"restored {place}"] = scaled_neurons(ranking, others, 0.0, {})
    examples = model.examples(f"scenes_{task}_discovery", limit=count, offset=offset)
    pass_ = TargetLosses(model.replayer, [Fold(banks, range(count))])
    with torch.inference_mode():
        total = torch.stack([pass_.measure(examples[index]).sums["losses"] for index in range(count)]).mean(0)
    by_name = dict(zip(banks, total[1:].tolist(), strict=True))
    alone, group = torch.zeros_like(ranking.neuron_scores), torch.zeros_like(ranking.neuron_scores)
    for place, neuron in enumerate(bank):
        alone[neuron] = by_name[f"alone {place}"] - float(total[0])
        group[neuron] = by_name["all"] - by_name[f"restored {place}"]
    return alone, group


def variants(model: api.Model, task: str, seed: int, given: argparse.Namespace, after: int) -> dict[str, Any]:
    """Scores [L, I] by name, and one ranking of the model."""
    offset = after + seed * given.examples
    name, cut = f"scenes_{task}_discovery", {"limit": given.examples, "offset": offset}
    hones = api.rank(model, name, method="hones", heads=HEADS, seed=seed, **cut)
    atp = api.rank(model, name, method="atp", heads=HEADS, seed=seed, **cut)
    part = model.examples(name, **cut)
    drops = conditioned(model, [part[index] for index in range(len(part))])
    alone, group = group_effects(model, task, atp, given.examples, offset)
    assert hones.head_scores is not None
    assert hones.head_log_probability is not None
    scores = {
        HONES: hones.neuron_scores,
        "gradient direction": importance(drops, hones.head_scores),
        "gradient direction, heads by log-probability": importance(drops, hones.head_log_probability),
        "atp": atp.neuron_scores,
        "single": alone,
        "group": group,
        "single and group": alone / alone.max() + group / group.max(),
    }
    return {"scores": scores, "ranking": hones}


def cell(model: api.Model, task: str, seed: int, given: argparse.Namespace, truth: Any) -> None:
    """Measure one task and seed, unless its file is there."""
    path = given.work / f"{task}-{seed}.json"
    if path.is_file():
        return
    started = time.process_time()
    effects = truth.effects[task]["neurons"]
    k = neuron_count(effects.log_probability, 0.01)
    found = variants(model, task, seed, given, truth.report["tasks"][task]["examples"])
    ceiling = ceiling_of(effects, k)
    counts = [neuron_count(effects.log_probability, share) for share in SHARES]
    banks = {
        f"{name} {count}": scaled_neurons(found["ranking"], top_neurons(scores.float(), count), 0.0, {})
        for name, scores in found["scores"].items()
        for count in counts
    }
    measured = losses(model, task, seed, given.test, banks)
    rises = (measured[:, 1:] - measured[:, :1]).reshape(given.test, len(found["scores"]), len(counts))
    places = np.log(counts)
    areas = np.trapezoid(rises, places, axis=2) / (places[-1] - places[0])
    reliable = ceiling is not None and ceiling >= CEILING
    captured = {
        name: captured_effect(scores.float(), effects.log_probability, k).share if reliable else None
        for name, scores in found["scores"].items()
    }
    write_json(
        path,
        {
            "task": task,
            "seed": seed,
            "examples": given.examples,
            "names": list(found["scores"]),
            "captured": captured,
            "areas_by_image": areas.tolist(),
            "cpu_seconds": time.process_time() - started,
        },
    )
    print(f"{task} seed {seed}: {time.process_time() - started:.0f} s", flush=True)


def write(given: argparse.Namespace) -> None:
    """Write `better_hones.md` and `better_hones.json` of all cells that are done."""
    cells = [read_json(path) for path in given.work.glob("*.json")]
    cells.sort(key=lambda found: (TASKS.index(found["task"]), found["seed"]))
    if not cells:
        return
    rows = []
    drawn = np.random.default_rng(0)
    for name in cells[0]["names"]:
        row: dict[str, Any] = {"scores": name}
        for task in dict.fromkeys(found["task"] for found in cells):
            own = [found for found in cells if found["task"] == task]
            captured = [found["captured"][name] for found in own if found["captured"][name] is not None]
            if captured:
                row[f"{task}: captured"] = f"{np.mean(captured):.2f}"
            place = own[0]["names"].index(name)
            areas = np.concatenate([np.array(found["areas_by_image"]) for found in own])
            row[f"{task}: area"] = f"{areas[:, place].mean():.2f}"
            if name != HONES:
                differences = areas[:, place] - areas[:, 0]
                means = differences[drawn.integers(len(differences), size=(4000, len(differences)))].mean(1)
                low, high = np.quantile(means, [0.025, 0.975])
                row[f"{task}: area minus HONES"] = f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    hours = sum(found["cpu_seconds"] for found in cells) / 3600
    parts = [
        "# Is there a better HONES?\n",
        "Made by `python benchmarks/better_hones.py --out leaderboards/scenes/methods --work "
        f"runs/better_hones`: {len(cells)} cells of task and seed, {cells[0]['examples']} discovery images "
        f"each, {hours:.2f} CPU hours. `captured` is the share of the largest possible sum of single-neuron "
        "effects that the best 1 % have. `area` is the mean rise of the gold answer's loss over the masking "
        "curve, 0.25 % to 10 %; its difference to HONES has a 95 % bootstrap interval, paired over images.\n",
        markdown_table([{column: row.get(column, "") for column in columns} for row in rows]),
    ]
    write_text(given.out / "better_hones.md", "\n".join(parts))
    write_json(given.out / "better_hones.json", {"cells": cells})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/scenes/methods"))
    parser.add_argument("--work", type=Path, default=Path("runs/better_hones"))
    parser.add_argument("--examples", type=int, default=16, help="to rank on, per seed")
    parser.add_argument("--test", type=int, default=40, help="to mask on, per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=["vqa_relation", "vqa_attribute"], choices=TASKS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = api.load("llava_hf", f"pretrained={checkpoint_path()}")
    for weight in model.model.parameters():
        weight.requires_grad_(False)
    truth = load_ground_truth()
    for seed in range(given.seeds):
        for task in given.tasks:
            cell(model, task, seed, given, truth)
            write(given)


if __name__ == "__main__":
    main()
