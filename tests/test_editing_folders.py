"""Folders as they really are, through the command: files of every kind, broken ones, and large ones."""

import json
import zlib
from pathlib import Path
from typing import Any

import edited
import numpy as np
import pytest
from PIL import Image, ImageCms

from hones_eval.__main__ import main

BALL = (18, 33, 54, 54)


def kinds(folder: Path) -> dict[str, Image.Image]:
    """Write `scene` as many kinds of file; what each looks like."""
    scene = Image.fromarray(edited.scene())
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.rotate(90, expand=True).save(folder / "turned.jpg", exif=exif, quality=95)
    scene.convert("L").save(folder / "grey.jpg", quality=95)
    clear = scene.convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(folder / "clear.png")
    scene.convert("CMYK").save(folder / "print.jpg", quality=95)
    palette = scene.quantize(64)
    palette.save(folder / "palette.png")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    scene.save(folder / "profile.webp", lossless=True, icc_profile=srgb)
    scene.save(folder / "plain.tif")
    scene.convert("1").save(folder / "bits.bmp")
    white = np.asarray(scene).copy()
    white[0, 0] = 255
    return {
        "turned": scene,
        "grey": scene.convert("L").convert("RGB"),
        "clear": Image.fromarray(white),
        "print": scene,
        "palette": palette.convert("RGB"),
        "profile": scene,
        "plain": scene,
        "bits": scene.convert("1").convert("RGB"),
    }


def broken(folder: Path) -> dict[str, str]:
    """Write files that are no whole image; what is said of each."""
    whole = (folder / "grey.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("404 not found")
    (folder / "folder.jpg").mkdir()
    size = b"IHDR" + (200_000).to_bytes(4) * 2 + b"\x08\x02\x00\x00\x00"
    header = (13).to_bytes(4) + size + zlib.crc32(size).to_bytes(4)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + (9).to_bytes(4) + b"IDAT")
    return {
        "cut": "cut.jpg cannot be read as an image: image file is truncated",
        "empty": "empty.png cannot be read as an image: cannot identify image file",
        "text": "text.jpg cannot be read as an image: cannot identify image file",
        "folder": "its image folder.jpg (or another suffix) is not in",
        "bomb": "bomb.png cannot be read as an image: Image size (40000000000 pixels) exceeds limit",
        "absent": "its image absent.jpg (or another suffix) is not in",
    }


def run(folder: Path, rows: list[dict[str, Any]], *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accepted rows and the report of the command, by question id."""
    (folder / "questions.json").write_text(json.dumps(rows))
    flags = ["edit", "--questions", str(folder / "questions.json"), "--out", str(folder / "out")]
    assert main([*flags, *more]) == 0
    accepted = json.loads((folder / "out" / "vseam_pairs.json").read_text())
    return {row["question_id"]: row for row in accepted}, json.loads(
        (folder / "out" / "report.json").read_text()
    )


def test_every_kind_of_file_is_edited_as_it_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, said = kinds(tmp_path), broken(tmp_path)
    rows = [edited.object_record(question_id=name, imageId=name) for name in [*said, *seen]]
    rows += [
        edited.object_record(question_id="nobox", imageId="grey", object_positions=[]),
        edited.object_record(question_id="flat", imageId="grey", object_positions=[[3, 3, 9, 0]]),
        edited.object_record(question_id="far", imageId="grey", object_positions=[[500, 3, 9, 9]]),
        edited.object_record(question_id="over", imageId="plain", object_positions=[[-30, 33, 102, 54]]),
    ]
    accepted, report = run(tmp_path, rows, "--editor", "remove", "--mask", "box")
    assert set(accepted) == {*seen, "over"}
    for name, row in accepted.items():
        clean, made = (Image.open(tmp_path / "out" / row[key]) for key in ("clean", "edited"))
        assert (clean.mode, clean.size) == (made.mode, made.size) == ("RGB", (160, 120))
        assert clean.getexif().get(0x0112, 1) == 1
        wanted = np.asarray(seen.get(name, seen["plain"])).astype(int)
        lost = 4 if name in ("turned", "grey", "print") else 0  # by JPEG
        assert np.abs(np.asarray(clean) - wanted).mean() <= lost
        mask = np.asarray(Image.open(tmp_path / "out" / row["mask"])) > 0
        assert np.array_equal(np.asarray(clean)[~mask], np.asarray(made)[~mask])
        left, top, width, height = BALL
        assert mask[top : top + height, left : left + width].all()
    reasons = {item["question_id"]: item["reason"] for item in report["not_editable"]}
    said |= {"nobox": "no box for 'clock'", "flat": "has no area", "far": "outside the image of 160 x 120"}
    assert set(reasons) == set(said)
    for name, reason in said.items():
        assert reason in reasons[name]
        assert "\n" not in reasons[name]
    assert not [path for name in said for path in (tmp_path / "out").rglob(f"{name}*")]
    assert "Traceback" not in capsys.readouterr().err


def test_an_image_of_50_megapixels(tmp_path: Path) -> None:
    width, height = 8660, 5774
    columns = np.linspace(90, 150, width).astype(np.uint8)
    picture = np.repeat(np.broadcast_to(columns, (height, width))[..., None], 3, axis=2).copy()
    picture[2500:3100, 4000:4700] = (200, 40, 30)
    Image.fromarray(picture).save(tmp_path / "scene.jpg", quality=90)
    rows = [edited.record(object_positions=[[3980, 2480, 740, 640]])]
    accepted, _ = run(tmp_path, rows, "--editor", "recolor")
    (row,) = accepted.values()
    made = Image.open(tmp_path / "out" / row["edited"])
    assert (made.mode, made.size) == ("RGB", (width, height))
    assert row["psnr_outside"] is None
    assert row["ssim_outside"] == 1
    middle = np.asarray(made.crop((4200, 2700, 4400, 2900))).mean((0, 1))
    assert np.abs(middle - (200, 40, 30)).max() > 60
