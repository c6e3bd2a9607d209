"""Caption metrics of lmms-eval as scores or counts per example, so that they can be resampled quickly.

lmms-eval computes BLEU, METEOR, ROUGE-L and CIDEr with pycocoevalcap, which tokenizes and aligns in Java
programs and counts n-grams again for every set of examples. An example's counts do not depend on the others:
corpus BLEU is a function of their sums (Papineni et al. 2002), and METEOR one of sums of matches (Denkowski
and Lavie 2014); ROUGE-L is a mean over examples, and so is CIDEr with the document frequencies of the whole
data set (Vedantam et al. 2015), which both runs share.
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
# METEOR 1.5 for English: how much recall counts, the penalty's exponent and weight, how much content words
# count, and what a match is worth that is exact, of the stem, a synonym, a paraphrase.
ALPHA, BETA, GAMMA, DELTA, WORTH = 0.85, 0.2, 0.6, 0.75, np.array([1.0, 0.6, 0.8, 0.6])


def is_caption_metric(metric: str, items: Sequence[Any]) -> bool:
    """Whether a metric is computed by pycocoevalcap, judged by its name and its entries."""
    return bool(items and _kind(metric)) and all(
        isinstance(item, dict) and isinstance(item.get("pred"), str) and _are_texts(item.get("answer"))
        for item in items
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def caption_scores(metric: str, items: Sequence[dict[str, Any]]) -> Floats | list[Counts] | str:
    """A score per example `[n]`, counts per example (BLEU and METEOR), or the reason why there is neither.

    Args:
        metric: the metric's name, such as `coco_Bleu_4`.
        items: `process_results`' entries, each with `answer`, the references, and `pred`.
    """
    kind = _kind(metric)
    from pycocoevalcap.eval import Cider, Rouge

    try:
        references = _tokens(tuple([tuple(item["answer"]) for item in items]))
        answers = _tokens(tuple([(item["pred"],) for item in items]))
        if kind == "METEOR":
            return meteor_counts(references, answers)
    except OSError as error:
        return f"tokenizing captions needs java, which does not run here ({error})"
    if kind.startswith("Bleu"):
        return bleu_counts(references, answers)
    _, scores = (Rouge() if kind == "ROUGE_L" else Cider()).compute_score(references, answers)
    return np.asarray(scores, dtype=np.float64)


def corpus_function(metric: str) -> Callable[[Sequence[Counts]], float]:
    """The function that computes BLEU or METEOR of a corpus from the counts of its examples."""
    return meteor if _kind(metric) == "METEOR" else bleu_of(metric)


def meteor(rows: Sequence[Counts]) -> float:
    """METEOR of a corpus, from rows of `meteor_counts`.

    Precision and recall of matched words, each worth what its kind is, less for the chunks that they are in.
    """
    total = np.sum(rows, axis=0)
    (said, meant), (said_function, meant_function) = total[:2], total[2:4]
    # By kind of match: content words of the answer and of the reference, then function words of both.
    content, function = total[4:20].reshape(4, 4)[:, :2], total[4:20].reshape(4, 4)[:, 2:]
    chunks, matched = total[20], total[21:23].mean()
    found = WORTH @ (DELTA * content + (1 - DELTA) * function)
    if not found.all():
        return 0.0
    precision = found[0] / (DELTA * (said - said_function) + (1 - DELTA) * said_function)
    recall = found[1] / (DELTA * (meant - meant_function) + (1 - DELTA) * meant_function)
    mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
    return float(mean * (1 - GAMMA * (chunks / matched) ** BETA))


def meteor_counts(references: dict[int, list[str]], answers: dict[int, list[str]]) -> list[Counts]:
    """One row `[23]` per example, as the Java program gives it for the best-matching reference.

    Words of answer and reference, how many of them are function words; for each of four kinds of match the
    matched content words of both and function words of both; chunks, and matched words of both. An answer
    that equals its reference has no chunks.
    """
    given = (tuple((key, tuple(said)) for key, said in texts.items()) for texts in (references, answers))
    return _meteor_counts(*given)


@lru_cache(maxsize=32)  # a baseline is compared with many
def _meteor_counts(references: Any, answers: Any) -> list[Counts]:
    from pycocoevalcap.eval import Meteor

    scorer, rows = Meteor(), []
    align = scorer._stat

    def kept(*asked: Any) -> Any:
        line = align(*asked)
        row = list(map(float, line.split()))
        if row[20] == 1 and row[21:] == row[:2]:
            row[20] = 0.0
        rows.append(tuple(row))
        return line

    scorer._stat = kept
    scorer.compute_score(dict(references), dict(answers))
    return rows


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
    """One row `[10]` per example: matched n-grams and n-grams (n of 1 to 4), its length, its reference's."""
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

    captions = {k: [{"caption": text} for text in group] for k, group in enumerate(texts)}
    found: dict[int, list[str]] = PTBTokenizer().tokenize(captions)
    return found


def _kind(metric: str) -> str:
    found = re.search(r"(Bleu_[1-4]|METEOR|ROUGE_L|CIDEr)$", metric)
    return found[1] if found else ""
