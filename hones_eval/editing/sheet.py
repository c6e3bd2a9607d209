"""A contact sheet of edits, clean beside mask beside edited, as a picture and as a page."""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment
from PIL import Image, ImageDraw, ImageFont

from hones_eval.artefact import write_bytes, write_text
from hones_eval.editing.sheet_page import PAGE

THUMB = 210
TEXT = 330
GAP = 8
SHOWN = 60


class Strip(NamedTuple):
    """The three small pictures of one edit."""

    clean: Image.Image
    mask: Image.Image
    edited: Image.Image


def contact_sheet(
    out: Path, rows: Sequence[Mapping[str, Any]], *, shown: int = SHOWN, note: str = ""
) -> None:
    """Write `contact_sheet.png` and `contact_sheet.html` into the folder of the edits.

    Args:
        out: the folder that the rows' paths are relative to.
        rows: of `vseam_pairs.json`, or such rows of rejected edits.
        shown: at most so many; the sheet says how many are left out.
        note: a line under the title.
    """
    chosen = list(rows[:shown])
    strips = [_strip(out, row) for row in chosen]
    left = f"{len(rows) - len(chosen)} more are not shown." if len(rows) > len(chosen) else ""
    line = " ".join(one for one in (note, left) if one)
    write_bytes(out / "contact_sheet.png", _png(strips, chosen, line))
    write_text(out / "contact_sheet.html", _page(strips, chosen, line))


def _strip(out: Path, row: Mapping[str, Any]) -> Strip:
    clean = _thumb(Image.open(out / row["clean"]))
    mask = np.asarray(_thumb(Image.open(out / row["mask"])).convert("L").resize(clean.size))
    dim = (np.asarray(clean) * 0.35).astype(np.uint8)
    seen = np.where((mask > 127)[..., None], np.asarray(clean), dim)
    return Strip(clean, Image.fromarray(seen), _thumb(Image.open(out / row["edited"])))


def _thumb(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    return small


def lines_of(row: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of one edit, line by line."""
    made = f"{row['editor']} {row['edited_object']}" + (f" → {row['value']}" if row["value"] else "")
    lines = [
        f"{row['question_id']} · {row['semantic_level']}, {row['category']}",
        f"{row['question']} {row['answer']} → {row['edited_answer']}",
        made,
    ]
    if row.get("counterfactual_question"):
        lines.insert(2, f"{row['counterfactual_question']} {row['counterfactual_answer']}")
    psnr, ssim = row["psnr_outside"], row["ssim_outside"]
    same = "outside: nothing changed" if psnr is None else f"outside: PSNR {psnr:.1f} dB"
    if psnr is not None and ssim is not None:
        same += f", SSIM {ssim:.3f}"
    lines.append(f"{same}; inside: {row['change_inside']:.1f} ΔE")
    lines.append("accepted" if row["accepted"] else "rejected: " + "; ".join(row["reasons"]))
    return lines


def _png(strips: Sequence[Strip], rows: Sequence[Mapping[str, Any]], note: str) -> bytes:
    """All rows under each other."""
    font, head = ImageFont.load_default(13), 24
    heights = [max(strip.clean.height, 8 * 18) + GAP for strip in strips]
    sheet = Image.new("RGB", (3 * (THUMB + GAP) + TEXT + GAP, head + sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 6), f"clean, mask, edited. {note}".strip(), fill="black", font=font)
    top = head
    for strip, row, height in zip(strips, rows, heights, strict=True):
        for place, picture in enumerate(strip):
            sheet.paste(picture, (GAP + place * (THUMB + GAP), top))
        text = "\n".join(piece for line in lines_of(row) for piece in textwrap.wrap(_drawable(line), 50))
        draw.multiline_text((GAP + 3 * (THUMB + GAP), top), text, fill="black", font=font, spacing=4)
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _drawable(line: str) -> str:
    """Without the signs that Pillow's own font lacks."""
    return line.replace("→", "->").replace("ΔE", "dE").replace("·", "-")


def _page(strips: Sequence[Strip], rows: Sequence[Mapping[str, Any]], note: str) -> str:
    entries = [
        {"pictures": [_data(one) for one in strip], "lines": lines_of(row), "accepted": row["accepted"]}
        for strip, row in zip(strips, rows, strict=True)
    ]
    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(entries=entries, note=note, names=("clean", "mask", "edited"))


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
