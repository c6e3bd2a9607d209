"""Racing on the embedded model: how often the top equals the exact one, and how much is saved.

Every head's drop on every example is measured once; races are then replayed on those drops by the very code
that `rank --race` runs, over many seeds, sizes and tops. `--timed` also runs one race for real beside the
exact run, and `--coverage` races near ties that chance could mislead. Usage:

    python benchmarks/racing.py [--tasks vqa_relation ocr] [--examples 5000] [--kept FOLDER] [--timed 1000]
                                [--coverage 500]
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from hones_eval.choices import Bound
from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.head_search import Savings, localize
from hones_eval.methods.localization import HeadLocalization
from hones_eval.methods.raced import LOOK
from hones_eval.runs.lightning import Loop
from hones_eval.runs.racing import Race
from hones_eval.toy import checkpoint_path, scenes

SCENES = Path(__file__).resolve().parent.parent / "tasks" / "scenes"
SEEDS, DELTA = 20, 0.05
YAML = """\
include: {template}
task: racing_{task}
dataset_name: {task}-plain-{count}
dataset_kwargs:
  data_files:
    discovery: {stub}
test_split: discovery
"""


class Outcome(NamedTuple):
    """Of one race: the share of head-examples that were measured, and whether the top is the exact one."""

    share: float
    right: bool
    undecided: int


def localization(task: str, count: int) -> HeadLocalization:
    """Of the embedded model on a scenes task's first discovery examples, more of them than the tasks ship."""
    scenes.SPLIT_SIZE["discovery"] = max(count, scenes.SPLIT_SIZE["discovery"])
    lmm = load_lmm("llava_hf", f"pretrained={checkpoint_path()}", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        template = SCENES / f"template_{task.split('_')[0]}.yaml"
        text = YAML.format(template=template, task=task, count=count, stub=SCENES / "stub.json")
        Path(folder, f"racing_{task}.yaml").write_text(text, encoding="utf-8")
        examples = TaskExamples(lmm, f"racing_{task}", model_name="llava_hf", include_path=folder)
    return HeadLocalization(Replayer(Anatomy.of(inner_model(lmm))), examples)


def exact_drops(task: str, count: int, kept: Path | None) -> Tensor:
    """Every head's drop of the metric on every example [examples, heads], from a file where it is kept."""
    path = None if kept is None else kept / f"{task}-{count}.safetensors"
    if path is not None and path.is_file():
        return load_file(path)["drops"]
    measured = localization(task, count)
    rows = [
        measured.measure(measured.examples[i]).sums["metric_drop"]
        for i in tqdm(range(count), desc=f"{task}, every head on every example")
    ]
    drops = torch.stack(rows)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"drops": drops}, path)
    return drops


def raced(drops: Tensor, keep: int, seed: int, bound: Bound = "betting", delta: float = DELTA) -> Outcome:
    """One race on known drops."""
    examples, heads = drops.shape
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    race = Race(heads, keep, examples, delta, bound=bound)
    for start in range(0, examples, LOOK):
        if race.finished:
            break
        race.add(drops[order[start : start + LOOK]][:, race.in_play])
        race.look()
    exact = drops.sum(0)
    border = exact.topk(keep).values[-1]
    right = bool((exact[race.place == 1] >= border - 1e-9).all())
    return Outcome(float(race.seen.sum()) / drops.numel(), right, len(race.undecided))


def table(task: str, drops: Tensor, tops: Sequence[int]) -> None:
    """Print a row for every size, top and bound."""
    sizes = [size for size in (500, 1000, 2000, 5000) if size <= len(drops)]
    for size in sizes or [len(drops)]:
        for keep in tops:
            best = drops[:size].mean(0).sort(descending=True).values
            for bound in ("betting", "bernstein"):
                found = [raced(drops[:size], keep, seed, bound) for seed in range(SEEDS)]  # type: ignore[arg-type]
                saved = sorted(1 / race.share for race in found)
                print(
                    f"| {task} | {size} | {keep} | {best[keep - 1]:.3f} / {best[keep]:.3f} | {bound} | "
                    f"{sum(match.right for match in found)} of {SEEDS} | "
                    f"{SEEDS / sum(race.share for race in found):.1f} ({saved[0]:.1f} to {saved[-1]:.1f}) | "
                    f"{sum(match.undecided for match in found) / SEEDS:.1f} |",
                    flush=True,
                )


def timed(task: str, count: int, keep: int) -> None:
    """One race through the loop that `rank` runs, beside every head on every example."""
    measured = localization(task, count)
    measured.measure(measured.examples[0])  # warm up, and prove replay
    seconds, tops = [], []
    for savings in (Savings(), Savings(race=DELTA)):
        localized = HeadLocalization(measured.replayer, measured.examples)
        start = time.perf_counter()
        located = localize(localized, Loop("cpu", progress=False), keep, savings, seed=0)
        seconds.append(time.perf_counter() - start)
        tops.append(set(located.top(keep)))
    report = located.report["race"]
    print(
        f"{task}, {count} examples, top {keep}: exact {seconds[0]:.1f} s, raced {seconds[1]:.1f} s, "
        f"ratio {seconds[0] / seconds[1]:.2f}; head-examples measured 1 in "
        f"{1 / (1 - report['work_saved']):.2f}, examples run {report['examples_run']}; "
        f"same top: {tops[0] == tops[1]}"
    )


def coverage(races: int) -> None:
    """How often a race errs on right/wrong answers with nearly a tie at the border."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([0.3, 0.2, 0.115, 0.11, 0.105, 0.1, 0.095, 0.09, 0.02, 0.01, 0.0, 0.0])
    for bound in ("betting", "bernstein"):
        for delta in (0.5, 0.2, 0.05):
            wrong, share = 0, 0.0
            for seed in range(races):
                drops = (torch.rand(300, 12, generator=generator) < means).double()
                one = raced(drops, 4, seed, bound, delta)  # type: ignore[arg-type]
                wrong, share = wrong + (not one.right), share + one.share / races
            print(f"coverage, {bound}, delta {delta}: {wrong} of {races} wrong, work {share:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=["vqa_relation", "vqa_attribute", "ocr"])
    parser.add_argument("--examples", type=int, default=5000, help="of each task; about 0.1 s each")
    parser.add_argument("--tops", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--kept", type=Path, default=None, help="a folder to keep the exact drops in")
    parser.add_argument("--timed", type=int, default=0, help="examples of one race for real, beside exact")
    parser.add_argument("--coverage", type=int, default=0, help="simulated races a setting")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.tasks:
        print("| task | examples | top | at / behind border | bound | top as exact | less work | undecided |")
        print("|---|---:|---:|---|---|---|---|---:|")
    for name in given.tasks:
        table(name, exact_drops(name, given.examples, given.kept), given.tops)
    if given.timed:
        timed("vqa_relation", given.timed, given.tops[0])
    if given.coverage:
        coverage(given.coverage)
