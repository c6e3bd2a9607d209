"""Edits of a scene graph that change exactly one object, attribute, relation or word.

A clean and an edited scene drawn with the same paper differ only inside the boxes of what was changed:
perfect pairs for causal tracing (V-SEAM, EMNLP 2025, builds such pairs by inpainting).
"""

import dataclasses
import random

from hones_eval.toy.scenes import CELL, COLORS, SHAPES, TEXTURES, WORDS, Box, Scene, SceneError, Thing


def absent_shapes(scene: Scene) -> list[str]:
    """The shapes that the scene does not have."""
    return [shape for shape in SHAPES if scene.thing(shape) is None]


def replace_object(scene: Scene, shape: str, new_shape: str) -> Scene:
    """Replace a thing's shape; its colour, texture, size and box stay."""
    return _with(scene, {shape: dataclasses.replace(_find(scene, shape), shape=new_shape)})


def set_attribute(scene: Scene, shape: str, attribute: str, value: str) -> Scene:
    """Set the colour or texture of the thing of this shape."""
    known = {"color": COLORS, "texture": TEXTURES}
    if value not in known.get(attribute, ()):
        raise SceneError(f"cannot set {attribute} to '{value}'; an edit sets one of {known}")
    thing = _find(scene, shape)
    if attribute == "color":
        return _with(scene, {shape: dataclasses.replace(thing, color=value)})
    return _with(scene, {shape: dataclasses.replace(thing, texture=value)})


def change_size(scene: Scene, shape: str) -> Scene:
    """Make a large thing small, or a small one large, around the same centre (to one pixel)."""
    thing = _find(scene, shape)
    left, top = thing.box[:2]
    size, step, side = ("small", 4, 14) if thing.size == "large" else ("large", -4, 24)
    box = (left + step, top + step, left + step + side, top + step + side)
    return _with(scene, {shape: dataclasses.replace(thing, size=size, box=box)})


def change_attribute(scene: Scene, shape: str, attribute: str, rng: random.Random) -> Scene:
    """Give the thing of this shape a different random colour or texture."""
    held = getattr(_find(scene, shape), attribute)
    values = COLORS if attribute == "color" else TEXTURES
    return set_attribute(scene, shape, attribute, rng.choice([value for value in values if value != held]))


def swap_places(scene: Scene, shape: str, other: str) -> Scene:
    """Swap the cells of two things. Each keeps its look and its offset within the cell."""
    first, second = _find(scene, shape), _find(scene, other)
    moved = dataclasses.replace(first, box=_moved(first.box, second.box))
    back = dataclasses.replace(second, box=_moved(second.box, first.box))
    return _with(scene, {shape: moved, other: back})


def change_word(scene: Scene, rng: random.Random) -> Scene:
    """Put another word of the same split into the blue box, one that differs by one letter if possible."""
    split = scene.seed.split("-")[0]
    others = [word for word in WORDS[split] if word != scene.word]
    near = [w for w in others if sum(a != b for a, b in zip(w, scene.word, strict=True)) == 1]
    return dataclasses.replace(scene, word=rng.choice(near or others))


def _find(scene: Scene, shape: str) -> Thing:
    thing = scene.thing(shape)
    if thing is None:
        raise SceneError(f"scene {scene.seed} has no {shape}; it has {[t.shape for t in scene.things]}")
    return thing


def _with(scene: Scene, changed: dict[str, Thing]) -> Scene:
    things = [changed.get(thing.shape, thing) for thing in scene.things]
    return dataclasses.replace(
        scene, things=tuple(sorted(things, key=lambda t: (t.box[1] // CELL, t.box[0] // CELL)))
    )


def _moved(box: Box, to: Box) -> Box:
    dx = CELL * (to[0] // CELL - box[0] // CELL)
    dy = CELL * (to[1] // CELL - box[1] // CELL)
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy
