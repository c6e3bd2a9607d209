"""Screening on the embedded model: how many of the best heads first-order estimates leave to be measured.

Every head is measured on every example, and estimated by one backward pass an example (`rank --screen
first_order`). Recall: the share of the exact top that is among the best share of the estimates, where heads
that tie at the top's border stand in for each other. Usage:

    python benchmarks/screening.py [--examples 100] [--tasks vqa_relation ...]
"""

import argparse
import time

import torch
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.attribution import Attribution
from hones_eval.methods.localization import HeadLocalization
from hones_eval.runs.lightning import Loop
from hones_eval.toy import checkpoint_path
from hones_eval.toy.ground_truth import TASKS

SHARES = (0.125, 0.25, 0.5)


def recall(exact: Tensor, estimates: Tensor, keep: int, share: float) -> float:
    """The share of the top `keep` of `exact` that is among the best `share` of `estimates`."""
    exact, estimates = exact.flatten(), estimates.flatten()
    left = torch.zeros(len(exact), dtype=torch.bool)
    left[estimates.topk(round(share * len(exact))).indices] = True
    border = exact.topk(keep).values[-1]
    above, ties = exact > border, exact == border
    free = keep - int(above.sum())
    return (int((above & left).sum()) + min(free, int((ties & left).sum()))) / keep


def run(task: str, count: int, keeps: list[int]) -> None:
    lmm = load_lmm("llava_hf", f"pretrained={checkpoint_path()}", device="cpu")
    anatomy = Anatomy.of(inner_model(lmm))
    examples = TaskExamples(lmm, f"scenes_{task}_discovery", model_name="llava_hf", limit=count)
    localization, loop = HeadLocalization(Replayer(anatomy), examples), Loop("cpu", progress=False)
    start = time.perf_counter()
    exact = localization.scores(loop.run(examples, localization, "heads"))
    middle = time.perf_counter()
    attribution = Attribution(anatomy, localization.decoder.append_answer)
    estimates = Attribution.scores(loop.run(examples, attribution, "screen"))
    part = (time.perf_counter() - middle) / (middle - start)
    for keep in keeps:
        cells = " | ".join(f"{recall(exact, estimates, keep, share):.2f}" for share in SHARES)
        print(f"| {task} | {examples.metric} | {keep} | {cells} | {part:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--examples", type=int, default=100, help="of each task's discovery split")
    parser.add_argument("--tops", type=int, nargs="+", default=[4, 8])
    given = parser.parse_args()
    torch.set_num_threads(1)
    columns = " | ".join(f"recall at {share:.1%}" for share in SHARES)
    print(f"| task | metric | top | {columns} | time of the screen, of the exact run's |")
    print("|---|---|---:|" + "---:|" * (len(SHARES) + 1))
    for name in given.tasks:
        run(name, given.examples, given.tops)
