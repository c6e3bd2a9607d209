"""Tasks whose data lmms-eval fails on, or scores wrongly without a word; and a legal one that was refused."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image
from lmms_runs import picture
from own_answers import complaint
from tiny_evaluations import UTILS, evaluated

from hones_eval.__main__ import main
from hones_eval.errors import TaskError
from hones_eval.lmms.examples import TaskExamples, load_lmm
from hones_eval.lmms.task_files import check_task_file

HEAD = """\
task: small
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
"""
TEXTS = """\
output_type: generate_until
doc_to_target: {target}
generation_kwargs: {{max_new_tokens: 4}}
metric_list:
  - metric: {metric}
"""
CHOICES = """\
output_type: multiple_choice
doc_to_choice: {choices}
doc_to_target: {target}
metric_list:
  - metric: acc
"""
Write = Callable[[str, Sequence[Mapping[str, Any]]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a task's YAML and its rows, each with an image; the folder is returned."""

    def written(yaml: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        whole = [
            {"image": picture(i), "question": f"What is shape {i}?", **row} for i, row in enumerate(rows)
        ]
        file = io.BytesIO()
        Dataset.from_list(whole).cast_column("image", Image()).to_parquet(file)
        (tmp_path / "test.parquet").write_bytes(file.getvalue())
        (tmp_path / "small.yaml").write_text(HEAD.format(data=tmp_path / "test.parquet") + yaml)
        (tmp_path / "utils.py").write_text(UTILS)
        return tmp_path

    return written


def texts(target: str = "answer", metric: str = "exact_match") -> str:
    return TEXTS.format(target=target, metric=metric)


def choices(target: str = "1", column: str = "options") -> str:
    return CHOICES.format(target=target, choices=column)


@pytest.mark.parametrize(
    ("yaml", "row", "message"),
    [
        (texts(), {"answer": 3}, r'contains numbers, .* use a template: doc_to_target: "{{answer}}"'),
        (texts(), {"answer": 0.5}, "contains numbers, which never equal an answer in words"),
        (texts(metric="bleu"), {"answer": ["a red dog", "a dog"]}, "bleu takes one gold answer per example"),
        (choices(), {"options": [1, 2]}, r"\[1, 2\] in row 0 from 0 should be a list of at least two texts"),
        (choices(), {"options": ["red", ""]}, "should be a list of at least two texts, none of them empty"),
        (choices(), {"options": []}, "should be a list of at least two texts"),
        (choices(column="[1, 2]"), {"answer": "x"}, r"doc_to_choice: \[1, 2\] should be a list .* in quotes"),
    ],
)
def test_data_that_lmms_eval_cannot_score(
    write: Write, yaml: str, row: Mapping[str, Any], message: str
) -> None:
    folder = write(yaml, [row] * 3)
    with pytest.raises(TaskError, match=message):
        check_task_file(folder / "small.yaml")


def test_a_metric_that_some_examples_lack_is_one_line(
    write: Write, model_args: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = texts(metric="seen") + "    aggregation: mean\n    higher_is_better: true\n"
    yaml += "  - metric: other\n    aggregation: mean\n    higher_is_better: true\n"
    folder = write(yaml + "process_results: !function utils.sometimes\n", [{"answer": "red"}] * 3)
    sometimes = (
        "def sometimes(doc, results):\n"
        "    name = 'seen' if '0' in doc['question'] else 'other'\n"
        "    return {name: float(results[0] == doc['answer'])}\n"
    )
    (folder / "utils.py").write_text(f"{UTILS}\n\n{sometimes}")
    given = ["rank", "--model", "llava_hf", "--model_args", model_args, "--tasks", "small"]
    given += ["--include_path", str(folder), "--method", "hones", "--out", str(tmp_path / "out")]
    assert main(given) == 1
    said = complaint(capsys.readouterr().err)
    assert "small, doc_id 1: its result has no 'seen', only 'other': choose another --metric" in said
    assert not (tmp_path / "out").exists()


def test_a_template_makes_numbers_texts(write: Write, model_args: str) -> None:
    folder = write(texts('"{{answer}}"'), [{"answer": i} for i in range(3)])
    check_task_file(folder / "small.yaml")
    lmm = load_lmm("hones_llava", model_args)
    examples = TaskExamples(lmm, "small", model_name="hones_llava", include_path=folder)
    assert [examples[i].target for i in range(3)] == ["0", "1", "2"]
    assert examples.score(2, "2")["exact_match"] == 1


@pytest.mark.parametrize("position", [0, 1])
def test_a_whole_number_is_the_position_of_the_right_choice(
    write: Write, model_args: str, tmp_path: Path, position: int
) -> None:
    """As in tasks of pairs in which the same choice is always right."""
    folder = write(choices(str(position)), [{"options": ["red", "blue"]}] * 3)
    check_task_file(folder / "small.yaml")
    lmm = load_lmm("hones_llava", model_args)
    examples = TaskExamples(lmm, "small", model_name="hones_llava", include_path=folder)
    example = examples[1]
    assert example.target == ["red", "blue"][position]
    assert example.details.gold == position
    right = examples.score(
        1, "[[0.0, true], [1.0, false]]" if position == 0 else "[[1.0, false], [0.0, true]]"
    )
    assert right["acc"] == 1
    found = evaluated("hones_llava", model_args, folder, tmp_path / "out")
    assert {sample["target"] for sample in found.samples.values()} == {position}


def test_a_question_without_an_image_is_named_by_a_ranking(write: Write, model_args: str) -> None:
    folder = write(texts(), [{"answer": "red"}] * 3)
    text = (folder / "small.yaml").read_text().replace("doc_to_visual: !function utils.doc_to_visual\n", "")
    (folder / "small.yaml").write_text(text)
    for name in ("hones_llava", "llava_hf"):
        lmm = load_lmm(name, model_args)
        examples = TaskExamples(lmm, "small", model_name=name, include_path=folder)
        with pytest.raises(Exception, match=r"task small, doc 1|small, doc_id 1") as caught:
            examples[1]
        assert "hones_hf answers such questions" in str(caught.value)
