"""`hones-eval task new`: from a table of images to a board, for every kind of task; and bad tables."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torchmetrics.functional.text as reference
from lmms_runs import answers, run_command
from own_answers import complaint
from PIL import Image

from hones_eval.__main__ import main
from hones_eval.lmms.table_tasks import box_results, caption_results, corpus_bleu, question_results
from hones_eval.lmms.task_files import check_task_file
from hones_eval.toy import checkpoint_path
from hones_eval.toy.documents import documents

COUNT = 12
Rows = list[dict[str, str]]
KINDS = ("question", "choice", "caption", "box")
METRICS = {"question": "exact_match", "choice": "acc", "caption": "bleu_4", "box": "iou"}


def rows_of(kind: str) -> Rows:
    """The table of a user: one row per question, two rows per image for captions."""
    task = {"caption": "caption", "box": "grounding"}.get(kind, "vqa_attribute")
    rows: Rows = []
    for number, document in enumerate(documents(task, "plain", "test", COUNT)):
        image = {"image": f"{kind}{number}.png"}
        if kind == "caption":
            first, *others = document.references
            rows += [image | {"caption": first}, image | {"caption": "|".join(others)}]
        elif kind == "box":
            match = re.match(r"Locate the (.*)\.\n", document.prompt)
            assert match
            rows.append(image | {"phrase": match[1], "box": document.answer})
        else:
            row = image | {"question": document.question, "answer": document.answer}
            rows.append(row | ({"choices": f"{document.answer}|nothing"} if kind == "choice" else {}))
    return rows


def write(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and a table of each kind, and the four tasks made from them."""
    place = tmp_path_factory.mktemp("own")
    (place / "images").mkdir()
    for kind in KINDS:
        task = {"caption": "caption", "box": "grounding"}.get(kind, "vqa_attribute")
        for number, document in enumerate(documents(task, "plain", "test", COUNT)):
            Image.fromarray(document.pixels).save(place / "images" / f"{kind}{number}.png")
        table = write(place / f"own_{kind}.csv", rows_of(kind))
        flags = ["--csv", str(table), "--images", str(place / "images"), "--out", str(place / "tasks")]
        assert main(["task", "new", *flags]) == 0
    return place


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_follows_from_the_columns_and_the_files_pass_the_check(kind: str, folder: Path) -> None:
    for suffix in ("", "_discovery", "_development", "_test"):
        path = folder / "tasks" / f"own_{kind}{suffix}.yaml"
        check_task_file(path)
        assert METRICS[kind] in path.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_image_and_leave_none_out(kind: str, folder: Path) -> None:
    splits = [
        {line["image_path"] for line in lines(folder / "tasks" / f"own_{kind}_{split}.jsonl")}
        for split in ("discovery", "development", "test")
    ]
    assert [len(split) for split in splits] == [6, 2, 4]
    assert len(set().union(*splits)) == COUNT


def test_copies_of_an_image_are_in_one_split(folder: Path, tmp_path: Path) -> None:
    """The same pixels under two names are one image: `verify` would refuse it in two splits."""
    rows = rows_of("question")
    copies = [row | {"image": f"copy_of_{row['image']}"} for row in rows]
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    for row, copy in zip(rows, copies, strict=True):
        shutil.copy(images / row["image"], images / copy["image"])
    flags = ["--csv", str(write(tmp_path / "own.csv", [*rows, *copies])), "--images", str(images)]
    assert main(["task", "new", *flags, "--out", str(tmp_path / "tasks")]) == 0
    splits = [
        {Path(line["image_path"]).name for line in lines(tmp_path / "tasks" / f"own_{split}.jsonl")}
        for split in ("discovery", "development", "test")
    ]
    assert [len(split) for split in splits] == [12, 4, 8]
    for split in splits:
        assert {f"copy_of_{name}".removeprefix("copy_of_copy_of_") for name in split} == split


