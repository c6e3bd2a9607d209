"""The scenes tasks as lmms-eval sees them, and their metrics against slow references."""

import functools
import importlib.util
import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from lmms_eval.tasks import TaskManager, get_task_dict

from hones_eval.toy import scoring
from hones_eval.toy.documents import CANDIDATES, KIND_TASKS, Task, documents
from hones_eval.toy.scenes import SceneError

FOLDER = Path(__file__).resolve().parent.parent / "tasks" / "scenes"
TASKS = get_args(Task)


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"scenes_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(FOLDER), include_defaults=False, model_name="llava_hf")


def task_of(manager: TaskManager, name: str, task_type: str = "chat") -> Any:
    return get_task_dict([name], manager, task_type=task_type)[name]


def score(task: Any, split: str, answers: list[str]) -> dict[str, float]:
    docs = task.dataset_no_image[split].select(range(len(answers)))
    scored = [task.process_results(doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
    return {metric: task.aggregation()[metric]([item[metric] for item in scored]) for metric in scored[0]}


def test_every_yaml_file_is_the_one_that_write_makes() -> None:
    expected = load("write").task_files()
    found = {path.relative_to(FOLDER): path.read_text(encoding="utf-8") for path in FOLDER.glob("*/*.yaml")}
    assert found == expected, "run python tasks/scenes/write.py"


def test_all_tasks_are_listed(manager: TaskManager) -> None:
    wanted = {f"scenes_{task}{variant}" for task in TASKS for variant in ("", "_edited", "_shifted")}
    named = {f"scenes_ocr_shifted_{shift}_discovery" for shift in ("noise", "font", "extra_object")}
    splits = {f"scenes_{task}_{split}" for task in TASKS for split in ("discovery", "development")}
    kinds = {f"scenes_{task}{shown}_discovery" for task in KIND_TASKS for shown in ("", "_shifted")}
    assert wanted | named | splits | kinds <= set(manager.all_subtasks)
    assert "scenes" in manager.all_tags


@pytest.mark.parametrize("task_type", ["chat", "simple"])
@pytest.mark.parametrize("name", [f"scenes_{task}" for task in (*TASKS, "vqa_exists", "vqa_what_side")])
def test_the_gold_answer_scores_full_marks_and_another_less(
    manager: TaskManager, name: str, task_type: str
) -> None:
    task = task_of(manager, name, task_type)
    docs = list(task.dataset_no_image["test"].select(range(60)))
    gold = [task.doc_to_target(doc) for doc in docs]
    assert score(task, "test", gold) == pytest.approx(dict.fromkeys(task.aggregation(), 1.0))
    worse = score(task, "test", gold[1:] + gold[:1])
    assert all(value < 0.95 for value in worse.values())


@pytest.mark.parametrize("name", ["scenes_ocr", "scenes_retrieval_shifted_development"])
def test_a_chat_model_gets_the_image_and_the_prompt(manager: TaskManager, name: str) -> None:
    task = task_of(manager, name)
    doc = task.test_docs()[0]
    (turn,) = task.doc_to_messages(doc)
    picture, text = turn["content"]
    assert picture["url"].size == (64, 64)
    assert text["text"] == doc["prompt"]
    split = "development" if name.endswith("development") else "test"
    assert doc["image_id"].startswith(split)


@pytest.mark.parametrize("task", TASKS)
def test_edited_twins_ask_the_same_of_another_image(task: Task) -> None:
    clean, edited = documents(task, "plain", "test", 60), documents(task, "edited", "test", 60)
    for one, other in zip(clean, edited, strict=True):
        assert one.prompt == other.prompt
        assert one.image_id != other.image_id
        assert (one.pixels != other.pixels).any()
        if task != "retrieval":
            assert not set(one.references) & set(other.references)
    if task == "retrieval":
        assert Counter(d.answer for d in edited) == Counter(d.answer for d in clean)
        assert any(one.answer != other.answer for one, other in zip(clean, edited, strict=True))


@pytest.mark.parametrize("variant", ["plain", "edited", "shifted"])
def test_no_image_is_in_two_splits_and_an_id_names_one_image(variant: str) -> None:
    by_split = [
        {d.image_id: d.pixels.tobytes() for task in TASKS for d in documents(task, variant, split, 100)}  # type: ignore[arg-type]
        for split in ("discovery", "development", "test")
    ]
    for one, other in itertools.combinations(by_split, 2):
        assert not set(one) & set(other)
        assert not set(one.values()) & set(other.values())
    assert all(len(set(pictures.values())) == len(pictures) for pictures in by_split)


@pytest.mark.parametrize(("task", "kind"), KIND_TASKS.items())
def test_a_kind_is_asked_alone_and_yes_as_often_as_no(task: str, kind: str) -> None:
    clean, edited = documents(task, "plain", "test", 100), documents(task, "edited", "test", 100)
    for one, other in zip(clean, edited, strict=True):
        assert one.kind == kind
        assert one.prompt == other.prompt
        assert one.answer != other.answer
    answers = Counter(item.answer for item in clean)
    assert (answers == {"Yes": 50, "No": 50}) == (kind in ("exists", "is_color", "is_texture", "is_side"))
    with pytest.raises(SceneError, match="of the test split have a question of vqa_what_side"):
        documents("vqa_what_side", "edited", "test", 1000)


@pytest.mark.parametrize("task", TASKS)
def test_fewer_documents_are_the_first_of_more(task: Task) -> None:
    some, more = documents(task, "shifted", "test", 25), documents(task, "shifted", "test", 45)
    assert [(d.image_id, d.prompt, d.answer) for d in some] == [
        (d.image_id, d.prompt, d.answer) for d in more[:25]
    ]


def test_requests_for_what_is_not_there_are_errors() -> None:
    with pytest.raises(SceneError, match="asked for 1001 images of the test split"):
        documents("ocr", "plain", "test", 1001)
    with pytest.raises(SceneError, match="no variant 'fog' of scenes; there are plain, edited"):
        documents("ocr", "fog", "test", 1)  # type: ignore[arg-type]
    with pytest.raises(SceneError, match="no scenes task 'vqa'; there are vqa_object"):
        documents("vqa", "plain", "test", 1)  # type: ignore[arg-type]


def test_a_model_that_says_yes_to_all_retrieves_nothing(manager: TaskManager) -> None:
    task = task_of(manager, "scenes_retrieval")
    assert score(task, "test", ["Yes"] * 60)["ndcg_at_5"] == 0
    assert score(task, "test", ["No"] * 60)["ndcg_at_5"] == 0


def test_a_limit_that_cuts_every_query_is_an_error(manager: TaskManager) -> None:
    task = task_of(manager, "scenes_retrieval")
    with pytest.raises(SceneError, match="has all its 10 candidates; use a --limit of 10 or more"):
        score(task, "test", ["No"] * (CANDIDATES - 1))
    with pytest.warns(UserWarning, match="left out 1 retrieval queries cut off by --limit"):
        score(task, "test", ["No"] * (CANDIDATES + 1))


def test_a_query_that_a_resample_draws_twice_counts_twice() -> None:
    rng = random.Random(5)
    queries = [
        [{"query": query, "positive": i == 4, "score": rng.randrange(9)} for i in range(CANDIDATES)]
        for query in range(6)
    ]
    ndcg_at_5 = load("utils").ndcg_at_5
    alone = [ndcg_at_5(query) for query in queries]
    drawn = [0, 3, 3, 5, 0, 0, 2]
    together = [item for query in drawn for item in queries[query]]
    expected = pytest.approx(sum(alone[query] for query in drawn) / len(drawn))
    assert len(set(alone)) > 2
    assert ndcg_at_5(together) == expected
    rng.shuffle(together)
    assert ndcg_at_5(together) == expected


def slow_distance(a: str, b: str) -> int:
    @functools.cache
    def rest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        if a[i] == b[j]:
            return rest(i + 1, j + 1)
        return 1 + min(rest(i + 1, j), rest(i, j + 1), rest(i + 1, j + 1))

    return rest(0, 0)


def test_levenshtein_agrees_with_the_recursive_definition() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("ABC", k=rng.randrange(7))) for _ in range(2))
        assert scoring.levenshtein(a, b) == slow_distance(a, b)
    assert scoring.anls("BAK", "bat") == pytest.approx(2 / 3)
    assert scoring.anls("BOT", "MAK") == 0


