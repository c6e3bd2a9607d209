"""`rank --budget` on 270 sites: how often the top equals the exact one, on what share of the work.

The embedded model has 48 heads. So the sites are its heads and 222 neurons: 111 with the largest known
effects, and 111 drawn at random. Every site is measured once on every example, with the estimate by its
gradient; the screen and the elimination that `rank --budget` runs are then replayed on that, over many seeds.
A trial draws the order of the examples, and so the examples that the screen sees. Usage:

    python benchmarks/budget.py --kept FOLDER [--tasks vqa_relation vqa_attribute ocr] [--examples 500]
                                [--budgets 0.05 0.1] [--tops 4 8] [--seeds 100]
"""

import argparse
from pathlib import Path

import torch
from racing import localization
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from hones_eval.core.sites import Neuron, all_heads
from hones_eval.engine.passes import SiteEdit, replaced_by_mean
from hones_eval.methods.attribution import Attribution
from hones_eval.methods.head_search import GRADIENT_EXAMPLES, planned
from hones_eval.methods.raced import LOOK
from hones_eval.runs.ablation import Ablation
from hones_eval.runs.elimination import Elimination
from hones_eval.toy.ground_truth import load_ground_truth

SITES, LEVEL = 270, 0.05


@torch.no_grad()
def measured(task: str, count: int, kept: Path) -> dict[str, Tensor]:
    """Drops of the metric, and absolute estimates of the screen, of every site on every example."""
    path = kept / f"{task}-{count}.safetensors"
    if path.is_file():
        return load_file(path)
    heads_only = localization(task, count)
    heads = all_heads(heads_only.replayer.anatomy.shape)
    truth = load_ground_truth().effects[task]["neurons"].log_probability
    half = (SITES - len(heads)) // 2
    best = truth.abs().flatten().argsort(descending=True)[:half].tolist()
    order = torch.randperm(truth.numel(), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [number for number in order if number not in set(best)][:half]
    neurons = sorted(Neuron(*divmod(number, truth.shape[1])) for number in best + drawn)
    edits = [*replaced_by_mean(heads), *(SiteEdit(neuron, "mask") for neuron in neurons)]
    ablation = Ablation(heads_only.replayer, heads_only.examples, edits)
    anatomy = heads_only.replayer.anatomy
    attribution = Attribution(anatomy, ablation.decoder.append_answer, kinds=("heads", "neurons"))
    rows: dict[str, list[Tensor]] = {"metric": [], "absolute": []}
    for index in tqdm(range(count), desc=f"{task}, every site on every example"):
        rows["metric"].append(ablation.measure(heads_only.examples[index]).sums["metric_drop"])
        sums = attribution.measure(heads_only.examples[index]).sums
        by_head, by_neuron = ([sums[kind][site] for site in sites] for kind, sites in _kinds(heads, neurons))
        rows["absolute"].append(torch.stack([*by_head, *by_neuron]).double())
    found = {name: torch.stack(values).contiguous() for name, values in rows.items()}
    kept.mkdir(parents=True, exist_ok=True)
    save_file(found, path)
    return found


def _kinds(heads: list, neurons: list) -> list:
    return [("heads", heads), ("neurons", neurons)]


def trial(truth: dict[str, Tensor], keep: int, budget: float, seed: int) -> tuple[float, bool, float | None]:
    """The share of the work, whether the top is the exact one, and the risk that the run states."""
    drops, estimates = truth["metric"], truth["absolute"]
    examples, sites = drops.shape
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    kept, cuts = planned(sites, keep, examples, int(budget * sites * examples))
    screened = estimates[order[:GRADIENT_EXAMPLES]].mean(0)
    left = screened.topk(kept).indices.sort().values
    elimination = Elimination(kept, keep, examples, cuts, hints=screened[left])
    for start in range(0, examples, LOOK):
        rows = drops[order[start : start + LOOK]][:, left]
        elimination.add(rows[:, elimination.in_play])
        elimination.look()
    exact = drops.sum(0)
    chosen = left[elimination.place == 1]
    right = bool((exact[chosen] >= exact.topk(keep).values[-1] - 1e-9).all())
    return float(elimination.seen.sum()) / drops.numel(), right, elimination.risk()


def main(given: argparse.Namespace) -> None:
    print(
        "| task | top | border | budget | work | top as exact | median stated risk | wrong at a risk <= 5 % |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for task in given.tasks:
        truth = measured(task, given.examples, given.kept)
        best = truth["metric"].mean(0).sort(descending=True).values
        for keep in given.tops:
            for budget in given.budgets:
                runs = [trial(truth, keep, budget, seed) for seed in range(given.seeds)]
                risks = sorted(1.0 if risk is None else risk for _, _, risk in runs)
                sure = [right for _, right, risk in runs if risk is not None and risk <= LEVEL]
                print(
                    f"| {task} | {keep} | {best[keep - 1]:.3f} / {best[keep]:.3f} | {budget:.0%} | "
                    f"{sum(share for share, _, _ in runs) / len(runs):.1%} | "
                    f"{sum(right for _, right, _ in runs)} of {len(runs)} | {risks[len(risks) // 2]:.2g} | "
                    f"{len(sure) - sum(sure)} of {len(sure)} |",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["vqa_relation", "vqa_attribute", "ocr"])
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--tops", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--kept", type=Path, required=True, help="a folder to keep the exact drops in")
    torch.set_num_threads(1)
    main(parser.parse_args())
