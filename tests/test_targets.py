"""Gold answers: chosen by name or column and proven, on plain documents and on lmms-eval's own tasks."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Image, Value
from hub import serving
from lmms_runs import hub_repositories, parquet, picture

from hones_eval import targets
from hones_eval.errors import TaskError
from hones_eval.targets import Adapter, Gold


def exact(docs: list[dict[str, Any]], column: str, best: float = 1.0) -> Callable[[list[str]], float]:
    """The share of answers that are the column's, times the metric's best value."""
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


def test_what_cannot_be_proven_is_an_error_that_says_how_to_go_on() -> None:
    with pytest.raises(TaskError) as caught:
        chosen(DOCS, "question")
    said = str(caught.value)
    assert "task own shows no gold answer" in said
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


def test_answers_that_are_not_there_are_said() -> None:
    docs = [{"question": "q", "answers": None}]
    with pytest.raises(TaskError, match=r"adapter of vqav2\*: no text"):
        chosen(docs, "question", task="vqav2_test")


def test_a_document_without_an_answer_does_not_hide_those_of_the_others() -> None:
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


def more_repositories() -> dict[str, dict[str, bytes]]:
    """The data sets of textvqa_val, docvqa_val and flickr30k_test."""
    text = Value("string")
    common = {"image": Image(), "question": text}
    words = ["stop", "one way", "exit", "sale"]
    rows = [{"image": picture(i), "question": "What is written?"} for i in range(4)]
    people = [
        row | {"question_id": i, "answers": [words[i]] * 7 + ["sign"] * 3} for i, row in enumerate(rows)
    ]
    spellings = [
        row | {"questionId": str(i), "answers": [words[i], words[i].upper()]} for i, row in enumerate(rows)
    ]
    shown = [
        {"image": picture(i), "img_id": str(i), "caption": [f"a {word} sign on the wall", f"the {word} sign"]}
        for i, word in enumerate(words)
    ]
    files = "  data_files:\n  - split: validation\n    path: DocVQA/*.parquet\n"
    configs = f"---\nconfigs:\n- config_name: DocVQA\n{files}---\n"
    return {
        "lmms-lab-encoder/textvqa": {
            "data/validation-00000-of-00001.parquet": parquet(
                people, **common, question_id=Value("int64"), answers=[text]
            )
        },
        "lmms-lab-encoder/DocVQA": {
            "README.md": configs.encode(),
            "DocVQA/validation-00000-of-00001.parquet": parquet(
                spellings, **common, questionId=text, answers=[text]
            ),
        },
        "lmms-lab-encoder/flickr30k": {
            "data/test-00000-of-00001.parquet": parquet(shown, image=Image(), img_id=text, caption=[text])
        },
    }


BUILT_IN = """
import json, sys
from hones_eval.errors import TaskError
from hones_eval.examples import TaskExamples, load_lmm
lmm = load_lmm("llava_hf", f"pretrained={sys.argv[1]}")
found = {}
for name in sys.argv[2:]:
    try:
        examples = TaskExamples(lmm, name, model_name="llava_hf", gen_kwargs="max_new_tokens=4")
        made = [examples[i] for i in range(2)]
        golds = [examples.score(i, one.references[0]) for i, one in enumerate(made)]
        found[name] = [made[0].target, made[1].references, examples.metric, examples.aggregate(golds)]
    except TaskError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory, llava_checkpoint: Path) -> Mapping[str, Any]:
    """What `TaskExamples` finds in lmms-eval's own tasks, as they are, with data sets from the loopback."""
    names = ["vqav2", "vqav2_val", "pope", "refcoco_bbox_rec_val", "textvqa_val", "docvqa_val", "ok_vqa"]
    names += ["flickr30k"] if shutil.which("java") else []
    home = tmp_path_factory.mktemp("home")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LMMS_"))}
    with serving(hub_repositories() | more_repositories()) as url:
        env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "hf_nobody"}
        done = subprocess.run(
            [sys.executable, "-c", BUILT_IN, str(llava_checkpoint), *names],
            capture_output=True,
            text=True,
            env=env,
            cwd=home,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [path for path in home.iterdir() if path.name == "submissions"]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("vqav2_val", ["red", ["green"], "exact_match", 1.0]),
        ("pope", ["no", ["yes"], "pope_accuracy", 1.0]),
        ("textvqa_val", ["stop", ["one way", "sign"], "exact_match", 1.0]),
        ("docvqa_val", ["stop", ["one way", "ONE WAY"], "anls", 1.0]),
    ],
)
def test_built_in_tasks_have_proven_gold_answers(
    name: str, found: list[Any], built_in: Mapping[str, Any]
) -> None:
    assert built_in[name] == found


def test_a_grounding_task_gets_its_box_in_words(built_in: Mapping[str, Any]) -> None:
    target, _, metric, gold = built_in["refcoco_bbox_rec_val"]
    assert target == "[0.094, 0.143, 0.562, 0.786]"
    assert metric == "refcoco_IoU"
    assert gold > 0.99


@pytest.mark.skipif(not shutil.which("java"), reason="lmms-eval's caption metrics tokenize with java")
def test_a_caption_task_joins_its_references(built_in: Mapping[str, Any]) -> None:
    target, references, metric, gold = built_in["flickr30k"]
    assert target == "a stop sign on the wall the stop sign"
    assert references == ["a one way sign on the wall", "the one way sign"]
    assert metric == "flickr_Bleu_4"
    assert gold > 0.99


def test_groups_and_missing_data_sets_are_one_line(built_in: Mapping[str, Any]) -> None:
    assert built_in["vqav2"] == "vqav2 is a group of several tasks; choose one of: vqav2_test, vqav2_val"
    assert "ok_vqa" in built_in["ok_vqa"]
    assert "\n" not in built_in["ok_vqa"]
