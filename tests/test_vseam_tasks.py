"""The V-SEAM tasks: released files, edited twins, missing images, and scores that a constant Yes fails."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import plain
import pytest
from loguru import logger
from PIL import Image

from hones_eval.__main__ import main
from hones_eval.core.images import image_hash
from hones_eval.core.ranking import Ranking
from hones_eval.errors import TaskError
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.lmms.examples.tasks import build_task
from hones_eval.tasks.vseam import data, write

GREEDY = "max_new_tokens=4"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def llava(llava_checkpoint: Path) -> Any:
    return load_lmm("llava_hf", f"pretrained={llava_checkpoint}")


@pytest.fixture
def heard() -> Any:
    lines: list[str] = []
    handler = logger.add(
        lambda message: lines.append(str(message).strip()), level="WARNING", format="{message}"
    )
    yield lines
    logger.remove(handler)


def picture(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 40), colour).save(path)


def question(number: int, answer: str = "Yes", **more: Any) -> Record:
    return {
        "question_id": str(number),
        "imageId": f"p{number}",
        "question": f"Is the cat number {number} black?",
    } | {
        "answer": answer,
        "involved_objects": ["cat"],
        **more,
    }


def write_gqa(root: Path, name: str, content: Any, edited: tuple[int, ...] = (0, 1, 2, 3)) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for number in range(4):
        picture(path.parent / "clean" / f"p{number}.png", ["red", "green", "blue", "white"][number])
        if number in edited:
            picture(path.parent / "corrupt" / str(number) / f"{number}.png", "black")
    return root


def examples(lmm: Any, task: str, **options: Any) -> TaskExamples:
    return TaskExamples(lmm, task, model_name="llava_hf", gen_kwargs=GREEDY, **options)


def documents(lmm: Any, task: str) -> list[Record]:
    built = build_task(task, lmm, model_name="llava_hf", include_path=None, gen_kwargs=None)
    return list(built.eval_docs_no_media)


def test_every_file_is_the_one_that_the_script_writes() -> None:
    for path, content in write.task_files().items():
        assert (write.HERE / path).read_text(encoding="utf-8") == content, path
    found = {path.relative_to(write.HERE) for path in write.HERE.rglob("vseam_*.yaml")}
    assert found == set(write.task_files())


@pytest.mark.parametrize("released", ["list", "dict"])
def test_reads_lists_and_dicts_in_the_released_folders(
    released: str, llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [question(number, "Yes" if number < 2 else "No") for number in range(4)]
    content = records if released == "list" else {record.pop("question_id"): record for record in records}
    write_gqa(tmp_path, "GQA/Attribute_Level/Color/Color.json", content)
    monkeypatch.setenv("HONES_EVAL_DATA", str(tmp_path))
    clean, edited = examples(llava, "vseam_color"), examples(llava, "vseam_color_edited")
    assert len(clean) == len(edited) == 4
    for index in range(4):
        one, other = clean[index], edited[index]
        assert (one.target, other.target) == (("Yes", "No") if index < 2 else ("No", "Yes"))
        assert one.text_hash == other.text_hash
        assert one.image_hashes != other.image_hashes == [image_hash(Image.new("RGB", (48, 40), "black"))]
    rows = documents(llava, "vseam_color")
    assert [row["question_id"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["objects"] == ["cat"]
    assert rows[0]["attributes"] == ["black"]


def test_the_prompts_are_the_papers(
    llava: Any, instructblip_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "HONES_EVAL_DATA", str(write_gqa(tmp_path, "color.json", [question(0), question(1, "No")]))
    )
    ids = examples(llava, "vseam_color")[0].inputs["input_ids"][0]
    text = llava.tokenizer.decode([i for i in ids if i != llava.model.config.image_token_id])
    assert "Is the cat number 0 black? Please answer with a single word." in text
    blip = load_lmm("instructblip", f"pretrained={instructblip_checkpoint}")
    shown = TaskExamples(blip, "vseam_color", model_name="instructblip", gen_kwargs=GREEDY)
    prompt = shown._requests[0].args[0]
    assert prompt == "Question: Is the cat number 0 black? Answer using a single word."


def test_a_constant_yes_gets_one_half_and_a_warning(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    monkeypatch.setenv(
        "HONES_EVAL_DATA", str(write_gqa(tmp_path, "animal.json", [question(i) for i in range(4)]))
    )
    one_class = examples(llava, "vseam_animal", metric="balanced_accuracy", target="answer")
    always_yes = [one_class.score(index, "Yes.") for index in range(4)]
    assert [ye["accuracy"] for ye in always_yes] == [1.0] * 4
    assert one_class.aggregate(always_yes) == 0.5
    both = examples(llava, "vseam_animal_both", metric="balanced_accuracy")
    assert len(both) == 8
    assert both.aggregate([both.score(index, "Yes") for index in range(8)]) == 0.5
    assert both.aggregate([both.score(index, both[index].target) for index in range(8)]) == 1.0


def test_a_warning_of_one_answer_names_its_task_once(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    """One file, whose categories are tasks of their own; and a task is built again and again."""
    kinds = ["animal", "indoor", "animal", "indoor"]
    records = [question(number, category=kind) for number, kind in enumerate(kinds)]
    monkeypatch.setenv("HONES_EVAL_DATA", str(write_gqa(tmp_path, "vseam_pairs.json", records)))
    for name in ("vseam_animal", "vseam_indoor", "vseam_animal_edited", "vseam_animal_both"):
        for _ in range(2):
            assert documents(llava, name)
    about = [line.partition(", so")[0] for line in heard if "accuracy of 1" in line]
    file = tmp_path / "vseam_pairs.json"
    assert about == [
        f"vseam_animal: all 2 answers of {file} are 'yes'",
        f"vseam_indoor: all 2 answers of {file} are 'yes'",
        f"vseam_animal_edited: all 2 answers of {file} are 'no'",
    ]


def test_the_commands_warn_of_one_answer_and_of_a_subset_that_is_empty(
    llava_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model with random weights says Yes to none of them, and there is nothing but Yes to say."""
    data_folder = write_gqa(tmp_path / "data", "animal.json", [question(i) for i in range(4)])
    monkeypatch.setenv("HONES_EVAL_DATA", str(data_folder))
    ranking, later = tmp_path / "ranking", ["--offset", "2"]
    model = ["--model", "llava_hf", "--model_args", f"pretrained={llava_checkpoint}", "--gen_kwargs", GREEDY]
    flags = [*model, "--tasks", "vseam_animal"]
    found, few = ["--ranking", str(ranking)], ["--heads", "2"]
    assert main(["rank", "--method", "vseam", *flags, *few, "--limit", "2", "--out", str(ranking)]) == 0
    assert main(["verify", *flags, *later, *found, *few, "--out", str(tmp_path / "verify")]) == 0
    chosen = ["--how", "signed", "--strengths", "[1]", "--out", str(tmp_path / "scale")]
    assert main(["scale", *flags, *later, *found, *chosen, "--metric", "balanced_accuracy"]) == 1
    one_answer = (
        "all 2 gold answers of vseam_animal are 'Yes', so any edit that makes a model always give this "
        "answer looks helpful: include other answers"
    )
    offered = f"{one_answer}, or --metric balanced_accuracy"
    nothing_to_lose = "the unmasked model already scores 0, so a zero drop is uninformative"
    no_positive = "no example is correct, so positive scores are not measured and are stored as 0"
    printed = capsys.readouterr()
    assert "no strength helped on development examples: nothing was written" in printed.err
    said = [line for line in printed.out.splitlines() if line.startswith("warning: ")]
    reports = [
        json.loads((tmp_path / name).read_text()) for name in ("ranking/ranking.json", "verify/verify.json")
    ]
    warnings = [reports[0]["report"]["warnings"], reports[1]["warnings"]]
    assert warnings == [
        [no_positive, offered],
        ["no positive head has a score above 0, so none was masked", offered, nothing_to_lose],
    ]
    assert {f"warning: {line}" for lines in warnings for line in lines} <= set(said)


