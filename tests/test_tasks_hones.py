"""The HONES tasks: documents from a folder, prompts, images, splits and scores."""

import json
import math
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lmms_eval.models  # noqa: F401  lets the plug-in register the tasks
import numpy as np
import pytest
from drawn_data import write_folder
from lmms_eval.api import task as task_module
from lmms_eval.api.metrics import anls
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from loguru import logger
from PIL import ExifTags, Image

from hones_eval.errors import TaskError
from hones_eval.tasks.hones import data, retrieval, utils

NAMES = ("vqa", "ocr", "caption", "retrieval", "grounding")
SPLITS = ("", "_discovery", "_development", "_test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("drawn"), 30)


@pytest.fixture(autouse=True)
def data_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(folder))
    monkeypatch.setattr(task_module.ConfigurableTask, "download", _once)


_once = task_module.ConfigurableTask.download.__wrapped__  # one try; lmms-eval makes five


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager()


@pytest.fixture(scope="module")
def build(manager: TaskManager) -> Callable[..., Any]:
    def build(name: str, kind: str = "chat") -> Any:
        return get_task_dict([name], manager, kind)[name]

    return build


@pytest.mark.parametrize("kind", ["chat", "simple"])
def test_every_task_builds_and_asks_for_every_document(build: Callable[..., Any], kind: str) -> None:
    for name in NAMES:
        task = build(f"hones_{name}", kind)
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=3, rank=0, world_size=1)
        assert len(task.instances) == 3
        settings = task.instances[0].args[1 if kind == "simple" else 2]
        assert settings.items() >= {"max_new_tokens": 24, "do_sample": False, "num_beams": 1}.items()
        (picture,) = task.doc_to_visual(task.eval_docs[0])
        assert picture.size == (64, 56)


def test_prompts_are_those_of_the_release(build: Callable[..., Any]) -> None:
    def prompt(name: str, place: int = 0) -> str:
        task = build(f"hones_{name}")
        return task.doc_to_text(task.eval_docs[place])

    assert prompt("vqa") == "Question: What colour is the square?\nAnswer the question with a short phrase."
    assert prompt("ocr") == "Transcribe the text inside the blue box.\nOutput text only."
    assert prompt("caption") == "Describe the image in one sentence."
    assert prompt("retrieval") == (
        "Candidate: A red square on black.\nDoes the candidate correctly describe the image?\n"
        "Answer exactly Yes or No."
    )


def test_splits_share_no_image_and_leave_none_out(build: Callable[..., Any]) -> None:
    whole, *parts = ([doc["image_path"] for doc in build(f"hones_vqa{split}").eval_docs] for split in SPLITS)
    assert sorted(item for part in parts for item in part) == sorted(whole)
    assert len(whole) == 30
    for name in ("ocr", "caption", "retrieval", "grounding"):
        same = {doc["image_path"] for doc in build(f"hones_{name}_test").eval_docs}
        assert same == set(parts[2])


def test_the_split_of_an_image_does_not_depend_on_the_others() -> None:
    places = np.asarray([data.place(f"COCO_train2014_{i:012}.jpg") for i in range(20_000)])
    assert abs((places < 0.5).mean() - 0.5) < 0.01
    assert abs((places >= 0.7).mean() - 0.3) < 0.01
    assert data.place("drawn_0.png") == pytest.approx(0.136666, abs=1e-6)  # what a published split rests on


def test_the_box_is_drawn_round_the_text(build: Callable[..., Any]) -> None:
    task = build("hones_ocr")
    doc = task.eval_docs[3]
    (shown,) = task.doc_to_visual(doc)
    plain = np.asarray(Image.open(doc["image_path"]).convert("RGB"), dtype=int)
    changed = np.argwhere((np.asarray(shown, dtype=int) != plain).any(-1))
    assert changed.min(0).tolist() == [38, 46]
    assert changed.max(0).tolist() == [52, 60]
    assert {tuple(np.asarray(shown)[y, x]) for y, x in changed} == {(0, 0, 255)}
    outside = doc | {"bbox": [70.0, 10.0, 5.0, 5.0]}
    with pytest.raises(TaskError, match=r"entry 3 .*lies outside of the image"):
        task.doc_to_visual(outside)


