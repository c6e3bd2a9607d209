"""Localization and attribution beside what a careful engineer writes in an afternoon, not only a naive loop.

Up to five ways do the same work on the same examples, in turn, in one process, by its thread's CPU time:

    naive     one head, one example, one full forward or one full `generate`
    batch     all heads as the rows of one batch: one forward, or one `generate`, per example
    restart   the layer inputs of the unedited pass are kept; per layer, its heads are rows that restart there
    nnsight   the same restart by `skip` of this library, where it is installed (heads by log-probability)
    ours      what `hones-eval rank` runs, its proofs left out (they are made once per run)

The floor is the ratio of multiply-adds, counted in the batch and in ours. Targets are the tasks' gold answers
on the embedded model, and random tokens elsewhere: not what the model would say. `heads` by generation give
their log-probability as well, which the other ways do not; `heads_metric_only` leave it out. Usage:

    python benchmarks/careful_batch.py [--what heads heads_metric_only log_probability neurons]
                                       [--models embedded mid] [--examples 8] [--dtype float32] [--no_naive]
    python benchmarks/careful_batch.py --overhead    # the share of time outside of tensor operations
    python benchmarks/careful_batch.py --large       # 30 layers x 9 heads, hidden 576, 602 tokens
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from peer_nnsight import peer_logits
from plain_loop import (
    DTYPES,
    Clock,
    TokenTask,
    add_dtype,
    answer,
    examples_for,
    log_probability,
    multiply_adds,
    operations,
    plain_head,
    small_llava,
)
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head, all_heads
from hones_eval.engine.decoding import cut_at_end, repeat_example
from hones_eval.engine.prompts import appended
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.answers.target import Target
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.hones import NeuronAttribution
from hones_eval.methods.localization import HeadLocalization
from hones_eval.toy import checkpoint_path

TASKS = ("vqa_relation", "ocr", "caption")
Way = Callable[[Any], Any]
OTHERS = ("naive", "batch", "restart", "nnsight")


def in_rows(model: Any, heads: Sequence[Head], count: int) -> ExitStack:
    """Replace head `heads[i]` in row `i` by the mean of the others; one hook per layer, written out here."""
    stack = ExitStack()
    for layer, module in enumerate(model.get_decoder().layers):
        rows = torch.tensor([i for i, head in enumerate(heads) if head.layer == layer])
        chosen = torch.tensor([head.head for head in heads if head.layer == layer])
        if len(rows) == 0:
            continue

        def replace(_: Any, args: tuple[Tensor], rows: Tensor = rows, chosen: Tensor = chosen) -> Any:
            x = args[0].unflatten(-1, (count, -1)).clone()
            some = x[rows]
            own = some[torch.arange(len(rows)), :, chosen]
            x[rows, :, chosen] = (some.sum(2) - own) / (count - 1)
            return (x.flatten(2),)

        stack.callback(module.self_attn.o_proj.register_forward_pre_hook(replace).remove)
    return stack


def batch_answers(model: Any, example: Any, heads: Sequence[Head], count: int) -> list[list[int]]:
    """Every head's answer, by one `generate` of as many rows."""
    with in_rows(model, heads, count):
        output = model.generate(**repeat_example(example.inputs, len(heads)), **example.settings)
    ends = model.generation_config.eos_token_id
    new = output[:, example.inputs["input_ids"].shape[1] :].tolist()
    return [cut_at_end(row, [ends] if isinstance(ends, int) else list(ends or [])) for row in new]


def target_values(logits: Tensor, target: Sequence[int]) -> Tensor:
    """The target's log-probability [rows], from logits [rows, target, vocabulary]."""
    ids = torch.tensor([list(target)]).expand(len(logits), -1)[..., None]
    return logits.float().log_softmax(-1).gather(2, ids).sum((1, 2))


def batch_values(model: Any, example: Any, heads: Sequence[Head], count: int) -> Tensor:
    """Every head's log-probability of the target, by one forward of as many rows."""
    inputs = appended(example.inputs, example.target_ids[:-1])
    with in_rows(model, heads, count):
        rows = repeat_example(inputs, len(heads))
        logits = model(**rows, use_cache=False, logits_to_keep=len(example.target_ids)).logits
    return target_values(logits, example.target_ids)


