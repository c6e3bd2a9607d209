"""Caption metrics of resampled examples from counts, beside what lmms-eval's own scorers give for them."""

import random
import shutil
from typing import Any

import numpy as np
import pytest
from pycocoevalcap.eval import Bleu, Meteor, PTBTokenizer

from hones_eval.leaderboard.captions import caption_scores, corpus_function

pytestmark = pytest.mark.skipif(not shutil.which("java"), reason="caption metrics are read by java")

GOLDS = [
    ["A man rides a brown horse along the beach.", "A person on a horse near the sea"],
    ["Two dogs are running in the park.", "Dogs play on the grass"],
    ["A red bus stops at the corner of a busy street."],
    ["A plate with a sandwich and french fries on a table", "Some food on a white plate"],
    ["a cat sleeps on the sofa"],
    ["Children are flying kites on a windy day.", "Kids with kites"],
]
ANSWERS = [
    "A man riding horses at the beach",
    "two dogs run through a park",
    "the automobile halted close to the street corner",
    "a dish with sandwiches",
    "a cat sleeps on the sofa",
    "zebra",
]
ITEMS: list[dict[str, Any]] = [
    {"answer": gold, "pred": answer, "image_id": place}
    for place, (gold, answer) in enumerate(zip(GOLDS, ANSWERS, strict=True))
]


@pytest.fixture(scope="module")
def tokens() -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    golds = {k: [{"caption": text} for text in gold] for k, gold in enumerate(GOLDS)}
    said = {k: [{"caption": answer}] for k, answer in enumerate(ANSWERS)}
    return PTBTokenizer().tokenize(golds), PTBTokenizer().tokenize(said)


@pytest.fixture(scope="module")
def scorers() -> dict[str, Any]:
    return {"METEOR": Meteor(), "Bleu_4": Bleu(4)}


@pytest.mark.parametrize("metric", ["METEOR", "Bleu_4"])
def test_counts_give_the_metric_of_any_sample(metric: str, tokens: Any, scorers: dict[str, Any]) -> None:
    counts = caption_scores(f"coco_{metric}", ITEMS)
    assert isinstance(counts, list)
    function, draw = corpus_function(f"coco_{metric}"), random.Random(0)
    everything = list(range(len(ITEMS)))
    samples = [
        everything,
        [4],
        [4, 4],
        [5],
        *([draw.choice(everything) for _ in everything] for _ in range(6)),
    ]
    found = [function([counts[k] for k in drawn]) for drawn in samples]
    expected = []
    for drawn in samples:
        chosen = [{place: one[k] for place, k in enumerate(drawn)} for one in tokens]
        score = scorers[metric].compute_score(*chosen)[0]
        expected.append(score[3] if metric == "Bleu_4" else score)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert len({round(one, 6) for one in found}) > 5


def test_meteor_knows_what_is_no_match_and_what_is_word_for_word() -> None:
    counts: Any = caption_scores("coco_METEOR", ITEMS)
    function = corpus_function("coco_METEOR")
    assert function([counts[5]]) == 0.0
    assert function([counts[4]]) == 1.0
    assert all(isinstance(row, tuple) and len(row) == 23 for row in counts)
    assert np.isfinite(np.array(counts)).all()
