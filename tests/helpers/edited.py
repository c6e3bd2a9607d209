"""Drawn images and records for the tests of visual semantic edits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def scene(width: int = 160, height: int = 120, seed: int = 0) -> NDArray[np.uint8]:
    """A grainy grey-green ground with a shaded red disc on the left and a blue box on the right."""
    chance = np.random.default_rng(seed)
    picture = np.empty((height, width, 3), np.float64)
    picture[:] = (120, 140, 110)
    rows, columns = np.mgrid[0:height, 0:width]
    disc = (rows - 60) ** 2 + (columns - 45) ** 2 < 25**2
    shade = 0.6 + 0.4 * (columns - 20) / 50
    picture[disc] = (np.array([210, 40, 30]) * shade[..., None])[disc]
    picture[40:80, 100:140] = (40, 60, 190)
    picture += chance.normal(0, 4, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def record(**changes: Any) -> dict[str, Any]:
    """A question about the disc of `scene`, in the form of the V-SEAM release."""
    return {
        "question_id": "q1",
        "imageId": "scene",
        "category": "color",
        "question": "Is the ball red?",
        "answer": "Yes",
        "involved_objects": ["ball"],
        "object_positions": [{"x": 18, "y": 33, "w": 54, "h": 54}],
    } | changes


def object_record(**changes: Any) -> dict[str, Any]:
    return (
        record(category="indoor", question="Is there a clock in this picture?", involved_objects=["clock"])
        | changes
    )


def side_record(**changes: Any) -> dict[str, Any]:
    boxes = [{"x": 18, "y": 33, "w": 54, "h": 54}, {"x": 98, "y": 38, "w": 44, "h": 44}]
    base = record(
        category="spatial",
        question="Is the ball to the left of the box?",
        involved_objects=["ball", "box"],
        object_positions=boxes,
    )
    return base | changes


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Questions and their one image in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene()).save(folder / "scene.png")
    path = folder / "questions.json"
    path.write_text(json.dumps(rows))
    return path
