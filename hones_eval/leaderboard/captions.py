"""Caption metrics of lmms-eval in a form that can be resampled: tokens and n-grams are counted once.

lmms-eval computes BLEU, METEOR, ROUGE-L and CIDEr with pycocoevalcap, which tokenizes in a Java program and
counts n-grams anew for every set of examples. An example's counts do not depend on the others, so corpus BLEU
is a function of their sums (Papineni et al. 2002); ROUGE-L is a mean over examples, and so is CIDEr with the
document frequencies of the whole data set (Vedantam et al. 2015), which both runs share.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from hones_eval.leaderboard.samples import Floats

TINY, SMALL = 1e-15, 1e-9  # pycocoevalcap's, so that no match gives nearly 0
Counts = tuple[float, ...]
NO_METEOR = "METEOR is counted by a Java program, too slow to resample"


def is_caption_metric(metric: str, items: Sequence[Any]) -> bool:
    """Whether a metric is one of pycocoevalcap's, by its name and by what its entries hold."""
    return bool(items and _kind(metric)) and all(
        isinstance(one, dict) and isinstance(one.get("pred"), str) and isinstance(one.get("answer"), list)
        for one in items
    )


def caption_scores(metric: str, items: Sequence[dict[str, Any]]) -> Floats | list[Counts] | str:
    """Give a score per example `[n]`, or a row of counts per example for BLEU, or why there is neither.

    Args:
        metric: the metric's name, such as `coco_Bleu_4`.
        items: `process_results`' entries, each with `answer`, the references, and `pred`.
    """
    kind = _kind(metric)
    if kind == "METEOR":
        return NO_METEOR
    from pycocoevalcap.eval import Cider, Rouge

    try:
        references = _tokens(tuple([tuple(item["answer"]) for item in items]))
        answers = _tokens(tuple([(item["pred"],) for item in items]))
    except OSError as error:
        return f"captions are tokenized by java, which does not run here ({error})"
    if kind.startswith("Bleu"):
        return bleu_counts(references, answers)
    _, scores = (Rouge() if kind == "ROUGE_L" else Cider()).compute_score(references, answers)
    return np.asarray(scores, dtype=np.float64)


def bleu_of(metric: str) -> Callable[[Sequence[Counts]], float]:
    """Corpus BLEU-n, such as `coco_Bleu_4`, as a function of rows of `bleu_counts`."""
    n = int(metric[-1])

    def bleu(rows: Sequence[Counts]) -> float:
        total = np.sum(rows, axis=0)
        matches, ngrams = total[:n], total[4 : 4 + n]
        value = float(np.prod((matches + TINY) / (ngrams + SMALL)) ** (1 / n))
        ratio = float((total[8] + TINY) / (total[9] + SMALL))
        return value * math.exp(1 - 1 / ratio) if ratio < 1 else value

    return bleu


def bleu_counts(references: dict[int, list[str]], answers: dict[int, list[str]]) -> list[Counts]:
    """One row `[10]` an example: matched n-grams and n-grams (n of 1 to 4), its length, its reference's."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    rows = []
    for key, (answer,) in answers.items():
        scorer = BleuScorer(n=4)
        scorer += (answer, references[key])
        (counts,) = scorer.ctest
        nearest = scorer._single_reflen(counts["reflen"], "closest", counts["testlen"])
        rows.append((*counts["correct"], *counts["guess"], counts["testlen"], nearest))
    return rows


@lru_cache(maxsize=8)  # a run's answers for its four BLEU, ROUGE-L and CIDEr, and references for all runs
def _tokens(texts: tuple[tuple[str, ...], ...]) -> dict[int, list[str]]:
    from pycocoevalcap.eval import PTBTokenizer

    captions = {k: [{"caption": text} for text in one] for k, one in enumerate(texts)}
    found: dict[int, list[str]] = PTBTokenizer().tokenize(captions)
    return found


def _kind(metric: str) -> str:
    found = re.search(r"(Bleu_[1-4]|METEOR|ROUGE_L|CIDEr)$", metric)
    return found[1] if found else ""
