"""GQA, TextVQA and Flickr30k in the files that they are published in, by the prompts of the HONES tasks."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmms_eval.models  # noqa: F401  lets the plug-in register the tasks
import pytest
from drawn_data import write_folder
from lmms_eval.api import task as task_module
from lmms_eval.tasks import TaskManager, get_task_dict
from PIL import Image

from hones_eval.__main__ import main
from hones_eval.errors import TaskError
from hones_eval.tasks.hones import utils

_once = task_module.ConfigurableTask.download.__wrapped__  # one try; lmms-eval makes five
VARIABLES = {
    "hones_gqa": "HONES_EVAL_GQA",
    "hones_textvqa": "HONES_EVAL_TEXTVQA",
    "hones_flickr30k": "HONES_EVAL_FLICKR30K",
    "hones_flickr30k_retrieval": "HONES_EVAL_FLICKR30K",
}
# A row of testdev_balanced_questions.json, with all that it holds.
GQA_ROW = {
    "semantic": [
        {"operation": "select", "dependencies": [], "argument": "sky (2486325)"},
        {"operation": "verify color", "dependencies": [0], "argument": "dark"},
    ],
    "entailed": ["05515938"],
    "equivalent": ["05515938"],
    "question": "Is the sky dark?",
    "imageId": "n161313",
    "isBalanced": True,
    "groups": {"global": None, "local": "06-sky_dark"},
    "answer": "yes",
    "semanticStr": "select: sky (2486325)->verify color: dark [0]",
    "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
    "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
    "fullAnswer": "Yes, the sky is dark.",
}
GQA = {
    "201307251": GQA_ROW,
    "201640614": {**GQA_ROW, "question": "Who wears the shirt?", "imageId": "n235859", "answer": "girl"},
}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager()


@pytest.fixture
def build(manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.setattr(task_module.ConfigurableTask, "download", _once)
    return lambda name: get_task_dict([name], manager, "chat")[name]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> dict[str, Path]:
    """Each data set unpacked as it comes, under the name of its variable; images are drawn ones."""
    root = tmp_path_factory.mktemp("elsewhere")
    gqa, textvqa, flickr = root / "gqa", root / "textvqa", root / "flickr30k"
    write(gqa / "questions1.2" / "testdev_balanced_questions.json", json.dumps(GQA))
    released = photos.parent / "annotations" / "textvqa_val.json"
    write(textvqa / "TextVQA_0.5.1_val.json", released.read_text(encoding="utf-8"))
    write(flickr / "dataset_flickr30k.json", json.dumps(karpathy(12)))
    names = [gqa / "images" / f"{row['imageId']}.jpg" for row in GQA.values()]
    rows = json.loads(released.read_text())["data"]
    names += [textvqa / "train_images" / f"{row['image_id']}.jpg" for row in rows]
    names += [flickr / "flickr30k-images" / f"{1000 + i}.jpg" for i in range(12)]
    for number, name in enumerate(names):
        name.parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 40), (number * 3 % 256, 90, 200 - number)).save(name)
    return dict(zip(dict.fromkeys(VARIABLES.values()), (gqa, textvqa, flickr), strict=True))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def karpathy(count: int) -> dict[str, Any]:
    """`dataset_flickr30k.json`: of every four images the last is of the training split."""

    def sentence(i: int, j: int) -> dict[str, Any]:
        raw = f"A dog number {i} runs over field {j}."
        return {"tokens": raw.lower().split(), "raw": raw, "imgid": i, "sentid": 5 * i + j}

    return {
        "images": [
            {
                "sentids": [5 * i + j for j in range(5)],
                "imgid": i,
                "sentences": [sentence(i, j) for j in range(5)],
                "split": "train" if i % 4 == 3 else "test",
                "filename": f"{1000 + i}.jpg",
            }
            for i in range(count)
        ],
        "dataset": "flickr30k",
    }


@pytest.fixture(autouse=True)
def named(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HONES_EVAL_DATA", raising=False)
    for variable, folder in places.items():
        monkeypatch.setenv(variable, str(folder))


def test_questions_of_gqa(build: Callable[[str], Any]) -> None:
    task = build("hones_gqa")
    docs = list(task.eval_docs)
    assert [(doc["question"], doc["answers"]) for doc in docs] == [
        ("Is the sky dark?", ["yes"]),
        ("Who wears the shirt?", ["girl"]),
    ]
    assert [Path(doc["image_path"]).name for doc in docs] == ["n161313.jpg", "n235859.jpg"]
    asked = "Question: Is the sky dark?\nAnswer the question with a short phrase."
    assert task.doc_to_text(docs[0]) == asked
    for said, score in (("Yes.", 1.0), ("yes", 1.0), ("yes, it is", 0.0), ("no", 0.0)):
        assert task.process_results(docs[0], [said]) == {"exact_match": score}


def test_the_released_rows_of_textvqa(build: Callable[[str], Any], photos: Path) -> None:
    rows = json.loads((photos.parent / "annotations" / "textvqa_val.json").read_text())["data"]
    task = build("hones_textvqa")
    docs = list(task.eval_docs)
    assert [doc["question"] for doc in docs] == [row["question"] for row in rows]
    assert [doc["answers"] for doc in docs] == [row["answers"] for row in rows]
    assert [Path(doc["image_path"]).stem for doc in docs] == [row["image_id"] for row in rows]
    # Five of ten said dakota: with one of them left out four agree, which is as good as five.
    assert task.process_results(docs[0], ["Dakota"]) == {"vqa_accuracy": 1.0}
    # Three said "dakota digital": left out, they leave two each time.
    found = task.process_results(docs[0], ["dakota digital"])["vqa_accuracy"]
    assert found == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)


@pytest.mark.parametrize("form", ["json", "token"])
def test_captions_of_flickr30k(
    form: str, build: Callable[[str], Any], places: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    listed = karpathy(12)["images"]
    if form == "token":
        shutil.copytree(places["HONES_EVAL_FLICKR30K"] / "flickr30k-images", tmp_path / "flickr30k-images")
        lines = [
            f"{item['filename']}#{j}\t{sentence['raw']}"
            for item in listed
            for j, sentence in enumerate(item["sentences"])
        ]
        write(tmp_path / "results_20130124.token", "\n".join(lines))
        monkeypatch.setenv("HONES_EVAL_FLICKR30K", str(tmp_path))
    kept = [item for item in listed if form == "token" or item["split"] == "test"]
    task = build("hones_flickr30k")
    docs = list(task.eval_docs)
    assert [doc["references"] for doc in docs] == [[s["raw"] for s in entry["sentences"]] for entry in kept]
    assert task.doc_to_text(docs[0]) == "Describe the image in one sentence."
    candidates = build("hones_flickr30k_retrieval").eval_docs
    own = [doc for doc in candidates if doc["positive"]]
    assert [doc["candidate"] for doc in own] == [entry["sentences"][0]["raw"] for entry in kept]
    assert len(candidates) == len(kept) * min(50, 1 + 5 * (len(kept) - 1))


def change(path: Path, edit: Callable[[Any], Any]) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


BROKEN = [
    ("gqa", lambda rows: rows["201640614"].pop("answer"), "question 201640614: it has no answer"),
    ("gqa", lambda rows: rows.clear(), "has no entry"),
    ("gqa", lambda rows: rows.update(x=[]), "not a mapping of question ids"),
    ("gqa", lambda rows: rows["201640614"].update(imageId="n1"), "question 201640614: its image n1.jpg is"),
    ("textvqa", lambda rows: rows.pop("data"), r'not of the form \{"data"'),
    (
        "textvqa",
        lambda rows: [rows["data"][i].pop("answers") for i in (4, 9)],
        r"entry 4 \(.*neither answers nor all_answers; so it is with 2 of 60 entries",
    ),
    ("flickr30k", lambda rows: rows["images"][1].update(sentences=[]), r"image 1 \(1001.jpg\): it has no"),
    ("flickr30k", lambda rows: rows["images"][1].update(sentences=["a"]), "image 1: its sentences are not"),
    ("flickr30k", lambda rows: rows["images"][2]["sentences"][3].update(raw=" "), "caption 3 of it is empty"),
]


@pytest.mark.parametrize(("name", "edit", "says"), BROKEN)
def test_bad_files_are_named(
    name: str,
    edit: Callable[[Any], Any],
    says: str,
    build: Callable[[str], Any],
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variable = f"HONES_EVAL_{name.upper()}"
    copy = shutil.copytree(places[variable], tmp_path / "copy")
    (path,) = copy.rglob("*.json")
    monkeypatch.setenv(variable, str(path))
    where = change(path, edit)
    with pytest.raises(TaskError, match=says) as caught:
        build(f"hones_{name}")
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_data_set_is_asked_for_by_its_own_name(
    build: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, variable in VARIABLES.items():
        monkeypatch.setenv(variable, str(tmp_path))
        with pytest.raises(TaskError, match=rf"{variable}={re.escape(str(tmp_path))}: it has none of .*json"):
            build(name)
        monkeypatch.delenv(variable)
        with pytest.raises(TaskError, match=f"set {variable} to a folder with"):
            build(name)
    line = write(tmp_path / "results_20130124.token", "1000.jpg#0\tA dog.\n1000.jpg#1 A dog.\n")
    monkeypatch.setenv("HONES_EVAL_FLICKR30K", str(tmp_path))
    with pytest.raises(TaskError, match=re.escape(f"{line}, line 2: it is not of the form")):
        build("hones_flickr30k")


def test_neurons_of_one_folder_are_verified_on_all_of_them(
    llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(write_folder(tmp_path / "drawn", 4)))
    model = ["--model", "llava_hf", "--model_args", f"pretrained={llava_checkpoint}"]
    small = ["--limit", "4", "--gen_kwargs", "max_new_tokens=4"]
    ranking = str(tmp_path / "ranking")
    rank = ["rank", "--method", "dvp", *model, *small, "--tasks", "hones_vqa", "--neurons", "0.1"]
    assert main([*rank, "--out", ranking]) == 0
    metrics = {}
    for task in VARIABLES:
        out = tmp_path / task
        verify = ["verify", "--ranking", ranking, *model, *small, "--tasks", task, "--trials", "2"]
        assert main([*verify, "--out", str(out)]) == 0
        report = json.loads((out / "verify.json").read_text())
        metrics[task] = report["metric"]
        assert report["examples"]["count"] == (2 if task == "hones_gqa" else 4)
    assert list(metrics.values()) == ["exact_match", "vqa_accuracy", "bleu_4", "ndcg_at_5"]


def test_gold_answers_score_one(build: Callable[[str], Any]) -> None:
    for name in ("hones_gqa", "hones_textvqa"):
        task = build(name)
        scores = [
            next(iter(task.process_results(doc, [utils.vqa_target(doc)]).values())) for doc in task.eval_docs
        ]
        assert sum(scores) / len(scores) > 0.8