def test_boxes_are_those_of_the_image_as_it_is_displayed(folder: Path, tmp_path: Path) -> None:
    """A camera that is held upright stores a wide image and the note to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (60, 40), "red").save(tmp_path / "upright.jpg", exif=exif)
    rows = [{"image": "upright.jpg", "phrase": "dot", "box": "10 40 30 60"}]
    flags = ["--csv", str(write(tmp_path / "own.csv", rows)), "--images", str(tmp_path)]
    assert main(["task", "new", *flags, "--out", str(tmp_path / "tasks")]) == 0


def test_captions_of_one_image_become_its_references(folder: Path) -> None:
    found = lines(folder / "tasks" / "own_caption.jsonl")
    expected = [list(document.references) for document in documents("caption", "plain", "test", COUNT)]
    assert [line["references"] for line in found] == expected


def test_the_default_prompt_of_a_box_has_one_article(folder: Path) -> None:
    rows = [
        {"image": "box0.png", "phrase": phrase, "box": "1 1 9 9"} for phrase in ("the cup", "A cup", "theme")
    ]
    table, out = write(folder / "articles.csv", rows), folder / "articles"
    flags = ["--csv", str(table), "--images", str(folder / "images"), "--out", str(out)]
    assert main(["task", "new", *flags]) == 0
    prompts = [str(line["prompt"]).splitlines()[0] for line in lines(out / "articles.jsonl")]
    assert prompts == ["Locate the cup.", "Locate the cup.", "Locate the theme."]


@pytest.mark.slow
def test_from_the_tables_to_a_board(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank on discovery images, then a baseline and a steered run of lmms-eval on the test images."""
    monkeypatch.chdir(folder)
    model = ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}"]
    for kind in KINDS:
        out = ["--heads", "2", "--out", f"ranking_{kind}"]
        task = ["--tasks", f"own_{kind}_discovery", "--include_path", "tasks"]
        assert main(["rank", "--method", "hones", *model, *task, *out]) == 0
        report = json.loads((folder / f"ranking_{kind}" / "ranking.json").read_text())
        assert report["settings"]["metric"] == METRICS[kind]
        assert report["report"]["base_metric"] > 0.5, "the toy model solves these tasks"
    steer = ["--ranking", "ranking_question", "--how", "fixed", "--factor", "3", "--out", "steering"]
    assert main(["scale", *steer]) == 0
    tasks = ["--tasks", ",".join(f"own_{kind}_test" for kind in KINDS), "--include_path", "tasks"]
    for logs, more in (("baseline", ""), ("steered", ",steering=steering")):
        given = [*model[:3], model[3] + more, *tasks, "--log_samples", "--output_path", logs]
        done = run_command(given, folder)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(answers(folder / "baseline", "own_caption_test")) == 4
    board = ["leaderboard", "baseline", "steered", "--include_path", "tasks", "--out", "board"]
    assert main(board) == 0
    with (folder / "board" / "leaderboard.csv").open() as file:
        rows = {(row["task"], row["metric"]): row for row in csv.DictReader(file)}
    for kind in KINDS:
        row = rows[f"own_{kind}_test", METRICS[kind]]
        assert int(row["n"]) == 4
        assert float(row["baseline"]) > 0.5


def test_scores_are_those_of_plain_definitions() -> None:
    document = {"references": ["the red circle", "a circle"], "answer": "10 10 30 30"}
    assert question_results(document, ["A Circle."]) == {"exact_match": 1.0}
    assert question_results(document, ["a square"]) == {"exact_match": 0.0}
    symbol = {"references": ["+"]}
    found = [question_results(symbol, [answer])["exact_match"] for answer in ("+", "", "-", ".")]
    assert found == [1.0, 0.0, 0.0, 0.0]
    assert box_results(document, ["[10, 10, 30, 20]"]) == {"iou": 0.5, "iou_at_least_50": 1.0}
    assert box_results(document, ["10 10 30"]) == {"iou": 0.0, "iou_at_least_50": 0.0}
    results = [caption_results(document, ["the red circle is here"])["bleu_4"]]
    results.append({"answer": "a b c d e", "references": ["a b c d e", "f"]})
    expected = reference.bleu_score([r["answer"] for r in results], [r["references"] for r in results])
    assert corpus_bleu(results) == pytest.approx(float(expected), abs=1e-6)


def drop_column(rows: Rows) -> None:
    for row in rows:
        row["anser"] = row.pop("answer")


def empty_cell(rows: Rows) -> None:
    rows[3]["answer"] = ""
    rows[5]["answer"] = ""


def bars_alone(rows: Rows) -> None:
    rows[3]["answer"] = " | "


def lost_image(rows: Rows) -> None:
    rows[2]["image"] = "lost.png"


def broken_image(rows: Rows) -> None:
    rows[4]["image"] = "broken.png"


def no_image(rows: Rows) -> None:
    for row in rows:
        row["picture"] = row.pop("image")


def wrong_choice(rows: Rows) -> None:
    rows[1]["choices"] = "left|right"


def short_box(rows: Rows) -> None:
    rows[0]["box"] = "1 2 3"


def outer_box(rows: Rows) -> None:
    rows[0]["box"] = "1 2 300 40"


