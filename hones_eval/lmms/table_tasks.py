"""The functions that tasks written by `hones-eval task new` call: images and scores.

The task's folder has a `utils.py` that imports them, because `!function` in a task file only finds modules in
the folder of that file.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torchmetrics.functional.text import sacre_bleu_score

from hones_eval.core.images import as_displayed, refuse_truncated_images
from hones_eval.errors import TaskError


def images(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Read the image of an example as a viewer displays it. Raises: TaskError for an unreadable file."""
    try:
        with refuse_truncated_images(), Image.open(doc["image_path"]) as opened:
            return [as_displayed(opened)]
    except (OSError, SyntaxError) as error:
        raise TaskError(f"the image {doc['image_path']} cannot be read: {error}") from error


def question_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Whether the answer is one of the accepted answers, ignoring case, punctuation and spaces."""
    accepted = {_normalized(answer) for answer in doc["references"]}
    return {"exact_match": float(_normalized(answers[0]) in accepted)}


def caption_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The caption and its references, for `corpus_bleu`."""
    return {"bleu_4": {"answer": answers[0], "references": list(doc["references"])}}


def corpus_bleu(results: Sequence[Mapping[str, Any]]) -> float:
    """Corpus BLEU-4 in [0, 1] over all references, lower-cased, unsmoothed, by SacreBLEU's tokenizer 13a."""
    answers = [result["answer"] for result in results]
    references = [result["references"] for result in results]
    return float(sacre_bleu_score(answers, references, tokenize="13a", lowercase=True))


def box_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """IoU of the answer's first four numbers with the box, and whether it is at least 0.5."""
    gold, found = (box_in(text) for text in (doc["answer"], answers[0]))
    overlap = _iou(found, gold) if found and gold else 0.0
    return {"iou": overlap, "iou_at_least_50": float(overlap >= 0.5)}


def box_in(text: str) -> list[float] | None:
    """The first four numbers of a text: left, top, right, bottom. None if there are fewer."""
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)[:4]]
    return numbers if len(numbers) == 4 else None


def _normalized(text: str) -> str:
    """A text without case, punctuation and repeated spaces; one of symbols alone, such as `+`, keeps them."""
    folded = text.casefold()
    return " ".join(re.sub(r"[^\w\s]", " ", folded).split()) or " ".join(folded.split())


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    area = sum(max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0) for box in (a, b))
    return shared / (area - shared) if area > shared else 0.0
