import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import edited
import numpy as np
import pytest
from PIL import Image

from hones_eval.__main__ import main
from hones_eval.editing.reading import read_records
from hones_eval.editing.run import Report, edit_records
from hones_eval.editing.sheet import GAP, OUTLINE, THUMB
from hones_eval.editing.work import EditSettings
from hones_eval.errors import HonesError

DATA = os.environ.get("HONES_EVAL_TEST_DATA")


def good() -> list[dict[str, Any]]:
    return [
        edited.record(),
        edited.object_record(question_id="clock"),
        edited.record(
            question_id="wood",
            category="material",
            question="Is the ball made of stone?",
            perturb_prompt="wood",
        ),
        edited.side_record(
            question_id="side/odd name", object_positions=[[18, 33, 54, 54], [76, 38, 10, 44]]
        ),
    ]


def run(path: Path, out: Path, workers: int = 0, **settings: Any) -> Report:
    return edit_records(
        read_records(path), path.parent, out, EditSettings(**({"editor": "auto"} | settings)), workers=workers
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_the_same_to_the_bit_in_other_processes(tmp_path: Path) -> None:
    path = edited.write(tmp_path, good())
    one, two = run(path, tmp_path / "one"), run(path, tmp_path / "two", workers=2)
    assert len(one.accepted) == 4
    assert one.accepted == two.accepted
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    other = run(path, tmp_path / "other", seed=1)
    assert [row["value"] for row in other.accepted] != [row["value"] for row in one.accepted]


def test_the_table_names_files_that_are_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(edited.write(tmp_path, good()), out)
    rows = json.loads((out / "vseam_pairs.json").read_text())
    assert [row["question_id"] for row in rows] == ["q1", "clock", "wood", "side/odd name"]
    for row in rows:
        assert row["answer"] != row["edited_answer"]
        clean, made, mask = (np.asarray(Image.open(out / row[key])) for key in ("clean", "edited", "mask"))
        assert clean.shape == made.shape == (*mask.shape, 3)
        assert np.array_equal(clean[mask == 0], made[mask == 0])
        assert row["psnr_outside"] is None
        assert row["accepted"]
        assert row["change_inside"] > 3
    assert json.loads((out / "report.json").read_text())["by_level"]["attribute"]["accepted"] == 2


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, out = edited.write(tmp_path, good()), tmp_path / "out"
    run(path, out)
    before = contents(out)
    assert run(path, out).resumed == 4
    (out / "images" / "clock_edited.png").unlink()
    (out / "rows" / "q1.json").unlink()
    again = run(path, out)
    assert again.resumed == 2
    assert contents(out) == before
    rows = good()
    rows[0] |= {"question": "Is the ball pink?", "answer": "No"}
    path.write_text(json.dumps(rows))
    changed = run(path, out)
    assert (changed.resumed, changed.accepted[0]["value"]) == (3, "pink")
    picture = edited.scene(seed=9)
    Image.fromarray(picture).save(path.parent / "scene.png")
    assert run(path, out).resumed == 0


@pytest.mark.parametrize(("workers", "step", "kills"), [("0", "3", 3), ("2", "6", 2)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, workers: str, step: str, kills: int
) -> None:
    """Its workers end with it: a process that outlived it would keep its output open, and this waiting."""
    path = edited.write(tmp_path, good())
    flags = ["edit", "--questions", str(path), "--editor", "auto", "--workers", workers]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    script = Path(__file__).parent / "helpers" / "killed_edits.py"
    command = [sys.executable, script, step, *flags, "--out", tmp_path / "killed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) >= kills
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_edits_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path, out = edited.write(tmp_path, good()), tmp_path / "out"
    run(path, out, level="object")
    with pytest.raises(
        HonesError, match="contains edits made with another level, seed; choose another --out"
    ):
        run(path, out, seed=3)
    with pytest.raises(HonesError, match=r"contains other files and no settings\.json"):
        run(path, path.parent)


def test_bad_records_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    rows = [
        edited.record(question_id="nobox", object_positions=[]),
        edited.record(question_id="flat", object_positions=[[3, 3, 0, 5]]),
        edited.record(question_id="outside", object_positions=[[900, 3, 10, 5]]),
        edited.record(question_id="missing", imageId="nowhere"),
        edited.record(question_id="cut", clean="cut.png"),
        edited.record(question_id="tiny", clean="tiny.png", object_positions=[[0, 0, 5, 5]]),
        "not a record",
        edited.record(question_id="good"),
    ]
    path = edited.write(tmp_path, rows)
    content = (tmp_path / "scene.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    Image.new("RGB", (12, 12)).save(tmp_path / "tiny.png")
    report = run(path, tmp_path / "out")
    assert [row["question_id"] for row in report.accepted] == ["good"]
    said = {problem.question_id: problem.reason for problem in report.problems}
    for name, reason in {
        "nobox": "no box for 'ball'",
        "flat": "has no area",
        "outside": "outside the image of 160 x 120",
        "missing": "nowhere.jpg (or another suffix) is not in",
        "cut": "cut.png cannot be read as an image",
        "tiny": "smaller than 16 pixels",
        "row 6": "is a str, not a record",
    }.items():
        assert reason in said[name]
    assert len(said) == 7
    written = {name for name in contents(tmp_path / "out") if "good" not in name}
    assert len([name for name in written if name.startswith("images")]) == 1  # the clean image
    assert not [name for name in written if name.startswith(("masks", "rows"))]


def test_a_mask_over_everything_is_rejected_with_the_reason(tmp_path: Path) -> None:
    whole = edited.object_record(object_positions=[[0, 0, 160, 120]])
    report = run(edited.write(tmp_path, [whole]), tmp_path / "out", mask="box")
    assert not report.accepted
    assert "mean change is 0.00" in report.rejected[0]["reasons"][0]
    assert json.loads((tmp_path / "out" / "vseam_pairs.json").read_text()) == []


def test_boxes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    path = edited.write(tmp_path, [edited.record()])
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(edited.scene()).rotate(90, expand=True)
    lying.save(tmp_path / "scene.png", exif=exif)
    (row,) = run(path, tmp_path / "out").accepted
    clean = Image.open(tmp_path / "out" / row["clean"])
    assert np.array_equal(np.asarray(clean), edited.scene())
    assert clean.getexif().get(0x0112, 1) == 1


def test_images_made_elsewhere_are_judged(tmp_path: Path) -> None:
    rows = [
        edited.record(question_id=name, edited_answer="No") for name in ("kept", "spilt", "small", "none")
    ]
    path = edited.write(tmp_path, rows)
    inside = edited.scene()
    inside[35:85, 20:70] = (30, 30, 200)
    made = {"kept": inside, "spilt": 255 - edited.scene(), "small": inside[:100]}
    (tmp_path / "made").mkdir()
    for name, picture in made.items():
        Image.fromarray(picture).save(tmp_path / "made" / f"{name}.png")
    report = run(path, tmp_path / "out", editor="folder", mask="box", folder=str(tmp_path / "made"))
    assert [row["question_id"] for row in report.accepted] == ["kept"]
    assert report.accepted[0]["answer_from"] == "record"
    reasons = {row["question_id"]: row["reasons"] for row in report.rejected}
    assert "PSNR" in reasons["spilt"][0]
    assert "the edited image is 160 x 100" in reasons["small"][0]
    assert "none.jpg (or another suffix) is not in" in report.problems[0].reason


def test_a_box_that_holds_part_of_the_other_thing_is_not_moved(tmp_path: Path) -> None:
    overlapping = edited.side_record(
        question="Is the ball next to the box?", object_positions=[[18, 33, 90, 54], [98, 38, 44, 44]]
    )
    report = run(edited.write(tmp_path, [overlapping]), tmp_path / "out", editor="move", mask="box")
    assert "moving the box of 'ball' would also move part of 'box'" in report.problems[0].reason
    apart = edited.side_record(object_positions=[[18, 33, 54, 54], [76, 38, 10, 44]])
    assert run(edited.write(tmp_path, [apart]), tmp_path / "two", editor="move", mask="box").accepted


def test_the_table_says_which_of_two_things_was_moved(tmp_path: Path) -> None:
    """The disc has no room on the right of the box, so the box goes to the left of the disc."""
    corner = edited.side_record(object_positions=[[58, 33, 54, 54], [138, 38, 22, 44]])
    path = edited.write(tmp_path, [corner])
    picture = np.roll(edited.scene(), 40, axis=1)
    picture[:, :20] = picture[:, 20:40]
    Image.fromarray(picture).save(tmp_path / "scene.png")
    (row,) = run(path, tmp_path / "out", editor="move", mask="box").accepted
    assert row["edited_object"] == "box"
    assert row["perturb_prompt"] == "ball to the right of box"
    made = np.asarray(Image.open(tmp_path / "out" / row["edited"])).astype(int)
    assert (made[45:75, 33:48, 2] > 150).all()
    assert np.array_equal(made[40:80, 70:100], picture[40:80, 70:100])


def test_an_editor_is_refused_a_level_that_it_does_not_serve(tmp_path: Path) -> None:
    with pytest.raises(HonesError, match="can edit attribute, not object; for object use remove or "):
        run(edited.write(tmp_path, good()), tmp_path / "out", editor="recolor", level="object")
    report = run(edited.write(tmp_path, good()), tmp_path / "out", editor="recolor")
    assert (len(report.accepted), report.left_out) == (1, 3)


# The front door


def test_the_command_writes_a_folder_that_the_edited_tasks_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = edited.record(question_id="bad", answer="blue")
    path, out = edited.write(tmp_path / "in", [*good(), bad]), tmp_path / "out"
    assert main(["edit", "--questions", str(path), "--editor", "auto", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "attribute: 2 accepted, 0 rejected, 0 not editable; object: 1 accepted" in said
    assert "not editable bad: its answer is 'blue'" in said
    page = (out / "contact_sheet.html").read_text()
    assert page.count("<article") == 4
    assert page.count("data:image/jpeg") == 12
    assert "<li>bad: its answer is &#39;blue&#39;" in page
    assert "<tr><th>attribute</th><td>2</td><td>0</td><td>0</td></tr>" in page
    assert Image.open(out / "contact_sheet.png").height > 4 * 100
    monkeypatch.setenv("HONES_EVAL_DATA", str(out))
    from hones_eval.tasks.vseam import data

    (question,) = data.gqa("color").questions
    assert (question.answer, question.edited_answer) == ("Yes", "No")
    assert question.picture
    assert question.edited_picture == out / "images" / "q1_edited.png"


def test_a_sheet_of_some_shows_them_from_all_over(tmp_path: Path) -> None:
    rows = [edited.record(question_id=f"n{place}") for place in range(7)]
    flags = ["edit", "--questions", str(edited.write(tmp_path, rows)), "--editor", "recolor", "--sheet", "3"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert re.findall(r"<p>(n\d) ·", page) == ["n0", "n2", "n4"]
    assert "3 of 7 edits are shown, taken evenly." in page


def test_a_mask_is_outlined_on_the_sheet(tmp_path: Path) -> None:
    path = edited.write(tmp_path, [edited.record()])
    assert (
        main(["edit", "--questions", str(path), "--editor", "recolor", "--out", str(tmp_path / "out")]) == 0
    )
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB")).astype(int)
    outlined = (np.abs(sheet - OUTLINE).max(-1) < 12).any(0)
    assert outlined[THUMB : 2 * THUMB + GAP].any()
    assert not outlined[:THUMB].any()
    assert not outlined[2 * (THUMB + GAP) :].any()


def test_a_page_shows_a_question_as_text_and_not_as_markup(tmp_path: Path) -> None:
    path = edited.write(tmp_path, [edited.record(question_id="<script>alert(1)</script>")])
    assert (
        main(["edit", "--questions", str(path), "--editor", "recolor", "--out", str(tmp_path / "out")]) == 0
    )
    assert "<script>" not in (tmp_path / "out" / "contact_sheet.html").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--editor", "remove"], "either --questions FILE"),
        (["--editor", "remove", "--questions", "{in}/none.json"], "none.json does not exist"),
        (
            ["--editor", "remove", "--questions", "{in}/questions.json", "--images", "{in}/nowhere"],
            "is not a folder",
        ),
        (["--editor", "inpaint", "--questions", "{in}/questions.json"], "needs a checkpoint"),
        (
            ["--editor", "auto", "--questions", "{in}/questions.json", "--mask", "segmenter"],
            "needs a checkpoint",
        ),
        (["--editor", "remove", "--questions", "{in}/questions.json"], "none of 1 records could be edited"),
        (["--editor", "remove", "--questions", "{in}/empty.json"], "empty.json: there is no record in it"),
        (["--editor", "remove", "--limit=-1"], "--limit -1: at least 1 example is needed"),
        (["--editor", "remove", "--sheet=-1"], "--sheet -1: give 0 or more"),
        (["--editor", "remove", "--workers=-1"], "--workers -1: give 0 or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited.write(tmp_path, [edited.record()])
    (tmp_path / "empty.json").write_text("[]")
    given = [flag.format(**{"in": tmp_path}) for flag in flags]
    assert main(["edit", *given, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_edits_need_no_diffusers_and_workers_no_torch() -> None:
    """Workers start in the time that Pillow and OpenCV take; the runs that paint import what they need."""
    code = (
        "import sys, hones_eval.editing.work;"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.skipif(not DATA, reason="HONES_EVAL_TEST_DATA names no folder with the real photographs")
def test_the_real_photographs(tmp_path: Path) -> None:
    folder = Path(str(DATA)) / "real"
    reading = read_records(folder / "vseam_pairs.json")
    chosen = [record for record in reading.records if record.category not in ("animal", "vehicle")]
    report = edit_records(reading._replace(records=chosen), folder, tmp_path, EditSettings("auto"))
    assert {row["category"] for row in report.accepted} == {"indoor", "color", "material"}
    # Both relations name one box only, so that what is true after a move does not follow.
    assert {problem.question_id for problem in report.problems} == {"pair-action", "pair-spatial"}
