"""Documents and pictures behind examples, for labels and figures."""

from typing import Any

from PIL import Image

from hones_eval.examples import TaskExamples
from hones_eval.examples.tasks import document


def document_of(examples: TaskExamples, index: int) -> dict[str, Any]:
    """A copy of the document behind an example, without its pictures."""
    return document(examples._task, examples._request(index).doc_id)


def pictures_of(examples: TaskExamples, index: int) -> list[Image.Image]:
    """The pictures that an example shows."""
    return examples._shown(examples._request(index))[1]


def keys_of(one: TaskExamples, other: TaskExamples) -> tuple[list[str], list[str]]:
    """What examples of two tasks are matched by: `question_id` where both have it, else the doc_id."""
    documents = [[document_of(task, index) for index in range(len(task))] for task in (one, other)]
    if all("question_id" in found for found in (documents[0][0], documents[1][0])):
        first, second = ([str(found["question_id"]) for found in some] for some in documents)
        return first, second
    first, second = ([str(task._request(i).doc_id) for i in range(len(task))] for task in (one, other))
    return first, second