def test_ndcg_agrees_with_sorting_the_positive_last_among_equals() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scores = [rng.choice((0.0, 0.5, 1.0)) for _ in range(8)]
        ranked = sorted(range(8), key=lambda i: (-scores[i], i == 3))
        gains = [1 / math.log2(2 + place) * (i == 3) for place, i in enumerate(ranked[:5])]
        assert scoring.ndcg(scores, 3) == pytest.approx(sum(gains))


def test_iou_agrees_with_counting_pixels() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ((rng.randrange(9), rng.randrange(9), rng.randrange(17), rng.randrange(17)) for _ in range(2))
        pixels = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
        both, either = pixels[0] & pixels[1], pixels[0] | pixels[1]
        assert scoring.iou(a, b) == pytest.approx(len(both) / len(either) if both else 0.0)
    assert scoring.iou(scoring.parse_box("no box here at all"), (0, 0, 4, 4)) == 0


def test_bleu_agrees_with_its_formula() -> None:
    said, references = (
        ["a red ring above a blue star", "a star"],
        [["a red ring left of a blue star"], ["a star"]],
    )
    logs = []
    for n in range(1, 5):
        hits = total = 0
        for one, gold in zip(said, references, strict=True):
            grams = [Counter(zip(*(t.split()[i:] for i in range(n)), strict=False)) for t in (one, gold[0])]
            hits, total = hits + (grams[0] & grams[1]).total(), total + grams[0].total()
        logs.append(math.log(hits / total) if hits else -math.inf)
    length, wanted = 9, 10
    assert scoring.bleu4(said, references) == pytest.approx(
        math.exp(sum(logs) / 4 + 1 - wanted / length), abs=1e-6
    )
