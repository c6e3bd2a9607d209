"""Heads localized on retrieval beside a plain loop: one head, one candidate, one full forward.

Both run in this process, on one thread, over the same queries of the same model; printed are the ratio of the
thread's times, which other work on the machine disturbs less than wall time, and the largest differences.
The plain loop takes one head of every layer, and its time is scaled to all heads. Usage:

    python benchmarks/retrieval.py [--queries 2] [--candidates 50] [--dtype float32]
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from plain_loop import IMAGE, WORDS, TokenExample, add_dtype, plain_head, small_llava
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.answers.margin import Margin, MarginAnswers
from hones_eval.methods.localization import HeadLocalization
from hones_eval.runs.measure import Totals

MARGIN = Margin(3, 4)
# Tokens in front of a candidate and behind it; that of Llama cuts "\nCandidate: " and the question like this.
BEFORE, BEHIND, CANDIDATE = 6, 22, range(8, 17)
LAYERS, HEADS = 8, 8


class Queries:
    """Queries of some candidates each, one of them right, scored by NDCG@5."""

    task = "random"
    metric = "ndcg_at_5"
    higher_is_better = True
    is_mean = False
    kind = MarginAnswers()

    def __init__(self, examples: list[TokenExample], candidates: int) -> None:
        self.examples, self.candidates = examples, candidates

    def with_same_images(self, index: int) -> list[TokenExample]:
        start = index // self.candidates * self.candidates
        return self.examples[start : start + self.candidates]

    def score(self, index: int, text: str) -> dict[str, Any]:
        right = self.examples[index].target_ids == [MARGIN.yes]
        return {"ndcg_at_5": (index // self.candidates, right, float(text))}

    def aggregate(self, results: Sequence[dict[str, Any]]) -> float:
        return ndcg([result["ndcg_at_5"] for result in results])


def ndcg(judged: Sequence[tuple[int, bool, float]]) -> float:
    """Mean NDCG@5 with ties against the right candidate."""
    gains = []
    for query in sorted({item[0] for item in judged}):
        members = [item for item in judged if item[0] == query]
        best = next(score for _, right, score in members if right)
        rank = sum(score >= best for _, _, score in members)
        gains.append(1 / math.log2(1 + rank) if rank <= 5 else 0.0)
    return sum(gains) / len(gains)


def examples_for(model: Any, queries: int, candidates: int) -> list[TokenExample]:
    """A random image a query, and random candidates between words that are the same for all.

    The right candidate is the third by the unedited margins.
    """
    side, patches = model.config.vision_config.image_size, model.config.image_seq_length
    drawn = torch.Generator().manual_seed(0)

    def words(count: int) -> Tensor:
        return torch.randint(WORDS.start, WORDS.stop, (1, count), generator=drawn)

    before, behind = words(BEFORE), words(BEHIND)
    made = []
    for index in range(queries * candidates):
        if index % candidates == 0:
            image = torch.randn(1, 3, side, side, generator=drawn).to(model.dtype)
        length = int(torch.randint(CANDIDATE.start, CANDIDATE.stop, (), generator=drawn))
        ids = torch.cat([torch.full((1, patches), IMAGE), before, words(length), behind], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image}
        made.append(TokenExample(index, "random", index, inputs, {}, [MARGIN.no], MARGIN))
    for query in range(queries):
        mine = made[query * candidates : (query + 1) * candidates]
        by_margin = sorted(mine, key=lambda key: -float(MARGIN.of(model(**key.inputs).logits[0, -1])))
        by_margin[2].target_ids = [MARGIN.yes]  # third, so that edits move it up and down
    return made


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The value that a call returns, and the seconds of this thread that it took."""
    start = time.thread_time()
    found = run()
    return found, time.thread_time() - start


@torch.no_grad()
def compare(queries: int, candidates: int, dtype: str) -> None:
    """8 layers, 8 heads, hidden 256, 144 image tokens, candidates of 8 to 16 tokens."""
    model = small_llava(layers=LAYERS, heads=HEADS, hidden=256, image_side=168, spread=0.05, dtype=dtype)
    examples = examples_for(model, queries, candidates)
    task: Any = Queries(examples, candidates)
    localization = HeadLocalization(Replayer(Anatomy.of(model)), task)

    def measured(some: Sequence[TokenExample]) -> Totals:
        every = [localization.measure(item) for item in some]  # type: ignore[arg-type]
        sums = {name: sum(item.sums[name] for item in every) for name in every[0].sums}
        return Totals(
            sums, {example.index: measured.record for example, measured in zip(some, every, strict=True)}
        )

    def ours() -> tuple[Tensor, Tensor, Totals]:
        totals = measured(examples)
        return localization.scores(totals), localization.log_probability_scores(totals), totals

    def margins(head: Head | None) -> Tensor:
        """Of all candidates, and their targets' log-probabilities [examples, 2]."""
        rows = []
        for example in examples:
            run = lambda item=example: model(**item.inputs, use_cache=False).logits[0, -1].float()  # noqa: E731
            logits = run() if head is None else plain_head(model, head, HEADS, run)
            log_p = logits.log_softmax(-1)[example.target_ids[0]]
            rows.append(torch.stack([logits[MARGIN.yes] - logits[MARGIN.no], log_p]))
        return torch.stack(rows).double()

    def judged(values: Tensor) -> float:
        results = [task.score(i, repr(float(value))) for i, value in enumerate(values[:, 0])]
        return float(task.aggregate(results))

    measured(examples[:candidates])  # the proof that sharing is exact, and warm caches
    (scores, log_scores, totals), seconds = timed(ours)
    assert int(totals.sums["shared"]) == len(examples), localization.run.sharing.inexact
    base, base_seconds = timed(lambda: margins(None))
    some = [Head(layer, (3 * layer) % HEADS) for layer in range(LAYERS)]
    edited, edited_seconds = timed(lambda: {head: margins(head) for head in some})
    plain_seconds = base_seconds + edited_seconds * LAYERS * HEADS / len(some)
    worst = max(abs(judged(base) - judged(edited[head]) - float(scores[head])) for head in some)
    drops = {head: float((base - edited[head])[:, 1].mean()) for head in some}
    largest = float(scores.abs().max()), max(map(abs, drops.values()))
    worst_log = max(abs(drop - float(log_scores[head])) for head, drop in drops.items())
    print(
        f"retrieval, {queries} queries of {candidates} candidates: plain loop {plain_seconds:.1f} s of CPU "
        f"({len(some)} of {LAYERS * HEADS} heads timed), ours {seconds:.1f} s, "
        f"ratio {plain_seconds / seconds:.2f}; largest difference of NDCG@5 drops {worst:.1e} "
        f"(largest {largest[0]:.2g}), of log-probability drops {worst_log:.1e} "
        f"(largest {largest[1]:.2g})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=50)
    add_dtype(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare(arguments.queries, arguments.candidates, arguments.dtype)