def restart_values(model: Any, example: Any, heads: Sequence[Head], count: int) -> Tensor:
    """The same from the recorded input of each head's layer; the layers below it are not run."""
    decoder, length = model.get_decoder(), len(example.target_ids)
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    with ExitStack() as stack:
        for layer in decoder.layers:
            keep = layer.register_forward_pre_hook(
                lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True
            )
            stack.callback(keep.remove)
        model(**appended(example.inputs, example.target_ids[:-1]), use_cache=False)
    values = torch.zeros(len(heads))
    for start in range(len(calls)):
        numbers = [i for i, head in enumerate(heads) if head.layer == start]
        here = [heads[i] for i in numbers]
        if not here:
            continue
        x = calls[start][0].expand(len(here), -1, -1)
        with in_rows(model, here, count):
            for layer, (_, kwargs) in zip(decoder.layers[start:], calls[start:], strict=True):
                x = layer(x, **kwargs)
                x = x[0] if isinstance(x, tuple) else x
        logits = model.lm_head(decoder.norm(x[:, -length:]))
        values[numbers] = target_values(logits, example.target_ids)
    return values


def batch_neurons(model: Any, example: Any, heads: Sequence[Head], count: int) -> Tensor:
    """Write-in contributions [1 + heads, L, I] at the last token, unedited in row 0, by one forward."""
    kept: list[Tensor] = []
    layers = model.get_decoder().layers
    unedited = Head(-1, 0)  # in no layer
    with in_rows(model, [unedited, *heads], count) as stack:
        for layer in layers:
            keep = layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][:, -1]))
            stack.callback(keep.remove)
        model(**repeat_example(example.inputs, 1 + len(heads)), use_cache=False, logits_to_keep=1)
    direction = model.lm_head.weight[example.target_ids].sum(0)
    gains = [layer.mlp.down_proj.weight.T @ (direction / direction.norm()) for layer in layers]
    return torch.stack([z * gain for z, gain in zip(kept, gains, strict=True)], dim=1)


def compare(name: str, task: Any, ways: dict[str, Way], check: Callable[[dict[str, Any]], str]) -> None:
    """Print a row: CPU seconds per example, and how many times longer than ours each way takes."""
    for way in ways.values():
        way(0)  # the proofs, and a warm-up
    clock, found = Clock(), {}
    for index in range(1, len(task)):
        for way, run in ways.items():
            with clock(way):
                found[way] = run(index)
    counted = {way: multiply_adds(partial(ways[way], 1)) for way in ("batch", "ours")}
    own = clock.seconds["ours"]
    cells = [f"{clock.seconds[way] / own:.2f}" if way in ways else "" for way in OTHERS]
    print(
        f"| {name} | {len(task) - 1} | {1e3 * own / (len(task) - 1):.0f} | {' | '.join(cells)} | "
        f"{counted['batch'] / counted['ours']:.2f} | {check(found)} |",
        flush=True,
    )


def by_generation(name: str, model: Any, task: Any, naive: bool, metric_only: bool = False) -> None:
    localization = HeadLocalization(Replayer(Anatomy.of(model)), task, log_probability=not metric_only)
    heads, count = localization.heads, localization.replayer.anatomy.shape.heads
    differing: list[float] = []

    def ours(index: int) -> Any:
        measured = localization.measure(task[index])
        differing.append(float(measured.sums["differing_answers"]) / len(heads))
        if task.is_mean:
            return measured.sums["metric_drop"].tolist()
        changed = task.kind.changed(measured.record)
        return [changed.get(number, measured.record["base"]) for number in range(len(heads))]

    def scored(index: int, answers: Sequence[list[int]]) -> list[Any]:
        texts = [task.decode(index, tokens) for tokens in answers]
        if not task.is_mean:
            return texts
        values = [task.score(index, text)[task.metric] for text in texts]
        base = task.score(index, task.decode(index, answer(model, task[index])))[task.metric]
        return [base - value for value in values]

    def batch(index: int) -> Any:
        return scored(index, batch_answers(model, task[index], heads, count))

    def one_by_one(index: int) -> Any:
        run = [plain_head(model, head, count, lambda: answer(model, task[index])) for head in heads]
        return scored(index, run)

    def check(found: dict[str, Any]) -> str:
        pairs = list(zip(found["batch"], found["ours"], strict=True))
        equal = sum(a == b if isinstance(a, str) else abs(a - b) < 1e-6 for a, b in pairs)
        return f"{sum(differing) / len(differing):.0%} differ; {equal} of {len(pairs)} equal"

    ways = {"ours": ours, "batch": batch} | ({"naive": one_by_one} if naive else {})
    compare(name, task, ways, check)


