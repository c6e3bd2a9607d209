"""The functions that the YAML files of the HONES tasks call: documents, prompts, images and scores."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lmms_eval.api.metrics import levenshtein_distance
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from loguru import logger
from PIL import ExifTags, Image, ImageDraw
from torchmetrics.functional.text import sacre_bleu_score

from hones_eval.core.images import as_displayed, refuse_truncated_images
from hones_eval.errors import TaskError
from hones_eval.tasks.hones import retrieval
from hones_eval.tasks.hones.data import Entry, annotation_file, entries
from hones_eval.tasks.hones.elsewhere import DATA_SETS, entries_elsewhere

BOX_WIDTH = 3


# Documents. Each takes the one-row data set of a file in splits/, which names a share of the images, or
# another data set.


def vqa_docs(split: Dataset) -> Dataset:
    """One document per entry: question and answers."""

    def row(entry: Entry) -> dict[str, Any]:
        return {"question": entry.need("vqa", "question"), "answers": _answers(entry)}

    return _rows(split, row)


def ocr_docs(split: Dataset) -> Dataset:
    """One document per entry with a text region; entries without are counted in the log."""

    def row(entry: Entry) -> dict[str, Any] | None:
        if not entry.content.get("ocr"):
            return None
        return {"text": str(entry.need("ocr", "text")), "bbox": entry.need_box("ocr", "bbox")}

    return _rows(split, row)


def caption_docs(split: Dataset) -> Dataset:
    """One document per entry: all captions of the image."""
    return _rows(split, lambda entry: {"references": _captions(entry)})


def grounding_docs(split: Dataset) -> Dataset:
    """One document per entry with a phrase and its box, as corners in shares of the image's sides."""

    def row(entry: Entry) -> dict[str, Any] | None:
        if not entry.content.get("grounding"):
            return None
        with Image.open(entry.image) as opened:
            sideways = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            size = (opened.height, opened.width) if sideways else opened.size
        corners = _corners(entry.need_box("grounding", "bbox"), *size)
        return {"phrase": entry.need("grounding", "phrase"), "bbox": corners}

    return _rows(split, row)


def retrieval_docs(split: Dataset) -> Dataset:
    """One document per candidate: each image's first caption, then the captions of others most like it."""
    path, chosen = _chosen(split)
    captions = [_captions(entry) for entry in chosen]
    pool = [(text, owner) for owner, texts in enumerate(captions) for text in texts]
    texts, owners = [text for text, _ in pool], [owner for _, owner in pool]
    negatives = retrieval.hard_negatives([texts[0] for texts in captions], texts, owners)
    fewest = min(map(len, negatives))
    if fewest == 0:
        raise TaskError(f"{path}: retrieval needs captions of at least two images in a split")
    if fewest < retrieval.NEGATIVES:
        logger.warning(
            f"{path}: {len(chosen)} images give as few as {fewest} negatives a query, "
            f"not {retrieval.NEGATIVES}: NDCG@5 comes out higher than with all"
        )
    rows = []
    for query, (entry, own, wrong) in enumerate(zip(chosen, captions, negatives, strict=True)):
        candidates = [(own[0], True), *((texts[index], False) for index in wrong)]
        rows += [
            _base(entry) | {"query": query, "candidate": text, "positive": right}
            for text, right in candidates
        ]
    return Dataset.from_list(rows)


def _rows(split: Dataset, row: Callable[[Entry], dict[str, Any] | None]) -> Dataset:
    path, chosen = _chosen(split)
    rows, faults = [], []
    for entry in chosen:
        try:
            content = row(entry)
        except TaskError as error:
            faults.append(str(error))
            continue
        if content is not None:
            rows.append(_base(entry) | content)
    if len(faults) == 1:
        raise TaskError(faults[0])
    if faults:
        raise TaskError(
            f"{faults[0]}; so it is with {len(faults)} of {len(chosen)} entries: mend or remove them"
        )
    if len(rows) < len(chosen):
        logger.warning(f"{path}: {len(chosen) - len(rows)} of {len(chosen)} entries have no such annotation")
    if not rows:
        raise TaskError(f"{path}: none of {len(chosen)} entries of this split has the annotation")
    return Dataset.from_list(rows)


def _chosen(split: Dataset) -> tuple[Path, list[Entry]]:
    """The annotation file, and the entries of it that a split stands for."""
    name, low, high = split[0]["name"], split[0]["low"], split[0]["high"]
    return entries_elsewhere(name) if name in DATA_SETS else (annotation_file(), entries(low, high))


def _base(entry: Entry) -> dict[str, Any]:
    return {"image_path": str(entry.image), "entry": entry.name}


def _answers(entry: Entry) -> list[str]:
    """The answers of several people, under either of their two names."""
    vqa = entry.need("vqa")
    for key in ("answers", "all_answers"):
        if vqa.get(key):
            return [str(answer) for answer in vqa[key]]
    raise TaskError(f"{entry.name}: its vqa has neither answers nor all_answers")


def _captions(entry: Entry) -> list[str]:
    try:
        texts = [str(caption["caption"]).strip() for caption in entry.need("captions")]
    except (TypeError, KeyError):
        raise TaskError(f'{entry.name}: its captions are not of the form [{{"caption": ...}}, ...]') from None
    if not all(texts):
        raise TaskError(f"{entry.name}: caption {texts.index('')} of it is empty")
    return texts