@pytest.mark.parametrize(
    ("kind", "spoil", "says"),
    [
        ("question", drop_column, "fit no kind of task; needed are choice: question, answer, choices"),
        ("question", empty_cell, "2 of 12 rows cannot be used, the first is row 4: its answer is empty"),
        ("question", bars_alone, "1 of 12 rows cannot be used, the first is row 4: its answer is empty"),
        (
            "question",
            lost_image,
            "1 of 12 rows cannot be used, the first is row 3: there is no image lost.png",
        ),
        ("question", broken_image, "row 5: the image broken.png cannot be read: "),
        ("question", no_image, "no column names the image; call it image (the columns are question, answer"),
        ("choice", wrong_choice, "is not among its choices 'left|right' (separated by |)"),
        ("box", short_box, "its box '1 2 3' is not four numbers: left, top, right, bottom"),
        ("box", outer_box, "its box '1 2 300 40' is not inside the image of 64 x 64 pixels"),
    ],
)
def test_a_bad_table_is_one_line(
    kind: str,
    spoil: Callable[[Rows], None],
    says: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = rows_of(kind)
    spoil(rows)
    whole = (folder / "images" / "question0.png").read_bytes()
    (folder / "images" / "broken.png").write_bytes(whole[: len(whole) // 2])
    flags = ["--csv", str(write(tmp_path / "own.csv", rows)), "--images", str(folder / "images")]
    assert main(["task", "new", *flags, "--out", str(tmp_path / "tasks")]) == 1
    assert says in complaint(capsys.readouterr().err)
    assert not (tmp_path / "tasks").exists()


def test_a_prompt_that_names_no_column_and_tables_of_spreadsheets(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--images", str(folder / "images"), "--out", str(tmp_path / "tasks")]
    given = ["task", "new", "--csv", str(folder / "own_question.csv"), *images]
    assert main([*given, "--prompt", "{quesiton}?"]) == 1
    assert "have to be columns of own_question.csv: image, question, answer" in capsys.readouterr().err
    assert main([*given, "--name", "my task"]) == 1
    assert "a task's name has letters" in capsys.readouterr().err
    text = (folder / "own_question.csv").read_text()
    (tmp_path / "semicolons.csv").write_text(text.replace(",", ";"))
    (tmp_path / "latin.csv").write_text(text + "question0.png,Welche Farbe?,grün\n", encoding="latin-1")
    for name, says in (("semicolons", "not separated by commas"), ("latin", "save the table as UTF-8")):
        assert main(["task", "new", "--csv", str(tmp_path / f"{name}.csv"), *images]) == 1
        assert says in complaint(capsys.readouterr().err)


ROW = '{"image": "question0.png", "question": "What color?", "answer": "red"}\n'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "a.jsonl",
            ROW + ROW.replace("image", "img"),
            "line 2: its fields differ from those before: 'image'",
        ),
        (
            "a.jsonl",
            ROW.replace('"red"', "true"),
            "line 1: true is neither text, a number nor",
        ),
        ("a.jsonl", ROW.replace('"red"', '{"a": 1}'), 'line 1: {"a": 1} is neither text, a number nor'),
        ("a.jsonl", ROW.replace('"red"', "null"), "row 1: its answer is empty"),
        (
            "a.jsonl",
            ROW.replace('"red"', "NaN"),
            "line 1: not valid JSON: it holds a number that",
        ),
        ("a.jsonl", ROW.replace("red", "\\ud800"), "line 1: not valid JSON: it holds an unpaired surrogate"),
        ("a.jsonl", ROW.replace('"red"', "[" * 99_999), "line 1: not valid JSON: it is nested too deeply"),
        ("a.jsonl", ROW.replace("question0.png", "a\\u0000b"), "the image a⟨U+0000⟩b cannot be read"),
        (
            "a.csv",
            "image,question,answer,answer\na.png,b,c,d\n",
            "two columns of the header are called 'an",
        ),
        (
            "a.csv",
            "image,question,answer\na.png,b\n",
            "line 2: it has another number of cells than the header",
        ),
        ("a.csv", f"image,question,answer\na.png,b,{'x' * 200_000}\n", "not valid CSV: field larger than"),
    ],
)
def test_rows_that_are_not_text_are_one_line(
    name: str, text: str, says: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each was a traceback, or was accepted as another text: null as the answer "None"."""
    (tmp_path / name).write_text(text)
    flags = ["--csv", str(tmp_path / name), "--images", str(folder / "images")]
    assert main(["task", "new", *flags, "--out", str(tmp_path / "tasks")]) == 1
    assert says in complaint(capsys.readouterr().err)
    assert not (tmp_path / "tasks").exists()


def test_few_images_and_one_constant_answer_are_warned_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"answer": "red"} for row in rows_of("question")[:4]]
    flags = ["--csv", str(write(tmp_path / "own.csv", rows)), "--images", str(folder / "images")]
    assert main(["task", "new", *flags, "--out", str(tmp_path / "tasks")]) == 0
    said = capsys.readouterr().out
    assert "all gold answers are 'red'" in said
    assert "only 4 images: too few" in said
