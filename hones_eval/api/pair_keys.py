"""What examples of two tasks are matched by."""

from hones_eval.lmms.examples import TaskExamples


def keys_of(one: TaskExamples, other: TaskExamples) -> tuple[list[str], list[str]]:
    """What examples of two tasks are matched by: `question_id` where both have it, else the doc_id."""
    documents = [[task.document(index) for index in range(len(task))] for task in (one, other)]
    if all("question_id" in found for found in (documents[0][0], documents[1][0])):
        first, second = ([str(found["question_id"]) for found in some] for some in documents)
        return first, second
    first, second = ([str(task.doc_id(i)) for i in range(len(task))] for task in (one, other))
    return first, second
