"""What the YAML files of the scenes tasks name: making the examples, scoring an answer, aggregating."""

import dataclasses
import warnings
from collections import defaultdict
from typing import Any

import datasets

from hones_eval.toy import scoring
from hones_eval.toy.documents import CANDIDATES, Document, documents
from hones_eval.toy.drawing import to_image
from hones_eval.toy.scenes import SceneError

Doc = dict[str, Any]


def make_documents(stub: datasets.Dataset) -> datasets.Dataset:
    """The examples of a task and split, in place of the one-row stub that lmms-eval loads without a network.

    `dataset_name` in the YAML file says which: task, variant and count, such as `ocr-edited-500`.
    """
    task, variant, count = str(stub.info.config_name).rsplit("-", 2)
    made = documents(task, variant, str(stub.split), int(count))  # type: ignore[arg-type]
    return datasets.Dataset.from_list([_row(document) for document in made], features=FEATURES)


def score_vqa(doc: Doc, results: list[str]) -> dict[str, float]:
    return {"exact_match": scoring.exact(results[0], doc["answer"])}


def score_ocr(doc: Doc, results: list[str]) -> dict[str, float]:
    return {
        "anls": scoring.anls(results[0], doc["answer"]),
        "exact_match": scoring.exact(results[0], doc["answer"]),
    }


def score_caption(doc: Doc, results: list[str]) -> dict[str, Any]:
    return {"bleu4": {"prediction": results[0], "references": list(doc["references"])}}


def score_retrieval(doc: Doc, results: list[str]) -> dict[str, Any]:
    says_yes = scoring.exact(results[0], "Yes")
    judged = {"query": doc["query"], "positive": doc["answer"] == "Yes", "score": says_yes}
    return {"ndcg_at_5": judged, "exact_match": scoring.exact(results[0], doc["answer"])}


def score_retrieval_margin(doc: Doc, results: list[str]) -> dict[str, Any]:
    """The margin of Yes over No; words, as lmms-eval's own wrappers answer, are no margin."""
    margin = float(results[0])
    return {"ndcg_at_5": {"query": doc["query"], "positive": doc["answer"] == "Yes", "score": margin}}


def score_grounding(doc: Doc, results: list[str]) -> dict[str, float]:
    overlap = scoring.iou(scoring.parse_box(results[0]), scoring.parse_box(doc["answer"]))
    return {"iou": overlap, "acc_iou50": float(overlap >= 0.5)}


def bleu4(items: list[dict[str, Any]]) -> float:
    """Corpus BLEU-4 over all captions."""
    return scoring.bleu4([item["prediction"] for item in items], [item["references"] for item in items])


def ndcg_at_5(items: list[dict[str, Any]]) -> float:
    """Mean NDCG@5 over the queries whose candidates are all there.

    A query that is there several times, as in a resample of images, counts as often.
    """
    queries: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for item in items:
        queries[item["query"]].append(item)
    times = {number: sum(item["positive"] for item in query) for number, query in queries.items()}
    whole = {
        number: query
        for number, query in queries.items()
        if times[number] and len(query) == times[number] * CANDIDATES
    }
    if not whole:
        raise SceneError(
            f"no retrieval query has all its {CANDIDATES} candidates; use a --limit of {CANDIDATES} or more"
        )
    if len(whole) < len(queries):
        warnings.warn(
            f"left out {len(queries) - len(whole)} retrieval queries cut off by --limit; "
            f"take multiples of {CANDIDATES}",
            stacklevel=2,
        )
    gains = {number: _ndcg(query, times[number]) for number, query in whole.items()}
    return sum(times[number] * gain for number, gain in gains.items()) / sum(times[n] for n in whole)


def _ndcg(query: list[dict[str, Any]], times: int) -> float:
    positive = next(item["score"] for item in query if item["positive"])
    once = sorted(item["score"] for item in query)[::times]  # every candidate is there as often
    return scoring.ndcg(once, once.index(positive))


def _row(document: Document) -> Doc:
    fields = {field.name: getattr(document, field.name) for field in dataclasses.fields(document)}
    return {"image": to_image(fields.pop("pixels")), **fields}


_TEXT, _TEXTS = datasets.Value("string"), datasets.List(datasets.Value("string"))
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "image_id": _TEXT,
        "prompt": _TEXT,
        "question": _TEXT,
        "answer": _TEXT,
        "references": _TEXTS,
        "level": _TEXT,
        "kind": _TEXT,
        "about": _TEXT,
        "shapes": _TEXTS,
        "shift": _TEXT,
        "query": datasets.Value("int64"),
    }
)
