"""Questions about a scene graph at three semantic levels, open and yes/no, and edits that change the answer.

The levels are those of V-SEAM (EMNLP 2025): object, attribute, relation. A question knows how to be answered
on any scene, so a clean and an edited image share one question, and both answers come from the graph.
"""

import random
from dataclasses import dataclass
from typing import Literal, get_args

from hones_eval.toy import edits
from hones_eval.toy.scenes import COLORS, PLACES, RELATIONS, SHAPES, TEXTURES, Scene, SceneError, related

Level = Literal["object", "attribute", "relation"]
Kind = Literal[
    "exists", "shape_at", "color", "texture", "size", "is_color", "is_texture", "is_side", "what_side"
]

KINDS: dict[Level, tuple[Kind, ...]] = {
    "object": ("exists", "shape_at"),
    "attribute": ("color", "is_color", "texture", "is_texture", "size"),
    "relation": ("is_side", "what_side"),
}
TEXT: dict[Kind, str] = {
    "exists": "Is there a {shape}?",
    "shape_at": "What is at the {value}?",
    "color": "What color is the {shape}?",
    "texture": "What texture is the {shape}?",
    "size": "What size is the {shape}?",
    "is_color": "Is the {shape} {value}?",
    "is_texture": "Is the {shape} {value}?",
    "is_side": "Is the {shape} {value} the {other}?",
    "what_side": "What is {value} the {other}?",
}


@dataclass(frozen=True)
class Question:
    """A question about a `shape`, a `value` (colour, texture, place or relation) and an `other` shape."""

    kind: Kind
    shape: str = ""
    value: str = ""
    other: str = ""

    @property
    def text(self) -> str:
        """The question in words."""
        return TEXT[self.kind].format(shape=self.shape, value=self.value, other=self.other)

    @property
    def level(self) -> Level:
        """The semantic level that the question belongs to."""
        return next(level for level in get_args(Level) if self.kind in KINDS[level])

    def answer(self, scene: Scene) -> str | None:
        """The answer on this scene, or None if the question has no single answer."""
        thing, other = scene.thing(self.shape), scene.thing(self.other)
        if self.kind == "exists":
            return _yes(thing is not None)
        if self.kind == "shape_at":
            return _only([t.shape for t in scene.things if t.place == self.value])
        if self.kind == "what_side":
            return _only([t.shape for t in scene.things if related(t, self.value, other)]) if other else None
        if self.kind == "is_side":
            return _yes(related(thing, self.value, other)) if thing and other else None
        if thing is None:
            return None
        attribute = getattr(thing, self.kind.removeprefix("is_"))
        return _yes(attribute == self.value) if self.kind.startswith("is_") else str(attribute)


def ask(scene: Scene, kind: Kind, rng: random.Random, yes: bool | None = None) -> Question | None:
    """A question of this kind that has an answer on this scene, or None.

    Yes/no questions have the answer `yes`, or either one equally often.
    """
    yes = rng.random() < 0.5 if yes is None else yes
    thing, other = rng.sample(scene.things, 2)
    if kind == "exists":
        absent = [shape for shape in SHAPES if scene.thing(shape) is None]
        return Question(kind, thing.shape if yes else rng.choice(absent))
    if kind == "shape_at":
        return _answerable(scene, [Question(kind, value=place) for place in PLACES], rng)
    if kind == "what_side":
        return _answerable(
            scene, [Question(kind, value=r, other=t.shape) for t in scene.things for r in RELATIONS], rng
        )
    if kind == "is_side":
        true = [related(thing, relation, other) for relation in RELATIONS]
        fitting = [relation for relation, holds in zip(RELATIONS, true, strict=True) if holds == yes]
        return Question(kind, thing.shape, rng.choice(fitting), other.shape) if any(true) else None
    if kind in ("is_color", "is_texture"):
        values = COLORS if kind == "is_color" else TEXTURES
        held = thing.color if kind == "is_color" else thing.texture
        return Question(kind, thing.shape, held if yes else rng.choice([v for v in values if v != held]))
    return Question(kind, thing.shape)


def edit(scene: Scene, question: Question, rng: random.Random) -> Scene | None:
    """The scene with one object, attribute or relation changed so that the answer differs.

    The change is of the question's own level. None if no single change is enough.
    """
    edited = _edited(scene, question, rng)
    if edited is None or question.answer(edited) in (None, question.answer(scene)):
        return None
    return edited


def _edited(scene: Scene, question: Question, rng: random.Random) -> Scene | None:
    kind, target = question.kind, scene.thing(question.shape)
    if kind == "exists":
        if target is None:
            return edits.replace_object(scene, rng.choice(scene.things).shape, question.shape)
        return edits.replace_object(scene, target.shape, rng.choice(edits.absent_shapes(scene)))
    if kind == "shape_at":
        shape = question.answer(scene)
        return shape and edits.replace_object(scene, shape, rng.choice(edits.absent_shapes(scene)))  # type: ignore[return-value]
    if kind == "is_side":
        return edits.swap_places(scene, question.shape, question.other)
    if kind == "what_side":
        shape = question.answer(scene)
        rest = [t.shape for t in scene.things if t.shape not in (shape, question.other)]
        return edits.swap_places(scene, shape, rest[0]) if shape and rest else None
    if target is None:
        raise SceneError(f"scene {scene.seed} has no {question.shape} to edit")
    return _change_attribute(scene, question, rng)


def _change_attribute(scene: Scene, question: Question, rng: random.Random) -> Scene | None:
    attribute = question.kind.removeprefix("is_")
    if attribute == "size":
        return edits.change_size(scene, question.shape)
    if question.answer(scene) == "No":
        return edits.set_attribute(scene, question.shape, attribute, question.value)
    return edits.change_attribute(scene, question.shape, attribute, rng)


def _answerable(scene: Scene, questions: list[Question], rng: random.Random) -> Question | None:
    fitting = [question for question in questions if question.answer(scene) is not None]
    return rng.choice(fitting) if fitting else None


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _yes(holds: bool) -> str:
    return "Yes" if holds else "No"