def test_images_and_their_boxes_are_those_that_a_viewer_shows(
    build: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned by EXIF, with transparency, and of 16 bits."""
    table = write(tmp_path, monkeypatch, folder, lambda rows: None)
    table.write_text(table.read_text(), encoding="utf-8-sig")  # as some editors save it
    copy = table.parent / "images"
    drawn = [Image.open(folder / "images" / f"drawn_{i}.png").convert("RGB") for i in range(3)]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    drawn[0].transpose(Image.Transpose.ROTATE_90).save(copy / "drawn_0.png", exif=exif)
    black = np.asarray(drawn[1]).sum(-1) == 0
    clear = np.dstack([np.asarray(drawn[1]), np.where(black, 0, 255).astype(np.uint8)])
    Image.fromarray(clear).save(copy / "drawn_1.png")
    grey = np.asarray(drawn[2].convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(copy / "drawn_2.png")
    on_white = np.where(black[..., None], 255, np.asarray(drawn[1]))
    task = build("hones_grounding")
    docs = list(task.eval_docs)
    for doc, wanted in zip(docs, (drawn[0], on_white, np.dstack([grey] * 3)), strict=False):
        (shown,) = task.doc_to_visual(doc)
        assert shown.mode == "RGB"
        assert np.array_equal(np.asarray(shown), np.asarray(wanted))
    assert docs[0]["bbox"] == pytest.approx([6 / 64, 8 / 56, 30 / 64, 32 / 56])


def test_entries_without_text_are_left_out_and_counted(
    build: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, monkeypatch, folder, lambda rows: [rows[0].pop("ocr"), rows[4].update(ocr=None)])
    heard: list[str] = []
    handler = logger.add(heard.append, level="WARNING", format="{message}")
    try:
        docs = build("hones_ocr").eval_docs
    finally:
        logger.remove(handler)
    assert [doc["text"] for doc in docs] == [f"number {i}" for i in range(30) if i not in (0, 4)]
    assert "2 of 30 entries have no such annotation" in "".join(heard)


def write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, change: Callable[[list[dict]], Any]
) -> Path:
    """A copy of the folder with its entries changed, which the tasks then read."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "drawn.json"
    rows = json.loads(path.read_text())["data"]
    change(rows)
    path.write_text(json.dumps({"data": rows}))
    monkeypatch.setenv("HONES_EVAL_DATA", str(copy))
    return path


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("vqa", lambda rows: rows[2]["vqa"].pop("question"), r"entry 2 \(drawn_2.png\): .*vqa.question"),
        ("vqa", lambda rows: rows[2]["vqa"].pop("answers"), "entry 2 .*neither answers nor all_answers"),
        ("vqa", lambda rows: rows[5].pop("image_info"), "drawn.json, entry 5: it has no image_info"),
        ("vqa", lambda rows: rows[5]["image_info"].update(file_name="x.jpg"), "image x.jpg is neither"),
        ("ocr", lambda rows: rows[1]["ocr"].update(bbox=[1, 2, 0, 4]), "entry 1 .*ocr.bbox is not a box"),
        ("caption", lambda rows: rows[7].update(captions=["a"]), "entry 7 .*not of the form"),
        (
            "caption",
            lambda rows: [rows[item].update(captions=[]) for item in (3, 4)],
            r"entry 3 .*it has no captions; so it is with 2 of \d+ entries",
        ),
        ("retrieval", lambda rows: rows.__delitem__(slice(1, None)), "captions of at least two images"),
    ],
)
def test_bad_data_is_named(
    name: str,
    change: Callable[[list[dict]], Any],
    says: str,
    build: Callable[..., Any],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path, monkeypatch, folder, change)
    with pytest.raises(TaskError, match=says) as caught:
        build(f"hones_{name}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_entry_with_id_0_is_kept_and_a_wrong_key_is_an_error(
    build: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id of 0 is falsy, and `vqa` may be misspelt: neither may lose an example silently."""

    def number(rows: list[dict]) -> None:
        for index, row in enumerate(rows):
            row["image_info"]["id"] = row["id"] = index

    write(tmp_path / "numbered", monkeypatch, folder, number)
    shown = {Path(doc["image_path"]).name for doc in build("hones_vqa").eval_docs}
    assert "drawn_0.png" in shown
    assert len(shown) == 30
    write(tmp_path / "misspelt", monkeypatch, folder, lambda rows: rows[0].update(VQA=rows[0].pop("vqa")))
    with pytest.raises(TaskError, match=r"entry 0 \(drawn_0.png\): it has no vqa"):
        build("hones_vqa")


def test_the_folder_is_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(value: str | None, says: str) -> None:
        monkeypatch.setenv("HONES_EVAL_DATA", value) if value else monkeypatch.delenv("HONES_EVAL_DATA")
        with pytest.raises(TaskError, match=says):
            data.entries()

    wrong(None, "set HONES_EVAL_DATA to a folder")
    wrong(str(tmp_path / "nowhere"), "no such file or folder")
    wrong(str(tmp_path), "and has none")
    (tmp_path / "broken.json").write_text('{"data": [')
    wrong(str(tmp_path), "broken.json is not valid JSON")
    (tmp_path / "empty.json").write_text('{"data": []}')
    wrong(str(tmp_path / "empty.json"), "at least one entry")
    shutil.copytree(folder, tmp_path / "two")
    shutil.copy(tmp_path / "two" / "drawn.json", tmp_path / "two" / "other.json")
    wrong(str(tmp_path / "two"), "has drawn.json, other.json; name the file itself")
    monkeypatch.setenv("HONES_EVAL_DATA", str(tmp_path / "two" / "other.json"))
    assert len(data.entries()) == 30
    with pytest.raises(TaskError, match="none of them falls into this split"):
        data.entries(0.0, 1e-6)


def test_vqa_accuracy_is_that_of_textvqa() -> None:
    answers = ["Two dogs", "2 dogs", "two dogs.", "dogs", "a dog", "dog", "the dog", "no", "No!", "cat"]
    for said in ("2 dogs", "dog", "No", "cat", "horse", "two  dogs"):
        theirs = textvqa_process_results({"question_id": 0, "answers": list(answers)}, [said])["exact_match"]
        assert utils.vqa_results({"answers": answers}, [said])["vqa_accuracy"] == pytest.approx(theirs)


def test_anls_is_lmms_evals() -> None:
    for gold, said in (
        ("STOP", "stop"),
        ("STOP", "st0p"),
        ("STOP", "shops"),
        ("STOP", "shoes"),
        ("KH", ""),
        ("One  Way", "one way"),
    ):
        theirs = anls(references=[" ".join(gold.split())], predictions=[" ".join(said.split())])["anls"]
        assert utils.ocr_results({"text": gold}, [said])["anls"] == pytest.approx(theirs)


def slow_bleu(said: list[list[str]], references: list[list[list[str]]]) -> float:
    """Papineni et al. 2002, word by word."""
    logs = 0.0
    for n in range(1, 5):
        right = total = 0
        for candidate, goldens in zip(said, references, strict=True):
            grams = Counter(tuple(candidate[i : i + n]) for i in range(len(candidate) - n + 1))
            best: Counter = Counter()
            for gold in goldens:
                best |= Counter(tuple(gold[i : i + n]) for i in range(len(gold) - n + 1))
            right += sum(min(count, best[gram]) for gram, count in grams.items())
            total += sum(grams.values())
        if right == 0:
            return 0.0
        logs += math.log(right / total) / 4
    length = sum(map(len, said))
    closest = sum(
        min((abs(len(gold) - len(candidate)), len(gold)) for gold in goldens)[1]
        for candidate, goldens in zip(said, references, strict=True)
    )
    return math.exp(logs) * (1 if length > closest else math.exp(1 - closest / length))


def test_bleu_is_that_of_the_corpus() -> None:
    said = ["A man plays a video game .", "two dogs run on the green grass", "a cat"]
    references = [
        ["a man plays a video game in a room .", "a person with a game"],
        ["Two dogs run on the grass", "the dogs run on green grass today"],
        ["a cat", "one cat on a mat"],
    ]
    results = [
        utils.caption_results({"references": gold}, [text])["bleu_4"]
        for text, gold in zip(said, references, strict=True)
    ]
    slow = slow_bleu(
        [answer.lower().split() for answer in said], [[g.lower().split() for g in gs] for gs in references]
    )
    assert 0.3 < slow < 0.9
    assert utils.bleu_4(results) == pytest.approx(slow, abs=1e-6)
    assert utils.bleu_4(results[2:]) == 0.0


def test_ndcg_counts_ties_against_the_positive() -> None:
    def result(query: int, positive: bool, score: float) -> dict:
        return {"query": query, "positive": positive, "score": score}

    rng = np.random.default_rng(0)
    results, expected = [], []
    for query in range(40):
        scores = rng.integers(0, 6, size=8) / 5
        results += [result(query, i == 0, score) for i, score in enumerate(scores)]
        # Sorted by score with the positive behind its equals: gains 0 and one 1 over log2(place + 1).
        order = sorted(range(8), key=lambda i: (-scores[i], i == 0))
        expected.append(sum(1 / math.log2(place + 2) for place, i in enumerate(order[:5]) if i == 0))
    rng.shuffle(results)
    assert retrieval.ndcg_at_5(results) == pytest.approx(sum(expected) / len(expected))
    cut = [item for item in results if item["query"] != 3 or not item["positive"]]
    assert retrieval.ndcg_at_5(cut) == pytest.approx((sum(expected) - expected[3]) / 39)
    with pytest.raises(ValueError, match="no query has its positive"):
        retrieval.ndcg_at_5([result(0, False, 1.0)])


def test_a_query_that_a_resample_draws_twice_counts_twice() -> None:
    rng = np.random.default_rng(2)
    queries = [
        [
            {"query": query, "positive": i == 0, "score": score}
            for i, score in enumerate(rng.integers(0, 9, 12))
        ]
        for query in range(6)
    ]
    alone = [retrieval.ndcg_at_5(query) for query in queries]
    drawn = [0, 3, 3, 5, 0, 0, 2]
    together = [item for query in drawn for item in queries[query]]
    expected = pytest.approx(sum(alone[query] for query in drawn) / len(drawn))
    assert len(set(alone)) > 2
    assert retrieval.ndcg_at_5(together) == expected
    rng.shuffle(together)
    assert retrieval.ndcg_at_5(together) == expected


def test_yes_is_read_as_a_word() -> None:
    for said, score in (("Yes", 1), (" yes.", 1), ("Yesterday", 0), ("No, yes", 0), ("", 0)):
        found = utils.retrieval_results({"query": 0, "positive": True}, [said])
        assert found == {"ndcg_at_5_by_words": {"query": 0, "positive": True, "score": score}}


def test_a_number_is_read_as_the_margin() -> None:
    found = utils.retrieval_results({"query": 3, "positive": False}, ["-1.25e-05"])
    assert found == {"ndcg_at_5": {"query": 3, "positive": False, "score": -1.25e-05}}
    with pytest.raises(ValueError, match="a margin is nan"):
        utils.retrieval_results({"query": 3, "positive": False}, ["nan"])


def test_negatives_are_the_captions_that_share_most_words(build: Callable[..., Any]) -> None:
    rng = np.random.default_rng(1)
    words = [f"w{i}" for i in range(40)]
    captions = [" ".join(rng.choice(words, size=rng.integers(3, 9))) for _ in range(400)]
    owners = [i // 4 for i in range(400)]
    positives = captions[::4]
    found = retrieval.hard_negatives(positives, captions, owners)
    for picture, chosen in enumerate(found):
        ranked = sorted(
            (-len(set(positives[picture].split()) & set(text.split())), i)
            for i, text in enumerate(captions)
            if owners[i] != picture and text != positives[picture]
        )
        assert chosen == [i for _, i in ranked[:49]]

    docs = build("hones_retrieval").eval_docs
    assert len(docs) == 30 * 50
    assert [doc["positive"] for doc in docs] == ([True] + [False] * 49) * 30
    own = {doc["query"]: doc["candidate"] for doc in docs if doc["positive"]}
    assert all(doc["candidate"] != own[doc["query"]] for doc in docs if not doc["positive"])


def test_boxes_are_compared_by_intersection_over_union() -> None:
    doc = {"bbox": [0.2, 0.2, 0.6, 0.6]}
    for said, iou in (
        ("[0.20, 0.20, 0.60, 0.60]", 1.0),
        ("left 0.4, 0.2, 0.8, 0.6!", 1 / 3),
        ("[0.7, 0.7, 0.9, 0.9]", 0.0),
        ("[0.6, 0.6, 0.2, 0.2]", 0.0),
        ("0.2, 0.2", 0.0),
    ):
        assert utils.grounding_results(doc, [said])["iou"] == pytest.approx(iou)


def _build_in_child(cache: str) -> int:
    task_module._resolve_hf_datasets_cache_dir.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", cache)
        own = TaskManager(include_path=str(Path(utils.__file__).parent), include_defaults=False)
        task = get_task_dict(["hones_vqa_discovery"], own, "chat")["hones_vqa_discovery"]
    return len(task.eval_docs)


def test_several_processes_build_one_task_at_once(build: Callable[..., Any], tmp_path: Path) -> None:
    expected = len(build("hones_vqa_discovery").eval_docs)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        counts = list(pool.map(_build_in_child, [str(tmp_path / "cache")] * 2))
    assert counts == [expected, expected]


def test_the_releases_own_annotations_are_read(
    build: Callable[..., Any], tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = photos.parent / "annotations" / "hones_coco_dev.json"
    shutil.copy(released, tmp_path)
    rows = json.loads(released.read_text())["data"]
    for row in rows:
        info = row["image_info"]
        Image.new("RGB", (info["width"], info["height"]), "gray").save(tmp_path / info["file_name"])
    monkeypatch.setenv("HONES_EVAL_DATA", str(tmp_path))
    vqa = build("hones_vqa").eval_docs
    assert [doc["answers"] for doc in vqa] == [row["vqa"]["all_answers"] for row in rows]
    ocr = build("hones_ocr")
    assert all(ocr.doc_to_visual(doc) for doc in ocr.eval_docs)
    assert len(build("hones_caption").eval_docs) == len(rows)
    with pytest.raises(TaskError, match="has the annotation"):
        build("hones_grounding")
