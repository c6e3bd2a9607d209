"""Gold answers: chosen by name or column and proven, on plain documents. Real tasks are in benchmarks."""

from collections.abc import Callable
from typing import Any

import pytest

from hones_eval.errors import TaskError
from hones_eval.lmms import targets
from hones_eval.lmms.targets import Adapter, Gold


def exact(docs: list[dict[str, Any]], column: str, best: float = 1.0) -> Callable[[list[str]], float]:
    """The share of answers equal to the column, times the metric's best value."""
    return lambda texts: (
        best * sum(text == doc[column] for text, doc in zip(texts, docs, strict=True)) / len(docs)
    )


def chosen(docs: list[dict[str, Any]], column: str, native: Adapter | None = None, **more: Any) -> Gold:
    task, metric = more.pop("task", "own"), more.pop("metric", "exact_match")
    score = more.pop("score", exact(docs, column))
    candidate = targets.choose(
        task, metric, docs, native or (lambda doc: targets.most_common(["answer"])), score, **more
    )
    return candidate.adapter(docs[0])


DOCS = [{"question": f"q{i}", "answer": "wrong", "label": f"right {i}", "gold": i} for i in range(4)]


def test_the_proof_decides_and_not_the_order() -> None:
    assert chosen(DOCS, "label") == Gold("right 0", ["right 0"])
    assert chosen(DOCS, "label", native=targets.alternatives("label")).target == "right 0"


def test_another_scale_is_proven_against_the_best_candidate() -> None:
    def score(texts: list[str]) -> float:  # of 100; the wrong answer gets a point
        return sum(25 if text.startswith("right") else 0.25 * (text == "wrong") for text in texts)

    assert chosen(DOCS, "label", score=score).target == "right 0"


def test_lower_may_be_better() -> None:
    def errors(texts: list[str]) -> float:
        return sum(text != doc["label"] for text, doc in zip(texts, DOCS, strict=True)) / 4

    assert chosen(DOCS, "label", score=errors, higher_is_better=False).target == "right 0"


def test_an_unproven_target_is_an_error_with_the_way_out() -> None:
    with pytest.raises(TaskError) as caught:
        chosen(DOCS, "question")
    said = str(caught.value)
    assert "could not find the gold answer of task own" in said
    assert "doc_to_target: 0" in said
    assert "column label: 0" in said
    assert "with --target; the columns are question, answer, label, gold" in said
    assert chosen(DOCS, "question", override="question").target == "q0"
    assert chosen(DOCS, "question", override="{{question}}").target == "q0"
    with pytest.raises(TaskError, match="x: no text"):
        chosen(DOCS, "question", override="x")
    with pytest.raises(TaskError, match=r"not a template over the columns \('colour' is undefined"):
        chosen(DOCS, "question", override="{{colour}}")
    with pytest.raises(TaskError, match=r"not a template over the columns \(unexpected end of template"):
        chosen(DOCS, "question", override="{{ question")


def test_missing_answers_are_reported() -> None:
    docs = [{"question": "q", "answers": None}]
    with pytest.raises(TaskError, match=r"adapter of vqav2\*: no text"):
        chosen(docs, "question", task="vqav2_test")


def test_a_document_without_an_answer_does_not_hide_the_answers_of_others() -> None:
    docs = [*DOCS[:3], DOCS[3] | {"label": ""}]
    assert chosen(docs, "label").target == "right 0"


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("  a ", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([{"answer": "a", "answer_id": 1}, {"answer": "b", "answer_id": 2}], ["a", "b"]),
        ({"answer": ["a", "b"], "answer_id": [1, 2]}, ["a", "b"]),
        ([{"raw": "a"}], ["a"]),
        (3, ["3"]),
    ],
)
def test_texts_are_found_in_every_form_of_column(value: Any, texts: list[str]) -> None:
    assert targets.texts_in(value) == texts


@pytest.mark.parametrize("value", [None, "", [None], {}, {"x": 1}])
def test_a_column_without_text_is_an_error(value: Any) -> None:
    with pytest.raises(LookupError):
        targets.texts_in(value)


def test_captions_are_joined_and_alternatives_are_counted() -> None:
    docs = [{"captions": [f"{i} one", f"{i} two", "three", "four", "five", "six"]} for i in range(3)]
    first = {doc["captions"][0] for doc in docs}
    gold = chosen(docs, "", metric="my_CIDEr", score=lambda texts: len(set(texts) & first) / 3)
    assert gold == Gold("0 one 0 two three four five", docs[0]["captions"][:5])
    assert targets.most_common(["b", "a", "c", "a"]) == Gold("a", ["a", "b", "c"])
