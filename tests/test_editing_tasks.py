"""Edits of an lmms-eval task's documents, and of images whose questions a model is asked."""

import json
from pathlib import Path
from typing import Any

import edited
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hones_eval.__main__ import main
from hones_eval.toy import checkpoint_path
from hones_eval.toy.drawing import draw
from hones_eval.toy.scenes import COLORS, Scene, scene

TASK = """\
task: own_records
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function images.shown
doc_to_text: "{{{{record}}}}"
doc_to_target: record
generation_kwargs:
  max_new_tokens: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
PICTURES = """\
from PIL import Image

def shown(doc):
    return [Image.open(doc["path"]).convert("RGB")]
"""


def pairs(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "vseam_pairs.json").read_text())
    return rows


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_tasks_documents_are_edited_like_a_file_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        edited.record(),
        edited.object_record(question_id="clock"),
        edited.side_record(question_id="side"),
    ]
    questions = edited.write(tmp_path / "in", records)
    documents = [
        {"record": json.dumps(record), "path": str(tmp_path / "in" / "scene.png")} for record in records
    ]
    (tmp_path / "in" / "cut.png").write_bytes((tmp_path / "in" / "scene.png").read_bytes()[:4000])
    documents += [
        {"record": "{", "path": documents[0]["path"]},
        {"record": json.dumps(edited.record(question_id="cut")), "path": str(tmp_path / "in" / "cut.png")},
        {"record": json.dumps(edited.record(question_id="gone")), "path": str(tmp_path / "in" / "gone.png")},
        {"record": json.dumps(edited.record(question_id="last")), "path": documents[0]["path"]},
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (tasks / "own.yaml").write_text(TASK.format(rows=tasks / "rows.jsonl"))
    (tasks / "images.py").write_text(PICTURES)
    from_task = ["--task", "own_records", "--include_path", str(tasks)]
    flags = ["edit", "--editor", "auto"]
    assert main([*flags, *from_task, "--limit", "6", "--out", str(tmp_path / "task")]) == 0
    said = capsys.readouterr().out
    for line in (
        "3: its column 'record' is not a JSON object",
        "4: its image cannot be read: image file is truncated",
        "5: its image cannot be read: [Errno 2] No such file",
    ):
        assert f"not editable {line}" in said
    assert "unknown: 0 accepted, 0 rejected, 3 not editable" in said
    assert main([*flags, "--questions", str(questions), "--out", str(tmp_path / "file")]) == 0
    one, two = pairs(tmp_path / "task"), pairs(tmp_path / "file")
    assert [row["question_id"] for row in one] == ["q1", "clock"]
    for row, other in zip(one, two, strict=True):
        for name in ("clean", "edited", "mask"):
            assert np.array_equal(
                pixels(tmp_path / "task" / row[name]), pixels(tmp_path / "file" / other[name])
            )
        same = set(row) - {"clean", "edited", "mask", "made_from"}
        assert {key: row[key] for key in same} == {key: other[key] for key in same}
    # The same image of several documents is kept once.
    assert len(list((tmp_path / "task_pictures").iterdir())) == 1
    assert main([*flags, "--task", "no_such_task", "--out", str(tmp_path / "none")]) == 1
    assert "no_such_task" in capsys.readouterr().err


def question(place: int) -> tuple[Scene, dict[str, Any]]:
    """Whether a thing of a drawn scene has its colour, or another one."""
    drawn = scene("test", place)
    thing = drawn.things[place % len(drawn.things)]
    yes = place in (9, 4)
    colour = thing.color if yes else next(color for color in COLORS if color != thing.color)
    left, top, right, bottom = thing.box
    return drawn, edited.record(
        question_id=f"scene-{place}",
        imageId=drawn.seed,
        question=f"Is the {thing.shape} {colour}?",
        answer="Yes" if yes else "No",
        involved_objects=[thing.shape],
        object_positions=[[left, top, right - left, bottom - top]],
    )


def test_edits_that_flip_a_models_answer_are_told_from_others(tmp_path: Path) -> None:
    """The embedded model, and what it says when transformers runs it without this package."""
    asked = [question(place) for place in (9, 2, 4)]
    for drawn, _ in asked:
        Image.fromarray(draw(drawn)).save(tmp_path / f"{drawn.seed}.png")
    (tmp_path / "questions.json").write_text(json.dumps([record for _, record in asked]))
    out = tmp_path / "out"
    flags = [
        "edit",
        "--questions",
        str(tmp_path / "questions.json"),
        "--editor",
        "recolor",
        "--out",
        str(out),
    ]
    flags += ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}"]
    assert main(flags) == 0
    rows = [json.loads(path.read_text()) for path in sorted((out / "rows").iterdir())]
    says = Says()
    expected = {}
    for row in rows:
        clean, made = says(out / row["clean"], row), says(out / row["edited"], row)
        right = clean.strip(" .") == row["answer"], made.strip(" .") == row["edited_answer"]
        expected[row["question_id"]] = (clean, made, right)
    accepted = {row["question_id"]: row for row in pairs(out)}
    assert {name for name, (_, _, right) in expected.items() if all(right)} == set(accepted)
    assert 0 < len(accepted) < 3
    for name, row in accepted.items():
        assert (row["model_clean"], row["model_edited"]) == expected[name][:2]
    report = json.loads((out / "report.json").read_text())
    reasons = {item["question_id"]: item["reasons"] for item in report["rejected"]}
    for name, given in reasons.items():
        clean, made, right = expected[name]
        assert any(clean in one and "for the clean image" in one for one in given) is not right[0]
        assert any(made in one and "for the edited image" in one for one in given) is not right[1]
    assert "model answer" in (out / "contact_sheet.html").read_text()
    # Another run asks again and says the same.
    before = (out / "vseam_pairs.json").read_bytes()
    assert main(flags) == 0
    assert (out / "vseam_pairs.json").read_bytes() == before


class Says:
    """The embedded model by transformers alone."""

    def __init__(self) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint_path())
        self.model = LlavaForConditionalGeneration.from_pretrained(checkpoint_path()).eval()

    def __call__(self, path: Path, row: dict[str, Any]) -> str:
        text = f"{row['question']} Please answer with a single word."
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(images=Image.open(path), text=prompt, return_tensors="pt")
        with torch.inference_mode():
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=8)
        return str(
            self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ).strip()


def test_a_model_is_asked_only_of_categories_that_have_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = edited.object_record(
        category="object", question="Is there a gizmo in this picture?", involved_objects=["gizmo"]
    )
    questions = edited.write(tmp_path, [other])
    flags = ["edit", "--questions", str(questions), "--editor", "remove", "--out", str(tmp_path / "out")]
    flags += ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}"]
    assert main(flags) == 1
    assert "no accepted edit is of a category that has a task" in capsys.readouterr().err
