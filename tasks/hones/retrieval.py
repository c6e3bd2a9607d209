"""Hard negatives for pairwise retrieval, and its score."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

NEGATIVES = 49
BLOCK = 256


def hard_negatives(
    positives: Sequence[str], captions: Sequence[str], owners: Sequence[int]
) -> list[list[int]]:
    """For the positive caption of each image, which captions of others share the most words with it.

    Args:
        positives: the positive caption of each image.
        captions: the pool.
        owners: for each caption of the pool, the image it belongs to.

    Returns: for each image up to 49 places in the pool; ties keep the pool's order.
    """
    vocabulary: dict[str, int] = {}
    pool = _bags(captions, vocabulary)
    asked = _bags(positives, vocabulary)
    width = len(vocabulary)
    pool_matrix, asked_matrix = _matrix(pool, width), _matrix(asked, width)
    owner = np.asarray(owners)
    same_text = np.asarray([_plain(text) for text in captions], dtype=object)
    chosen: list[list[int]] = []
    for start in range(0, len(positives), BLOCK):
        shared = np.asarray((asked_matrix[start : start + BLOCK] @ pool_matrix.T).todense())
        for row, image in zip(shared, range(start, start + BLOCK), strict=False):
            wrong = (owner != image) & (same_text != _plain(positives[image]))
            order = np.argsort(-row, kind="stable")
            chosen.append([int(index) for index in order[wrong[order]][:NEGATIVES]])
    return chosen


def _bags(texts: Iterable[str], vocabulary: dict[str, int]) -> list[list[int]]:
    return [
        [vocabulary.setdefault(word, len(vocabulary)) for word in sorted(set(_plain(text).split()))]
        for text in texts
    ]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def _matrix(bags: Sequence[Sequence[int]], width: int) -> csr_matrix:
    ends = np.cumsum([0, *(len(bag) for bag in bags)])
    columns = np.concatenate([np.asarray(bag, dtype=np.int64) for bag in bags])
    return csr_matrix((np.ones(len(columns), dtype=np.int32), columns, ends), shape=(len(bags), width))


def ndcg_at_5(results: Sequence[Mapping[str, Any]]) -> float:
    """Mean NDCG@5 over queries with one relevant candidate each; ties count against it.

    Each result has a `query`, whether it is the `positive`, and its `score`. With the one relevant candidate
    at rank r, NDCG@5 is 1/log2(1 + r) for r <= 5, else 0. Queries whose positive
    was cut off by a limit do not count. A query that is there several times, as in a resample of images,
    counts as often.
    """
    positives = {item["query"]: item["score"] for item in results if item["positive"]}
    times = Counter(item["query"] for item in results if item["positive"])
    if not positives:
        raise ValueError("no query has its positive candidate among the results; candidates come 50 a query")
    above = dict.fromkeys(positives, 0)
    for result in results:
        if not result["positive"] and result["query"] in positives:
            above[result["query"]] += result["score"] >= positives[result["query"]]
    gains = {query: _gain(1 + count / times[query]) for query, count in above.items()}
    return sum(times[query] * gain for query, gain in gains.items()) / times.total()


def _gain(rank: float) -> float:
    return 1 / math.log2(1 + rank) if rank <= 5 else 0.0


def margin_in(answer: str) -> float | None:
    """The number that an answer is; None for words. Not a number is not a score: ValueError."""
    try:
        margin = float(answer)
    except ValueError:
        return None
    if not math.isfinite(margin):
        raise ValueError(f"a margin is {answer}")
    return margin
