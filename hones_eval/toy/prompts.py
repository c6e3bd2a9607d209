"""The prompts and answers of the tasks, for training the toy model and for the tasks themselves.

VQA, OCR, captioning and retrieval are worded as in HONES (ACL 2026 Findings). Grounding and the description
of every cell are this package's own; the description serves training alone.
"""

import random
from functools import cache
from typing import Literal, NamedTuple

from hones_eval.toy import captions, questions, scenes
from hones_eval.toy.scenes import SIDE, WORDS, Scene, Thing

Topic = Literal["describe", "inventory", "ocr", "caption", "retrieval", "grounding"]

VQA = "Question: {question}\nAnswer the question with a short phrase."
OCR = "Transcribe the text inside the blue box.\nOutput text only."
CAPTION = "Describe the image in one sentence."
RETRIEVAL = (
    "Candidate: {caption}\nDoes the candidate correctly describe the image?\nAnswer exactly Yes or No."
)
GROUNDING = "Locate the {phrase}.\nAnswer with the box as x1 y1 x2 y2."
DESCRIBE = "Describe every cell of the image."
INVENTORY = "Describe the {shapes}."


class Exchange(NamedTuple):
    """One prompt and its answer."""

    prompt: str
    answer: str


def exchange(scene: Scene, topic: Topic | questions.Kind, rng: random.Random) -> Exchange | None:
    """A prompt of this topic about a scene, and its answer; or None if the scene has no such question."""
    if topic == "describe":
        return Exchange(DESCRIBE, captions.description(scene))
    if topic == "inventory":
        return _inventory(scene, rng)
    if topic == "ocr":
        return Exchange(OCR, scene.word)
    if topic == "caption":
        return Exchange(CAPTION, captions.captions(scene)[0])
    if topic == "grounding":
        return locate(rng.choice(scene.things))
    if topic == "retrieval":
        true = rng.random() < 0.5
        return judge(captions.captions(scene)[0] if true else captions.near_miss(scene, rng), true)
    question = questions.ask(scene, topic, rng)
    answer = question and question.answer(scene)
    return Exchange(VQA.format(question=question.text), answer) if question and answer else None


def locate(thing: Thing) -> Exchange:
    """Grounding: the box of a thing as four pixel numbers, left, top, right, bottom."""
    return Exchange(GROUNDING.format(phrase=captions.phrase(thing)), " ".join(map(str, thing.box)))


def judge(caption: str, true: bool) -> Exchange:
    """Pairwise retrieval: whether a candidate caption describes the image."""
    return Exchange(RETRIEVAL.format(caption=caption), "Yes" if true else "No")


def _inventory(scene: Scene, rng: random.Random) -> Exchange:
    """Describe each named shape. Every token of the answer needs a lookup by content. One may be absent."""
    absent = [shape for shape in scenes.SHAPES if scene.thing(shape) is None]
    shapes = [thing.shape for thing in scene.things] + rng.sample(absent, rng.randrange(2))
    rng.shuffle(shapes)
    entries = []
    for shape in shapes:
        thing = scene.thing(shape)
        look = (
            f"{thing.color} {thing.texture} {thing.size} {' '.join(map(str, thing.box))}"
            if thing
            else "nothing"
        )
        entries.append(f"{shape} {look}")
    return Exchange(INVENTORY.format(shapes=" and the ".join(shapes)), ". ".join(entries))


def vocabulary_text() -> list[str]:
    """Texts that hold every word the tasks can use, for building the vocabulary."""

    words = (
        *scenes.SHAPES,
        *scenes.COLORS,
        *scenes.TEXTURES,
        *scenes.SIZES,
        *scenes.PLACES,
        *scenes.RELATIONS,
    )
    fixed = (
        VQA,
        OCR,
        CAPTION,
        RETRIEVAL,
        GROUNDING,
        DESCRIBE,
        "a there is and nothing word . Yes No",
    )
    asked = tuple(questions.TEXT.values())
    numbers = (str(number) for number in range(SIDE + 1))
    return [*words, *(text.replace("{", " ").replace("}", " ") for text in (*fixed, *asked)), *numbers]


@cache
def letters() -> list[str]:
    """The letters that words in the blue box are made of."""
    return sorted({letter for words in WORDS.values() for word in words for letter in word})