def by_log_probability(name: str, model: Any, task: Any, naive: bool) -> None:
    localization = HeadLocalization(Replayer(Anatomy.of(model)), task)
    heads, count = localization.heads, localization.replayer.anatomy.shape.heads

    def ours(index: int) -> Tensor:
        drops, base = localization.log_probability_drop(task[index])
        return base - drops

    def one_by_one(index: int) -> Tensor:
        example = task[index]
        run = [plain_head(model, head, count, lambda: log_probability(model, example)) for head in heads]
        return torch.tensor(run)

    ways: dict[str, Way] = {
        "ours": ours,
        "batch": lambda index: batch_values(model, task[index], heads, count),
        "restart": lambda index: restart_values(model, task[index], heads, count),
    } | ({"naive": one_by_one} if naive else {})
    if (peer := peer_logits(model, heads, count)) is not None:
        ways["nnsight"] = lambda index: target_values(peer(task[index]), task[index].target_ids)

    def check(found: dict[str, Any]) -> str:
        worst = max(float((found[way] - found["ours"]).abs().max()) for way in found)
        return f"{worst:.1e}"

    compare(name, task, ways, check)


def neurons(name: str, model: Any, task: Any, naive: bool) -> None:
    anatomy = Anatomy.of(model)
    every = all_heads(anatomy.shape)
    heads = [every[i] for i in torch.linspace(0, len(every) - 1, 8).round().int().tolist()]
    attribution = NeuronAttribution(Replayer(anatomy), heads)

    def ours(index: int) -> Tensor:
        return attribution.measure(task[index]).sums["drop"]

    def batch(index: int) -> Tensor:
        found = batch_neurons(model, task[index], heads, anatomy.shape.heads)
        return found[0] - found[1:]

    def one_by_one(index: int) -> Tensor:
        base = batch_neurons(model, task[index], [], anatomy.shape.heads)[0]
        rows = [batch_neurons(model, task[index], [head], anatomy.shape.heads)[1] for head in heads]
        return base - torch.stack(rows)

    def check(found: dict[str, Any]) -> str:
        # Below a head's layer nothing changes; a batch of another size rounds differently there.
        return f"{float((found['batch'] - found['ours']).abs().max()):.1e}"

    compare(name, task, {"ours": ours, "batch": batch} | ({"naive": one_by_one} if naive else {}), check)


WHAT: dict[str, Callable[..., None]] = {
    "heads": by_generation,
    "heads_metric_only": partial(by_generation, metric_only=True),
    "log_probability": by_log_probability,
    "neurons": neurons,
}


def overhead(dtype: str, tasks: Sequence[str], count: int) -> None:
    """Print the share of time that heads by log-probability spend outside of tensor operations.

    Examples are recorded before. Under the profiler its own time between operations counts as outside; see
    `Operations.outside_without_profiler` for the estimate without it.
    """
    print("| task | way | ms per example | outside of operations, profiled | estimate |")
    print("|---|---|---:|---:|---:|")
    for name in tasks:
        lmm = load_lmm("llava_hf", f"pretrained={checkpoint_path()}", device="cpu")
        model = inner_model(lmm).to(DTYPES[dtype])
        task = TaskExamples(lmm, f"scenes_{name}_discovery", model_name="llava_hf", limit=count)
        localization = HeadLocalization(Replayer(Anatomy.of(model)), task)
        examples = [task[index] for index in range(count)]
        heads, per_layer = localization.heads, localization.replayer.anatomy.shape.heads
        ways: dict[str, Way] = {
            "ours": localization.log_probability_drop,
            "batch": partial(batch_values, model, heads=heads, count=per_layer),
            "unedited pass alone": lambda example, model=model: model(**example.inputs, use_cache=False),
        }
        for way, run in ways.items():
            every = partial(run_all, run, examples)
            every()
            clock = Clock()
            for _ in range(3):
                with clock("seconds"):
                    every()
            seconds, found = clock.seconds["seconds"] / 3, operations(every)
            estimate = found.outside_without_profiler(seconds)
            print(
                f"| {name} | {way} | {1e3 * seconds / count:.1f} | {found.outside:.0%} | {estimate:.0%} |",
                flush=True,
            )


