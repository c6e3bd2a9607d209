"""Head localization beside a plain loop: one head, one example, one full forward or one full `generate`.

Both run in this process, on one thread, example by example in turn, and are timed by the thread's CPU time.
Both include recording an example from the task, decoding and scoring its answers; ours also the proofs that
it is exact, and the target's log-probability, which takes a pass of its own where another answer is given.
Usage:

    python benchmarks/localization.py [--what embedded generation log_probability choices next_token]
                                      [--examples 16] [--profile] [--dtype float32]

`embedded` is the shipped model on its seven tasks, all by generation; the others are a LLaVA with random
weights, `next_token` V-SEAM's head scores. The ratio of multiply-adds is the floor of the arithmetic: what
replay saves if nothing beside it took time.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from plain_loop import (
    DTYPES,
    WORDS,
    Clock,
    TokenExample,
    TokenTask,
    add_dtype,
    answer,
    examples_for,
    log_probability,
    multiply_adds,
    next_probability,
    operations,
    plain_head,
    small_llava,
)
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head
from hones_eval.engine.prompts import appended
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.answers.choices import Choice, ChoiceAnswers, Choices, Reading, from_text
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.localization import HeadLocalization
from hones_eval.methods.vseam import HeadContribution
from hones_eval.runs.measure import Measurement, Totals
from hones_eval.toy import checkpoint_path
from hones_eval.toy.ground_truth import TASKS

CANDIDATES = 50  # a retrieval query's examples, all of which its score needs
LAYERS, HEADS, HIDDEN, IMAGE_SIDE, ANSWER, TARGET = 8, 8, 256, 168, 16, 3
TABLE = "| task | examples | answers that differ | plain loop | ours | ratio | largest difference of scores |"


@torch.no_grad()
def embedded(count: int, profiled: bool, dtype: str) -> None:
    """A row a task, each from nothing; together, every task has the same weight."""
    lmm = load_lmm("llava_hf", f"pretrained={checkpoint_path()}", device="cpu")
    anatomy = Anatomy.of(inner_model(lmm).to(DTYPES[dtype]))
    seconds = {"plain": 0.0, "ours": 0.0}
    print("the embedded model, by generation; seconds of CPU an example")
    print(f"{TABLE}\n|---|---:|---:|---:|---:|---:|---|")
    for name in TASKS:
        size = CANDIDATES if name == "retrieval" else count
        # One for each side, since decoded answers are remembered.
        ours, plain = (
            TaskExamples(lmm, f"scenes_{name}_discovery", model_name="llava_hf", limit=size) for _ in range(2)
        )
        localization = HeadLocalization(Replayer(anatomy), ours)
        clock = beside_plain(name, localization, plain, profiled)
        for side in seconds:
            seconds[side] += clock.seconds[side] / size
    print(f"together: ratio {seconds['plain'] / seconds['ours']:.2f}")


@torch.no_grad()
def by_generation(count: int, profiled: bool, dtype: str) -> None:
    """A LLaVA of 8 layers, 8 heads, hidden 256, 144 image tokens; answers of 16 tokens."""
    model = small_llava(LAYERS, HEADS, HIDDEN, IMAGE_SIDE, spread=0.05, dtype=dtype)
    examples = examples_for(model, count, new_tokens=ANSWER, target_tokens=1)
    for example in examples:
        example.target_ids = answer(model, example)  # so that edits lower the score
    task: Any = TokenTask(examples)
    print("a LLaVA with random weights, by generation of 16 tokens; seconds of CPU an example")
    print(f"{TABLE}\n|---|---:|---:|---:|---:|---:|---|")
    beside_plain("random", HeadLocalization(Replayer(Anatomy.of(model)), task), task, profiled)


def beside_plain(name: str, localization: HeadLocalization, task: Any, profiled: bool) -> Clock:
    """Print a row; `task` gives the plain loop the examples that `localization` has."""
    model = localization.replayer.anatomy.model
    measured: list[Measurement] = []
    base: list[Any] = []
    edited: list[list[Any]] = [[] for _ in localization.heads]

    def plain(index: int) -> None:
        example = task[index]
        base.append(task.score(index, task.decode(index, answer(model, example))))
        for head, results in zip(localization.heads, edited, strict=True):
            tokens = plain_head(model, head, HEADS, lambda: answer(model, example))
            results.append(task.score(index, task.decode(index, tokens)))

    clock = Clock()
    for index in range(len(task)):
        with clock("ours"):
            measured.append(localization.measure(localization.examples[index]))
        with clock("plain"):
            plain(index)
    sums = {key: sum(item.sums[key] for item in measured) for key in measured[0].sums}
    found = localization.metric_drops(Totals(sums, {i: one.record for i, one in enumerate(measured)}))
    drops = [task.aggregate(base) - task.aggregate(results) for results in edited]
    expected = torch.tensor(drops, dtype=torch.float64)
    differing = float(sums["differing_answers"]) / (len(task) * len(edited))
    ours_s, plain_s = clock.seconds["ours"] / len(task), clock.seconds["plain"] / len(task)
    worst, largest = float((found - expected).abs().max()), float(expected.abs().max())
    print(
        f"| {name} | {len(task)} | {differing:.0%} | {plain_s:.2f} | {ours_s:.3f} | {plain_s / ours_s:.1f} | "
        f"{worst:.1e} of {largest:.2g} |",
        flush=True,
    )
    if profiled:
        where(lambda: localization.measure(localization.examples[0]))
    return clock


@torch.no_grad()
def by_log_probability(count: int, profiled: bool, dtype: str) -> None:
    """The same LLaVA, targets of 3 tokens."""
    model = small_llava(LAYERS, HEADS, HIDDEN, IMAGE_SIDE, spread=0.05, dtype=dtype)
    examples = examples_for(model, count, new_tokens=1, target_tokens=TARGET)
    localization = HeadLocalization(Replayer(Anatomy.of(model)), TokenTask(examples))  # type: ignore[arg-type]

    def ours(index: int) -> Tensor:
        return localization.log_probability_drop(examples[index])[0]  # type: ignore[arg-type]

    def plain(index: int) -> Tensor:
        return plain_drops(model, localization.heads, lambda: log_probability(model, examples[index]))

    in_turn("by log-probability", count, 1, ours, plain, profiled)


class ChoiceTask(TokenTask):
    """Scores the choice with the smallest loss: the target is the first."""

    kind = ChoiceAnswers()

    def score(self, index: int, text: str) -> dict[str, float]:
        values = [value for value, _ in from_text(text)]
        return {"share": float(values[0] == min(values))}


@torch.no_grad()
def by_choices(count: int, profiled: bool, dtype: str) -> None:
    """The same LLaVA, questions of 4 choices of 3 tokens, by the choices' log-likelihoods."""
    model = small_llava(LAYERS, HEADS, HIDDEN, IMAGE_SIDE, spread=0.05, dtype=dtype)
    examples = examples_for(model, count, new_tokens=1, target_tokens=TARGET)
    offered = [offer(example) for example in examples]
    for example, four in zip(examples, offered, strict=True):
        asked = [Choice(appended(choice.inputs, choice.target_ids), TARGET) for choice in four]
        example.details = Choices(asked, 0, 0, Reading("mean loss", 0))
    localization = HeadLocalization(Replayer(Anatomy.of(model)), ChoiceTask(examples))  # type: ignore[arg-type]

    def ours(index: int) -> Tensor:
        return localization.measure(examples[index]).sums["log_probability_drop"]  # type: ignore[arg-type]

    def plain(index: int) -> Tensor:
        def right_one() -> float:
            values = [log_probability(model, item) for item in offered[index]]
            return values[0]

        return plain_drops(model, localization.heads, right_one)

    in_turn("by choices, 4 a question", count, 1, ours, plain, profiled)