# Images


def picture(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Give the image as it is seen; a truncated image, which lmms-eval would fill with grey, is an error."""
    try:
        with refuse_truncated_images(), Image.open(doc["image_path"]) as opened:
            return [as_displayed(opened)]
    except (OSError, SyntaxError) as error:
        raise TaskError(f"{doc['entry']}: the image {doc['image_path']} cannot be read: {error}") from error


def picture_with_box(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Give the image with a blue box round the text region."""
    (shown,) = picture(doc)
    x0, y0, x1, y1 = _corners(doc["bbox"], 1, 1)
    outline = [max(x0, 0), max(y0, 0), min(x1, shown.width - 1), min(y1, shown.height - 1)]
    if outline[2] <= outline[0] or outline[3] <= outline[1]:
        raise TaskError(f"{doc['entry']}: its text box {doc['bbox']} lies outside of the image {shown.size}")
    ImageDraw.Draw(shown).rectangle(outline, outline="blue", width=BOX_WIDTH)
    return [shown]


def _corners(box: Sequence[float], width: int, height: int) -> list[float]:
    x, y, w, h = box
    return [x / width, y / height, (x + w) / width, (y + h) / height]


# Prompts, as in the HONES release


def vqa_prompt(doc: Mapping[str, Any]) -> str:
    """Give the question."""
    return f"Question: {doc['question']}\nAnswer the question with a short phrase."


def retrieval_prompt(doc: Mapping[str, Any]) -> str:
    """Give the question whether a caption fits."""
    question = "Does the candidate correctly describe the image?\nAnswer exactly Yes or No."
    return f"Candidate: {doc['candidate']}\n{question}"


def grounding_prompt(doc: Mapping[str, Any]) -> str:
    """Give the phrase to find; not of the release, which has no such task."""
    return (
        f"Where is this in the image: {doc['phrase']}\n"
        "Answer with the corners [left, top, right, bottom] as shares of the image's width and height."
    )


# Gold answers


def vqa_target(doc: Mapping[str, Any]) -> str:
    """Give the most common answer."""
    return statistics.mode(doc["answers"])


def retrieval_target(doc: Mapping[str, Any]) -> str:
    """Give Yes for the image's own caption."""
    return "Yes" if doc["positive"] else "No"


def grounding_target(doc: Mapping[str, Any]) -> str:
    """Give the box as the prompt asks for it."""
    return "[" + ", ".join(f"{item:.2f}" for item in doc["bbox"]) + "]"


# Scores


def vqa_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """VQA accuracy: over each person left out, a third for each of the others who agree, at most 1; averaged.

    Answers are normalized as on EvalAI (Antol et al. 2015, https://visualqa.org/evaluation.html).
    """
    normalize = EvalAIAnswerProcessor()
    given = normalize(answers[0])
    agrees = [normalize(answer) == given for answer in doc["answers"]]
    return {"vqa_accuracy": statistics.mean(min(1.0, (sum(agrees) - match) / 3) for match in agrees)}


def exact_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Whether the answer equals the single gold answer, as for GQA; both normalized as on EvalAI."""
    normalize = EvalAIAnswerProcessor()
    return {"exact_match": float(normalize(answers[0]) == normalize(doc["answers"][0]))}


def ocr_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """ANLS with threshold 0.5: 1 minus the edit distance over the longer length, 0 below one half.

    Case and runs of spaces do not count (Biten et al. 2019, equation 1).
    """
    gold, given = (" ".join(text.lower().split()) for text in (doc["text"], answers[0]))
    similarity = 1 - levenshtein_distance(gold, given) / max(len(gold), len(given))
    return {"anls": similarity if similarity >= 0.5 else 0.0}


def caption_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The answer and the references of a document, for corpus BLEU."""
    return {"bleu_4": {"said": answers[0], "references": list(doc["references"])}}


def bleu_4(results: Sequence[Mapping[str, Any]]) -> float:
    """Corpus BLEU-4 in [0, 1] over all references, lower-cased, unsmoothed, by SacreBLEU's tokenizer 13a."""
    texts = [result["said"] for result in results]
    return float(
        sacre_bleu_score(texts, [result["references"] for result in results], tokenize="13a", lowercase=True)
    )


def retrieval_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The score of a candidate for NDCG@5: the margin of Yes over No.

    A model that answers in words, as lmms-eval's own wrappers do, is scored under another name: 1 for an
    answer that begins with the word Yes, else 0.
    """
    margin = retrieval.margin_in(answers[0])
    yes = re.match(r"\W*yes\b", answers[0], re.IGNORECASE) is not None
    name = "ndcg_at_5_by_words" if margin is None else "ndcg_at_5"
    score = float(yes) if margin is None else margin
    return {name: {"query": doc["query"], "positive": doc["positive"], "score": score}}


ndcg_at_5 = retrieval.ndcg_at_5


def grounding_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Intersection over union of the answer's first four numbers with the box; 0 where there are not four."""
    numbers = [float(match) for match in re.findall(r"-?\d+(?:\.\d+)?", answers[0])[:4]]
    return {"iou": _iou(numbers, doc["bbox"]) if len(numbers) == 4 else 0.0}


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0.0) * max(high, 0.0)
    area = sum(max(item[2] - item[0], 0.0) * max(item[3] - item[1], 0.0) for item in (a, b))
    return shared / (area - shared) if area > shared else 0.0
