"""Records to edit: one yes/no question about one image, the things it names, and where they are."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from hones_eval.choices import Level
from hones_eval.editing.boxes import Box

Answer = Literal["Yes", "No"]
LEVELS: dict[str, Level] = {
    "animal": "object",
    "indoor": "object",
    "vehicle": "object",
    "object": "object",
    "color": "attribute",
    "material": "attribute",
    "action": "relation",
    "spatial": "relation",
}


class Thing(NamedTuple):
    """One thing that a question names, and its box in pixels of the upright image."""

    name: str
    box: Box | None


@dataclass(frozen=True)
class Record:
    """A checked V-SEAM record: one question with its image."""

    question_id: str
    image_id: str
    image: str | None
    """The path of the image in the record; without it the image is found by `image_id`."""
    question: str
    answer: Answer
    level: Level
    category: str
    things: tuple[Thing, ...]
    repeated: str | None = None
    """A thing of the question that its scene graph has more than once."""
    prompt: str | None = None
    """The record's own prompt of the edit."""
    edited: str | None = None
    """The path of an edited image that was made elsewhere."""
    edited_answer: Answer | None = None
    counterfactual_question: str | None = None
    counterfactual_answer: Answer | None = None