def offer(example: TokenExample) -> list[TokenExample]:
    """A question with each of four choices as its target, the right one first."""
    generator = torch.Generator().manual_seed(1000 + example.index)
    others = torch.randint(WORDS.start, WORDS.stop, (3, TARGET), generator=generator).tolist()
    return [replace(example, target_ids=ids) for ids in (example.target_ids, *others)]


@torch.no_grad()
def by_next_token(count: int, profiled: bool, dtype: str) -> None:
    """V-SEAM on the same LLaVA, where an image has one question, and where it has five in a row."""
    model = small_llava(LAYERS, HEADS, HIDDEN, IMAGE_SIDE, spread=0.05, dtype=dtype)
    for questions in (1, 5):
        used = max(1, count // questions) * questions
        examples = examples_for(model, used, new_tokens=1, target_tokens=1, per_image=questions)
        method = HeadContribution(Replayer(Anatomy.of(model)), TokenTask(examples))  # type: ignore[arg-type]

        def ours(index: int, method: Any = method, examples: Any = examples) -> Tensor:
            return method.measure(examples[index]).sums["signed"].flatten()

        def plain(index: int, method: Any = method, examples: Any = examples) -> Tensor:
            return plain_drops(model, method.heads, lambda: next_probability(model, examples[index]))

        in_turn(f"V-SEAM, questions on an image: {questions}", used, questions, ours, plain, profiled)


def plain_drops(model: Any, heads: Sequence[Head], value: Callable[[], float]) -> Tensor:
    """What a value loses under each head's edit [E]."""
    base = value()
    return base - torch.tensor([plain_head(model, head, HEADS, value) for head in heads]).double()


def in_turn(
    name: str,
    count: int,
    together: int,
    ours: Callable[[int], Tensor],
    plain: Callable[[int], Tensor],
    profiled: bool,
) -> None:
    """Print both ways' times over examples, of which some share work, and the ratio of their arithmetic."""
    first = range(together)

    def both(way: Callable[[int], Tensor]) -> list[Tensor]:
        return [way(index) for index in first]

    both(ours)  # the proofs that it is exact
    clock, worst, largest = Clock(), 0.0, 0.0
    for index in range(count):
        with clock("ours"):
            found = ours(index)
        with clock("plain"):
            expected = plain(index)
        worst = max(worst, float((found - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    floor = multiply_adds(lambda: both(plain)) / multiply_adds(lambda: both(ours))
    ratio = clock.seconds["plain"] / clock.seconds["ours"]
    print(
        f"{name}: {count} examples, plain loop {clock.seconds['plain'] / count:.2f} s of CPU an example, "
        f"ours {clock.seconds['ours'] / count:.3f}, ratio {ratio:.2f}; ratio of multiply-adds {floor:.2f}; "
        f"largest difference of drops {worst:.1e} of {largest:.2g}",
        flush=True,
    )
    if profiled:
        where(lambda: both(ours))


def where(run: Callable[[], Any]) -> None:
    """Print the operations that take most of a call's time, and what all of them together leave."""
    found = operations(run)
    best = sorted(found.by_name, key=lambda key: -found.by_name[key])[:8]
    shares = ", ".join(f"{key} {found.by_name[key] / found.seconds:.0%}" for key in best)
    print(f"  {shares}; outside of operations {found.outside:.0%}")


WHAT = {
    "embedded": embedded,
    "generation": by_generation,
    "log_probability": by_log_probability,
    "choices": by_choices,
    "next_token": by_next_token,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=list(WHAT))
    parser.add_argument("--examples", type=int, default=16, help="of each task; retrieval takes 50")
    parser.add_argument("--profile", action="store_true")
    add_dtype(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for what in given.what:
        WHAT[what](given.examples, given.profile, given.dtype)
