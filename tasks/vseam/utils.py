"""What the YAML files of the V-SEAM tasks call: documents, prompts, images and scores."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

from hones_eval.errors import TaskError
from hones_eval.tasks.hones import utils as hones
from hones_eval.tasks.vseam import data

picture = hones.picture
_TEXT = datasets.Value("string")
_TEXTS = datasets.List(_TEXT)
FEATURES = datasets.Features(
    {
        **dict.fromkeys(("question_id", "question", "answer", "image_path", "entry"), _TEXT),
        **dict.fromkeys(("objects", "attributes", "relations", "classes"), _TEXTS),
    }
)


def make_documents(split: datasets.Dataset) -> datasets.Dataset:
    """The documents of a task and share of the images, in place of the one row that names the share.

    `dataset_name` in the YAML file says which: the set, its part, and whose images, as `gqa-animal-edited`.
    """
    name = str(split.info.config_name)
    kind, part, shown = name.split("-")
    source = {"gqa": data.gqa, "pope": data.pope, "cocoqa": data.cocoqa}[kind](part)
    wanted = ["picture"] if shown == "clean" else ["picture", "edited_picture"]
    rows: list[dict[str, Any]] = []
    for question in data.with_pictures(source, wanted, split[0]["low"], split[0]["high"]):
        rows += [_row(question, True)] if shown == "edited" else [_row(question, False)]
        if shown == "both":
            rows.append(_row(question, True) | {"question_id": f"{question.id} edited"})
    classes = _classes(kind, rows)
    _warn_of_one_class(data.task_name(name, str(split.split)), source, classes, rows)
    return datasets.Dataset.from_list([row | {"classes": classes} for row in rows], features=FEATURES)


def _row(one: data.Question, edited: bool) -> dict[str, Any]:
    answer = one.edited_answer if edited else one.answer
    if answer is None:
        raise TaskError(
            f"{one.name}: its answer {one.answer!r} is neither Yes nor No, so the answer after the edit has "
            "to be given as edited_answer"
        )
    return {
        "question_id": one.id,
        "question": one.question,
        "answer": answer,
        "image_path": str(one.edited_picture if edited else one.picture),
        "entry": one.name,
        "objects": list(one.objects),
        "attributes": list(one.attributes),
        "relations": list(one.relations),
    }


def _classes(kind: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answers that a model could give: Yes and No to such questions, else those of the set."""
    found = sorted({_said(row["answer"]) for row in rows})
    return ["no", "yes"] if kind == "pope" or set(found) <= {"no", "yes"} else found


def _warn_of_one_class(
    task: str, source: data.Source, classes: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> None:
    counts = Counter(_said(row["answer"]) for row in rows)
    if len(counts) == 1:
        (only,) = counts
        absent = ", ".join(label for label in classes if label != only)
        data.warn_once(
            f"{task}: all {len(rows)} answers of {source.path} are {only!r}, so a model that always says so "
            f"has an accuracy of 1; balanced_accuracy counts {absent} as 0, and the tasks that end in _both "
            "ask for either answer"
        )


def single_word(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """The paper's prompt: LLaVA's, and with `Question:` in front for InstructBLIP."""
    before, after = lmms_eval_specific_kwargs["pre_prompt"], lmms_eval_specific_kwargs["post_prompt"]
    return f"{before}{doc['question']}{after}"


def results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """Whether the first word is the answer, and what the balanced score needs.

    Words are normalized as on EvalAI: case, punctuation, and `two` as `2`.
    """
    gold, said = _said(doc["answer"]), _said(answers[0])
    item = {"gold": gold, "said": said, "classes": list(doc["classes"])}
    return {"accuracy": float(said == gold), "balanced_accuracy": item}


def yes_no_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """As `results`, and what the scores of yes/no questions need."""
    found = results(doc, answers)
    return found | dict.fromkeys(("f1_yes", "yes_share"), found["balanced_accuracy"])


def balanced_accuracy(items: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the possible answers of the share of their questions that are answered right.

    A possible answer that no question has counts as 0: nothing shows that the model ever gives it. Saying
    Yes to everything is then worth one half, whatever the answers are.
    """
    total = 0.0
    for element in items[0]["classes"]:
        said = [item["said"] for item in items if item["gold"] == element]
        total += said.count(element) / len(said) if said else 0.0
    return total / len(items[0]["classes"])


def f1_yes(items: Sequence[Mapping[str, Any]]) -> float:
    """F1 of Yes, POPE's main score; 0 when Yes is neither right nor given once."""
    right = sum(item["said"] == item["gold"] == "yes" for item in items)
    asked = sum(item["gold"] == "yes" for item in items) + sum(item["said"] == "yes" for item in items)
    return 2 * right / asked if asked else 0.0


def yes_share(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of questions that are answered with Yes."""
    return sum(item["said"] == "yes" for item in items) / len(items)


def _said(answer: str) -> str:
    words = EvalAIAnswerProcessor()(answer.strip()).split()
    return str(words[0]) if words else ""
