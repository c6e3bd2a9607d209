"""A contact sheet of edits as an image and as a page: clean image, mask, edited image."""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jinja2 import Environment
from PIL import Image, ImageDraw, ImageFile, ImageFont

from hones_eval.core.artifact import write_bytes, write_text
from hones_eval.editing.run import Report
from hones_eval.editing.sheet_page import PAGE

THUMB = 210
SHARP = 320  # a page is looked at on screens with small pixels
OUTLINE = (255, 64, 200)
TEXT = 330
GAP = 8
SHOWN = 60
NAMED = 100


class Strip(NamedTuple):
    """The three small images of one edit."""

    clean: Image.Image
    mask: Image.Image
    edited: Image.Image


def contact_sheet(out: Path, report: Report, *, shown: int = SHOWN) -> None:
    """Write `contact_sheet.png` and `contact_sheet.html` into the folder of the edits.

    Args:
        out: the folder that the report's paths are relative to.
        report: its accepted and rejected edits are shown; what could not be edited is listed on the page.
        shown: at most so many edits, taken evenly from all; the sheet says how many there are.
    """
    rows = [*report.accepted, *report.rejected]
    chosen = [rows[place * len(rows) // shown] for place in range(shown)] if len(rows) > shown else rows
    strips = [_strip(out, row) for row in chosen]
    left = [f"{len(chosen)} of {len(rows)} edits are shown, taken evenly."] if len(rows) > shown else []
    counts = "; ".join(
        f"{level}: " + ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in each.items())
        for level, each in report.by_level().items()
    )
    write_bytes(out / "contact_sheet.png", _png(strips, chosen, [f"{counts}.", *left]))
    write_text(out / "contact_sheet.html", _page(strips, chosen, report, " ".join(left)))


def _strip(out: Path, row: Mapping[str, Any]) -> Strip:
    clean, edited = (_small(Image.open(out / row[key]), SHARP) for key in ("clean", "edited"))
    mask = np.asarray(Image.open(out / row["mask"]).convert("L").resize(clean.size)) > 127
    seen = np.where(mask[..., None], np.asarray(clean), np.asarray(clean) * 0.35).astype(np.uint8)
    seen[mask & (cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0)] = OUTLINE
    return Strip(clean, Image.fromarray(seen), edited)


def _small(image: Image.Image, side: int) -> Image.Image:
    """A copy of at most `side` pixels a side; a JPEG is decoded no larger than needed."""
    small = image if isinstance(image, ImageFile.ImageFile) else image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small.convert("RGB")


def lines_of(row: Mapping[str, Any]) -> list[str]:
    """The description of one edit, line by line: the question first, the verdict last."""
    made = f"{row['editor']} {row['edited_object']}"
    if row["semantic_level"] == "relation":
        made += f": {row['perturb_prompt']}"
    elif row["value"]:
        made += f" → {row['value']}"
    lines = [
        f"{row['question']} {row['answer']}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{row['edited_answer']}",
        made,
    ]
    if row.get("counterfactual_question"):
        lines.insert(1, f"{row['counterfactual_question']} {row['counterfactual_answer']}")
    psnr, ssim = row["psnr_outside"], row["ssim_outside"]
    same = "outside: nothing changed" if psnr is None else f"outside: PSNR {psnr:.1f} dB"
    if psnr is not None and ssim is not None:
        same += f", SSIM {ssim:.3f}"
    lines.append(f"{same}; inside: {row['change_inside']:.1f} ΔE")
    if "model_clean" in row:
        lines.append(f"model answer: {row['model_clean']!r} → {row.get('model_edited')!r}")
    lines.append(f"{row['question_id']} · {row['semantic_level']}, {row['category']}")
    lines.append("accepted" if row["accepted"] else "rejected: " + "; ".join(row["reasons"]))
    return lines


def _png(strips: Sequence[Strip], rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> bytes:
    """Draw all rows below each other."""
    font, line = ImageFont.load_default(13), 18
    small = [Strip(*(_small(image, THUMB) for image in strip)) for strip in strips]
    texts = [
        [piece for text in lines_of(row) for piece in textwrap.wrap(_drawable(text), 50)] for row in rows
    ]
    heights = [
        max(strip.clean.height, line * len(text)) + GAP for strip, text in zip(small, texts, strict=True)
    ]
    width = 3 * (THUMB + GAP) + TEXT + GAP
    title = [piece for note in ("clean, mask, edited", *notes) for piece in textwrap.wrap(note, 140)]
    head = line * len(title) + 2 * GAP
    sheet = Image.new("RGB", (width, head + sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), "\n".join(title), fill="black", font=font, spacing=4)
    top = head
    for strip, text, height in zip(small, texts, heights, strict=True):
        for place, image in enumerate(strip):
            sheet.paste(image, (GAP + place * (THUMB + GAP), top))
        place = GAP + 3 * (THUMB + GAP)
        draw.multiline_text((place, top), "\n".join(text), fill="black", font=font, spacing=4)
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _drawable(line: str) -> str:
    """Replace characters that Pillow's built-in font lacks."""
    return line.replace("\N{NO-BREAK SPACE}", " ").replace("→", "->").replace("ΔE", "dE").replace("·", "-")


def _page(strips: Sequence[Strip], rows: Sequence[Mapping[str, Any]], report: Report, note: str) -> str:
    entries = [
        {
            "images": {name: _data(image) for name, image in strip._asdict().items()},
            "lines": lines_of(row),
            "accepted": row["accepted"],
        }
        for strip, row in zip(strips, rows, strict=True)
    ]
    template = Environment(autoescape=True).from_string(PAGE)
    named, more = report.problems[:NAMED], len(report.problems[NAMED:])
    return template.render(entries=entries, counts=report.by_level(), note=note, problems=named, more=more)


def _data(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