def test_missing_edited_images_are_counted_and_named(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    records = [question(number, "Yes" if number < 2 else "No") for number in range(4)]
    monkeypatch.setenv(
        "HONES_EVAL_DATA", str(write_gqa(tmp_path / "some", "color.json", records, edited=(1, 3)))
    )
    rows = documents(llava, "vseam_color_edited")
    assert [row["question_id"] for row in rows] == ["1", "3"]
    assert any("2 of 4 questions lack its edited image, the first is question 0" in line for line in heard)
    monkeypatch.setenv("HONES_EVAL_DATA", str(write_gqa(tmp_path / "none", "color.json", records, edited=())))
    with pytest.raises(TaskError, match=r"4 of 4 questions lack its edited image.*corrupt"):
        documents(llava, "vseam_color_edited")
    assert len(documents(llava, "vseam_color")) == 4
    picture(tmp_path / "mine" / "2.jpg", "yellow")
    monkeypatch.setenv("HONES_EVAL_EDITED", str(tmp_path / "mine"))
    assert [row["image_path"] for row in documents(llava, "vseam_color_edited")] == [
        str(tmp_path / "mine/2.jpg")
    ]


def test_bad_files_are_one_line_with_the_place(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HONES_EVAL_DATA", raising=False)
    with pytest.raises(TaskError, match="set HONES_EVAL_DATA"):
        documents(llava, "vseam_color")
    monkeypatch.setenv("HONES_EVAL_DATA", str(tmp_path))
    with pytest.raises(TaskError, match=r"holds none of .*color\.json.*vseam_pairs\.json"):
        documents(llava, "vseam_color")
    cases: dict[str, tuple[Any, str]] = {
        "words": (["a"], "question 0: it is not an object"),
        "empty": ([], "neither a list of questions"),
        "no_answer": ([question(0, "")], "question 0: it has no answer"),
        "open": ([question(0, "red")], "given as edited_answer"),
    }
    for name, (content, message) in cases.items():
        monkeypatch.setenv("HONES_EVAL_DATA", str(write_gqa(tmp_path / name, "color.json", content)))
        with pytest.raises(TaskError, match=message):
            documents(llava, "vseam_color_edited")
    (tmp_path / "words" / "color.json").write_text("{")
    monkeypatch.setenv("HONES_EVAL_DATA", str(tmp_path / "words"))
    with pytest.raises(TaskError, match=r"color\.json is not valid JSON"):
        documents(llava, "vseam_color")


def test_splits_share_no_image(llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [question(number, "Yes" if number % 2 else "No") for number in range(40)]
    write_gqa(tmp_path, "color.json", records)
    for number in range(4, 40):
        picture(tmp_path / "clean" / f"p{number}.png", "red")
        picture(tmp_path / "corrupt" / f"{number}.png", "blue")
    monkeypatch.setenv("HONES_EVAL_DATA", str(tmp_path))
    clean, edited = (
        [{row["question_id"] for row in documents(llava, f"vseam_color{part}_{split}")} for split in
         ("discovery", "development", "test")]
        for part in ("", "_edited")
    )  # fmt: skip
    assert clean == edited
    assert sorted(map(int, set().union(*clean))) == list(range(40))
    assert sum(map(len, clean)) == 40


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_pope_and_cocoqa_in_the_released_formats(
    llava: Any, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when an editor has put a byte order mark in front."""
    monkeypatch.setenv("HONES_EVAL_DATA", str(tmp_path))
    labels = ["yes", "no", "yes", "no"]
    lines = [
        {
            "question_id": i,
            "image": f"COCO_val2014_{i:012d}.jpg",
            "text": f"Is there a dog {i}?",
            "label": label,
        }
        for i, label in enumerate(labels, start=1)
    ]
    (tmp_path / "pope_popular.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding=encoding)
    for i in range(1, 5):
        picture(tmp_path / "val2014" / f"COCO_val2014_{i:012d}.jpg", "red")
        picture(tmp_path / "images" / f"COCO_train2014_{i:012d}.jpg", "red")
    pope = examples(llava, "vseam_pope_popular", metric="f1_yes")
    results = [pope.score(index, answer) for index, answer in enumerate(["Yes", "Yes, it is.", "no", "No"])]
    assert [result["accuracy"] for result in results] == [1, 0, 0, 1]
    assert pope.aggregate(results) == 0.5  # precision and recall are one half
    with (tmp_path / "cocoqa_count.csv").open("w", newline="", encoding=encoding) as file:
        table = csv.writer(file)
        table.writerow(["", "train_image_id_count", "question_count", "answer_count"])
        table.writerows(
            [[i, i + 1, f"how many cats {i}", ["two", "three", "two", "one"][i]] for i in range(4)]
        )
    count = examples(llava, "vseam_cocoqa_count")
    results = [count.score(index, answer) for index, answer in enumerate(["2", "Three.", "one", "one"])]
    assert count.metric == "accuracy"
    assert count.aggregate(results) == 0.75
    balanced = examples(llava, "vseam_cocoqa_count", metric="balanced_accuracy")
    assert balanced.aggregate(results) == pytest.approx((0.5 + 1 + 1) / 3)


def test_reads_the_released_annotations_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = os.environ.get("HONES_EVAL_TEST_DATA")
    if not given:
        pytest.skip("set HONES_EVAL_TEST_DATA to the folder that holds the papers' annotations")
    shutil.copytree(Path(given) / "annotations", tmp_path / "annotations")
    monkeypatch.setenv("HONES_EVAL_DATA", str(tmp_path))
    for category in data.LEVELS:
        source = data.gqa(category)
        assert len(source.questions) == 60
        assert all(item.id and item.objects for item in source.questions)
        relational = [item for item in source.questions if item.relations]
        assert bool(relational) == (data.LEVELS[category] == "relation")
        with pytest.raises(TaskError, match="60 of 60 questions lack its image"):
            list(data.with_pictures(source, ["picture"], 0, 1))
    assert {len(data.pope(split).questions) for split in ("random", "popular", "adversarial")} == {120}
    assert {len(data.cocoqa(kind).questions) for kind in ("color", "count", "location")} == {120}


def test_the_real_pairs(photos: Path, llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(photos))
    lambda task: examples(llava, task, limit=1)
    for category in data.LEVELS:
        clean, edited = (examples(llava, f"vseam_{category}{twin}", limit=1)[0] for twin in ("", "_edited"))
        assert (clean.target, edited.target) == ("Yes", "No")
        with Image.open(photos / "images" / f"gqa_{category}_edit.jpg") as shown:
            assert edited.image_hashes == [image_hash(shown)]
        assert clean.image_hashes != edited.image_hashes
        assert clean.text_hash == edited.text_hash


def test_vseam_ranks_questions_on_one_image_by_their_shared_prefix(
    llava: Any, llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POPE asks six questions of an image one after the other; scores are those of plain forwards."""
    monkeypatch.setenv("HONES_EVAL_DATA", str(tmp_path))
    shown = [1, 1, 1, 2, 3, 3]
    lines = [
        {
            "question_id": i,
            "image": f"COCO_val2014_{number:012d}.jpg",
            "text": f"Is there a {'very ' * i}black dog?",
            "label": "yes" if i % 2 else "no",
        }
        for i, number in enumerate(shown)
    ]
    (tmp_path / "pope_popular.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for number, colour in zip((1, 2, 3), ("red", "green", "blue"), strict=True):
        picture(tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg", colour)
    arguments = ["--model", "llava_hf", "--model_args", f"pretrained={llava_checkpoint}", "--heads", "4"]
    arguments += ["--tasks", "vseam_pope_popular", "--gen_kwargs", GREEDY, "--out", str(tmp_path / "ranking")]
    assert main(["rank", "--method", "vseam", *arguments]) == 0
    ranking = Ranking.load(tmp_path / "ranking")
    assert ranking.report is not None
    assert (ranking.report["prefix_sharing"], ranking.report["examples_sharing_a_prefix"]) == ("exact", 5)
    pope = examples(llava, "vseam_pope_popular")
    recorded = [pope[index] for index in range(len(pope))]
    items = [plain.Item(item.inputs, item.settings, item.target_ids) for item in recorded]
    expected = plain.vseam_heads(inner_model(llava), items)["signed"]
    assert ranking.head_scores is not None
    assert (ranking.head_scores - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [pope.share(rank, 2) for rank in (0, 1)] == [[0, 1, 2, 4, 5], [3]]