def run_all(run: Way, examples: Sequence[Any]) -> None:
    """Call `run` on one example after the other."""
    for example in examples:
        run(example)


def large(dtype: str, every: int = 10) -> None:
    """Print a row for every tenth head of a shape at which arithmetic is most of the time; runs once."""
    model = small_llava(30, 9, 576, 336, spread=0.02, dtype=dtype)
    first, example = examples_for(model, 2, new_tokens=1, target_tokens=3)
    localization = HeadLocalization(Replayer(Anatomy.of(model)), TokenTask([first, example]))  # type: ignore[arg-type]
    heads = localization.heads[::every]
    edits = [localization.edits[localization.heads.index(head)] for head in heads]
    localization.replayer.record(appended(first.inputs, first.target_ids[:-1]), len(first.target_ids))
    clock, counted, found = Clock(), dict[str, float](), dict[str, Tensor]()

    def ours() -> Tensor:
        target = Target(localization.run, example)  # type: ignore[arg-type]
        target.replay(edits)
        return target.base - target.drops[::every]

    def one_by_one() -> Tensor:
        some = heads[:: len(heads) // 5]
        return torch.tensor(
            [plain_head(model, head, 9, lambda: log_probability(model, example)) for head in some]
        )

    ways: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "naive": one_by_one,
        "restart": lambda: restart_values(model, example, heads, 9),
        "batch": lambda: batch_values(model, example, heads, 9),
    }
    for way, run in ways.items():
        with clock(way):
            counted[way] = multiply_adds(lambda way=way, run=run: found.update({way: run()}))  # type: ignore[misc]
        each = clock.seconds[way] / len(found[way])
        rate = 2e-9 * counted[way] / clock.seconds[way]
        print(
            f"| {way} | {len(found[way])} | {each:.2f} | {counted[way] / len(found[way]):.3g} | {rate:.0f} |",
            flush=True,
        )
    worst = max(float((found[way] - found["ours"]).abs().max()) for way in ("restart", "batch"))
    print(f"largest difference of log-probabilities {worst:.1e}")


@torch.no_grad()
def main(given: argparse.Namespace) -> None:
    dtype = DTYPES[given.dtype]
    if given.overhead:
        overhead(given.dtype, given.tasks, given.examples)
        return
    if given.large:
        print("30 layers, 9 heads, hidden 576, 602 tokens and a target of 3; CPU seconds, one example")
        print(
            "| way | heads | seconds per head | multiply-adds per head | GFLOP/s |\n|---|---:|---:|---:|---:|"
        )
        large(given.dtype)
        return
    print(f"{given.dtype}; CPU milliseconds per example of ours, and how many times longer the others take")
    if find_spec("nnsight") is None:
        print("nnsight is not installed: its column is left out (pip install nnsight==0.8.1)")
    print(f"| work | examples | ours, ms | {' | '.join(OTHERS)} | floor, batch | agreement |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for what in given.what:
        if "embedded" in given.models:
            lmm = load_lmm("llava_hf", f"pretrained={checkpoint_path()}", device="cpu")
            model = inner_model(lmm).to(dtype)
            for task in given.tasks:
                examples = TaskExamples(
                    lmm, f"scenes_{task}_discovery", model_name="llava_hf", limit=given.examples + 1
                )
                WHAT[what](f"{what}, embedded, {task}", model, examples, not given.no_naive)
        if "mid" in given.models:
            mid = small_llava(8, 8, 256, 168, spread=0.05, dtype=given.dtype)
            made = examples_for(mid, given.examples + 1, new_tokens=16, target_tokens=3)
            WHAT[what](f"{what}, mid size", mid, TokenTask(made), not given.no_naive)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=list(WHAT))
    parser.add_argument("--models", nargs="+", default=["embedded", "mid"], choices=["embedded", "mid"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of the embedded model")
    parser.add_argument("--examples", type=int, default=8)
    add_dtype(parser)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--no_naive", action="store_true", help="leave the naive loop out, which is slow")
    torch.set_num_threads(1)
    main(parser.parse_args())
