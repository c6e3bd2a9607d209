"""A folder of drawn images with annotations in the unified format of the HONES tasks."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "white", "orange", "purple", "pink", "brown", "gray")
SHAPES = ("square", "circle")


def write_folder(folder: Path, count: int, first_question: str | None = None) -> Path:
    """Write ``count`` images of one shape each into ``folder/images``, and ``folder/drawn.json``."""
    (folder / "images").mkdir(parents=True)
    data = []
    for i in range(count):
        colour, shape = COLOURS[i % len(COLOURS)], SHAPES[(i // len(COLOURS) + i) % 2]
        left, top = 6 + 3 * (i % 5), 8 + 2 * (i % 7)
        _draw(colour, shape, left, top, str(i)).save(folder / "images" / f"drawn_{i}.png")
        data.append(_entry(i, colour, shape, [left, top, 24, 24]))
    if first_question:
        data[0]["vqa"]["question"] = first_question
    (folder / "drawn.json").write_text(json.dumps({"data": data}))
    return folder


def _draw(colour: str, shape: str, left: int, top: int, text: str) -> Image.Image:
    picture = Image.new("RGB", (64, 56), "black")
    pen = ImageDraw.Draw(picture)
    (pen.rectangle if shape == "square" else pen.ellipse)([left, top, left + 24, top + 24], fill=colour)
    pen.text((48, 40), text, fill="white")
    return picture


def _entry(i: int, colour: str, shape: str, box: list[int]) -> dict:
    answers = [colour] * 8 + ["dark", "bright"]
    captions = [
        f"A {colour} {shape} on black.",
        f"There is one {colour} {shape}.",
        f"The {shape} is {colour}.",
        f"One {colour} {shape} near number {i}.",
        f"An image of a {shape} in {colour}.",
    ]
    return {
        "image_info": {"file_name": f"drawn_{i}.png", "width": 64, "height": 56},
        "vqa": {"question": f"What colour is the {shape}?", "answer": colour, "answers": answers},
        "captions": [{"caption": caption} for caption in captions],
        "ocr": {"text": f"number {i}", "bbox": [46, 38, 14, 14]},
        "grounding": {"phrase": f"{colour} {shape}", "bbox": box},
    }
