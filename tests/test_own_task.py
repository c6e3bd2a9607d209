"""The steps of docs/your_own_task.md, and mistakes in a task file, each reported in one line."""

import csv
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from lmms_eval import evaluator  # noqa: F401  the command has it when it reads task files
from lmms_eval.tasks import TaskManager
from lmms_runs import answers, run_command
from own_answers import complaint
from PIL import Image

from hones_eval.__main__ import main
from hones_eval.errors import TaskError
from hones_eval.lmms.task_files import check_task_file
from hones_eval.model_wrappers import plugin
from hones_eval.toy import checkpoint_path
from hones_eval.toy.documents import documents

DOC = (Path(__file__).parent.parent / "docs" / "your_own_task.md").read_text()
COUNT = 16


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, flags=re.DOTALL)


WALK = next(block for block in blocks("bash") if "--tasks shapes" in block)


def rows() -> list[dict[str, str]]:
    made = documents("vqa_attribute", "plain", "test", COUNT)
    return [
        {"file_name": f"{i}.png", "question": document.prompt, "answer": document.answer}
        for i, document in enumerate(made)
    ]


def write_csv(folder: Path, table: list[dict[str, str]]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def write_json(folder: Path, table: list[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the document has before the commands."""
    place = tmp_path_factory.mktemp("reader")
    (place / "images").mkdir(parents=True)
    for i, document in enumerate(documents("vqa_attribute", "plain", "test", COUNT)):
        Image.fromarray(document.pixels).save(place / "images" / f"{i}.png")
    write_csv(place / "images", rows())
    (place / "tasks").mkdir()
    (place / "tasks" / "shapes.yaml").write_text(blocks("yaml")[0])
    return place


def run(line: str, folder: Path) -> None:
    program, *arguments = shlex.split(line.replace("$MODEL", str(checkpoint_path())))
    if program == "hones-eval":
        assert main(arguments) == 0, line
        return
    assert program == "lmms-eval"
    done = run_command(arguments, folder)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_document_leads_from_a_folder_to_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    header = blocks("csv")[0].splitlines()[0]
    assert header == ",".join(rows()[0])
    assert list(json.loads(blocks("json")[0])) == list(rows()[0])
    for line in WALK.splitlines():
        run(line, folder)
    assert sorted(answers(folder / "logs" / "baseline", "shapes")) == list(range(8, COUNT))
    with (folder / "board" / "leaderboard.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["task"] == "shapes"
    assert row["metric"] == "exact_match"
    assert int(row["n"]) == COUNT - 8
    assert row["flags"] == "", "no image of the discovery split is among them"
    assert float(row["baseline"]) > 0.5, "the embedded model answers such questions"


Edit = Callable[[dict[str, Any]], Any]
MISTAKES: dict[str, tuple[Edit, str]] = {
    "key": (
        lambda config: config.update(doc_to_txt=config.pop("doc_to_text")),
        "doc_to_txt: unknown to lmms-eval; did you mean doc_to_text?",
    ),
    "missing key": (
        lambda config: config.pop("doc_to_target"),
        "doc_to_target: missing; it should be a column, a tem",
    ),
    "no split": (
        lambda config: config.pop("test_split"),
        "test_split: missing; it should be the name of a split",
    ),
    "metric": (
        lambda config: config["metric_list"][0].update(metric="exact_mach"),
        "metric_list[0].metric: 'exact_mach' should be one of exact_match, anls, bleu, chrf, ter; did you ",
    ),
    "metric's form": (
        lambda config: config.update(metric_list="exact_match"),
        "metric_list: 'exact_match' should be a list of mappings",
    ),
    "metric without a name": (
        lambda config: config.update(metric_list=["exact_match"]),
        "metric_list[0]: 'exact_match' should be a mapping with a metric",
    ),
    "aggregation": (
        lambda config: config["metric_list"][0].update(aggregation="average"),
        "metric_list[0].aggregation: 'average' should be mean, median, or !function",
    ),
    "direction": (
        lambda config: config["metric_list"][0].update(higher_is_better="yes please"),
        "higher_is_better: 'yes please' should be true or false",
    ),
    "column in a template": (
        lambda config: config.update(doc_to_text="{{quesiton}} Answer:"),
        "doc_to_text: 'quesiton' should be a column; did you mean question?; the columns are ",
    ),
    "template": (
        lambda config: config.update(doc_to_text="{{question"),
        "'{{question' is not a Jinja template",
    ),
    "column": (
        lambda config: config.update(doc_to_target="gold"),
        "doc_to_target: 'gold' should be a column; the ",
    ),
    "column of images": (
        lambda config: config.update(doc_to_visual="images"),
        "doc_to_visual: 'images' should be a column of images; did you mean image?",
    ),
    "no pictures": (
        lambda config: config.update(doc_to_visual="answer"),
        "doc_to_visual: column 'answer' should contain images, which dataset_path: imagefolder",
    ),
    "type": (lambda config: config.update(task=7), "task: 7 should be a name"),
    "setting": (
        lambda config: config.update(generation_kwargs={"max_new_token": 8}),
        "generation_kwargs.max_new_token: no such setting; did you mean max_new_tokens?",
    ),
    "setting's type": (
        lambda config: config.update(generation_kwargs={"max_new_tokens": "eight"}),
        "generation_kwargs.max_new_tokens: 'eight' should be a whole number",
    ),
    "folder": (
        lambda config: config.update(dataset_kwargs={"data_dir": "/nowhere"}),
        "dataset_kwargs.data_dir: /nowhere should be a folder",
    ),
    "split": (
        lambda config: config.update(test_split="test"),
        "test_split: 'test' should be one of the splits: train",
    ),
    "kind of output": (
        lambda config: config.update(output_type="multiple_choices"),
        "output_type: 'multiple_choices' should be generate_until or multiple_choice; did you mean multiple_",
    ),
    "choices": (
        lambda config: config.update(output_type="multiple_choice", metric_list=[{"metric": "acc"}]),
        "doc_to_choice: missing; it should be a column of lists, a list such as",
    ),
    "metric of choices": (
        lambda config: config.update(
            output_type="multiple_choice",
            metric_list=[{"metric": "exact_mach"}],
            doc_to_choice=["red", "blue"],
        ),
        "metric_list[0].metric: 'exact_mach' should be one of acc, acc_norm, exact_match, f1, mcc",
    ),
    "column of choices": (
        lambda config: config.update(
            output_type="multiple_choice", metric_list=[{"metric": "acc"}], doc_to_choice="option"
        ),
        "doc_to_choice: 'option' should be a column",
    ),
    "include": (lambda config: config.update(include="base.yaml"), "include: there is no file "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_file_key_and_form(name: str, folder: Path, tmp_path: Path) -> None:
    edit, says = MISTAKES[name]
    config = yaml.safe_load(blocks("yaml")[0])
    config["dataset_kwargs"]["data_dir"] = str(folder / "images")
    edit(config)
    path = tmp_path / "shapes.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(TaskError) as told:
        check_task_file(path)
    assert str(path) in str(told.value)
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def without_picture(table: list[dict[str, str]]) -> None:
    table[5]["file_name"] = "lost.png"


def without_answer(table: list[dict[str, str]]) -> None:
    table[3]["answer"] = ""


def without_file_name(table: list[dict[str, str]]) -> None:
    for row in table:
        row["picture"] = row.pop("file_name")


SPOILT = [
    (without_picture, "doc_to_visual: 1 of 16 images are missing, the first is "),
    (without_answer, "column answer: 1 of 16 rows have no value, the first is row 3 from 0"),
    (without_file_name, "`file_name`, `*_file_name`, `file_names` or `*_file_names` must be present"),
]


@pytest.mark.parametrize("write", [write_csv, write_json])
@pytest.mark.parametrize(("spoil", "says"), SPOILT)
def test_a_mistake_in_the_table_is_told(
    write: Callable[..., None], spoil: Callable[..., None], says: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "images", tmp_path / "images", ignore=shutil.ignore_patterns("metadata.*"))
    table = rows()
    spoil(table)
    write(tmp_path / "images", table)
    path = tmp_path / "shapes.yaml"
    path.write_text(blocks("yaml")[0].replace("data_dir: images", f"data_dir: {tmp_path / 'images'}"))
    with pytest.raises(TaskError, match=re.escape(says)):
        check_task_file(path)


@pytest.mark.parametrize(
    ("change", "encoding", "says"),
    [
        (str, "utf-8-sig", None),
        (lambda text: text.replace("red", "grün"), "latin-1", "save the table as UTF-8"),
        (lambda text: text.replace(",", ";"), "utf-8", "names the columns, with commas between them"),
    ],
)
def test_a_table_as_spreadsheets_save_it(
    change: Callable[[str], str], encoding: str, says: str | None, folder: Path, tmp_path: Path
) -> None:
    images = shutil.copytree(folder / "images", tmp_path / "images")
    table = images / "metadata.csv"
    table.write_text(change(table.read_text()), encoding=encoding)
    path = tmp_path / "shapes.yaml"
    path.write_text(blocks("yaml")[0].replace("data_dir: images", f"data_dir: {images}"))
    if says is None:
        check_task_file(path)
        return
    with pytest.raises(TaskError, match=says) as caught:
        check_task_file(path)
    assert "\n" not in str(caught.value)


def test_a_table_as_json_lines_is_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images", ignore=shutil.ignore_patterns("metadata.*"))
    write_json(tmp_path / "images", rows())
    path = tmp_path / "shapes.yaml"
    path.write_text(blocks("yaml")[0].replace("data_dir: images", f"data_dir: {tmp_path / 'images'}"))
    check_task_file(path)


def test_choices_as_the_document_has_them(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images", ignore=shutil.ignore_patterns("metadata.*"))
    table: list[dict[str, Any]] = rows()
    for row in table:
        row["options"] = [row["answer"], "nothing"]
    write_json(tmp_path / "images", table)
    config = yaml.safe_load(blocks("yaml")[0]) | {
        "output_type": "multiple_choice",
        "doc_to_choice": "options",
    }
    config["dataset_kwargs"]["data_dir"] = str(tmp_path / "images")
    config["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    del config["generation_kwargs"]
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(config))
    model = ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}", "--limit", "3"]
    task = ["--tasks", "shapes", "--include_path", str(tmp_path), "--heads", "2"]
    out = tmp_path / "ranking"
    assert main(["rank", "--method", "hones", *model, *task, "--out", str(out)]) == 0
    assert json.loads((out / "ranking.json").read_text())["report"]["base_metric"] == 1.0


def test_both_commands_tell_it_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    path = tmp_path / "tasks" / "shapes.yaml"
    path.parent.mkdir()
    path.write_text(blocks("yaml")[0].replace("doc_to_target: answer", "doc_to_target: gold"))
    says = f"hones-eval: {path}: doc_to_target: 'gold' should be a column; the columns are image, question, "
    says += "answer"
    rank, _, evaluate, *_ = (
        shlex.split(
            line.replace("$MODEL", str(checkpoint_path()))
            .replace("--include_path tasks", f"--include_path {path.parent}")
            .replace("--out runs/shapes", f"--out {tmp_path / 'shapes'}")
        )
        for line in WALK.splitlines()
    )
    assert main(rank[1:]) == 1
    assert complaint(capsys.readouterr().err) == says
    done = run_command(evaluate[1:], folder)
    assert done.returncode == 1, done.stdout[-500:]
    assert complaint(done.stderr).startswith(says)


def test_a_file_that_lmms_eval_cannot_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under the command, which would print a trace that names no file."""
    monkeypatch.setitem(sys.modules, plugin.COMMAND, ModuleType(plugin.COMMAND))
    path = tmp_path / "shapes.yaml"
    path.write_text("task: shapes\nmetric_list: [\n")
    with pytest.raises(SystemExit, match=rf"hones-eval: {path}, line 3: not valid YAML"):
        TaskManager("ERROR", str(tmp_path), model_name="hones_llava")


@pytest.mark.parametrize(
    "line",
    re.findall(r"^\| [^|]+ \| `(.*)` \|$", DOC.split("## When something is wrong")[1], flags=re.MULTILINE),
)
def test_the_lines_in_the_document_are_tested(line: str) -> None:
    told = [says for _, says in (*MISTAKES.values(), *SPOILT)]
    assert any(says in line or line.removesuffix(" ...") in says for says in told)
