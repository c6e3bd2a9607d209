"""The metrics of the scenes tasks, as pure functions. All are 1 for the gold answer and at most 1."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hones_eval.toy.scenes import Box


def exact(prediction: str, answer: str) -> float:
    """1 if the prediction equals the answer, ignoring case, surrounding spaces and a final full stop."""
    return float(prediction.strip().rstrip(".").lower() == answer.strip().rstrip(".").lower())


def anls(prediction: str, answer: str) -> float:
    """Normalized Levenshtein similarity, 0 below one half (Biten et al. 2019, 'Scene Text VQA', eq. 1)."""
    a, b = prediction.strip().lower(), answer.strip().lower()
    similarity = 1 - levenshtein(a, b) / max(len(a), len(b), 1)
    return similarity if similarity >= 0.5 else 0.0


def levenshtein(a: str, b: str) -> int:
    """Edit distance: the fewest insertions, deletions and replacements that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def parse_box(text: str) -> Box | None:
    """Parse four numbers: left, top, right, bottom. None for any other text."""
    words = text.split()
    if len(words) != 4 or not all(word.isdigit() for word in words):
        return None
    left, top, right, bottom = (int(word) for word in words)
    return left, top, right, bottom


def iou(prediction: Box | None, answer: Box) -> float:
    """Intersection over union of two boxes in pixels; 0 without a prediction or if it is inside out."""
    if prediction is None:
        return 0.0
    both = _area(
        (
            max(prediction[0], answer[0]),
            max(prediction[1], answer[1]),
            min(prediction[2], answer[2]),
            min(prediction[3], answer[3]),
        )
    )
    union = _area(prediction) + _area(answer) - both
    return both / union if both else 0.0


def ndcg(scores: Sequence[float], positive: int, k: int = 5) -> float:
    """NDCG@k of one query with one relevant candidate: 1 / log2(1 + rank), or 0 beyond rank k.

    Candidates that score as high as the positive one rank before it, so a model that answers Yes to all
    candidates gains nothing.
    """
    rank = sum(score >= scores[positive] for score in scores)
    return 1 / math.log2(1 + rank) if rank <= k else 0.0


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 (Papineni et al. 2002): one score for all captions, each with its references.

    Computed from cached counts, so that bootstrap resamples only need sums.
    """
    pairs = zip(predictions, references, strict=True)
    return bleu_of_counts([bleu_counts(said, tuple(golds)) for said, golds in pairs])


@lru_cache(maxsize=200_000)
def bleu_counts(prediction: str, references: tuple[str, ...]) -> tuple[float, ...]:
    """The counts that BLEU-4 sums over captions: matches and n-grams for n of 1 to 4, and both lengths."""
    from torchmetrics.text import BLEUScore

    metric = BLEUScore(n_gram=4)
    metric.update([prediction], [references])
    parts = (*metric.numerator, *metric.denominator, metric.preds_len, metric.target_len)
    return tuple(float(part) for part in parts)


def bleu_of_counts(counts: Sequence[Sequence[float]]) -> float:
    """Corpus BLEU-4 of captions given by their counts; 0 if no n-gram of some length matches."""
    total = np.sum(np.asarray(counts, dtype=np.float64), axis=0)
    matches, ngrams, said, gold = total[:4], total[4:8], total[8], total[9]
    if matches.min() == 0:
        return 0.0
    return float(np.exp(np.log(matches / ngrams).mean() + min(0.0, 1 - gold / said)))


def _area(box: Box) -> int:
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])
