"""Captions of a scene graph: five references, phrases for grounding, hard negatives for retrieval."""

import random
from collections import Counter

from hones_eval.toy import edits
from hones_eval.toy.scenes import CELL, Scene, Thing, related


def phrase(thing: Thing) -> str:
    """Describe a thing, such as 'striped red circle'. The texture "solid" is left out."""
    texture = "" if thing.texture == "solid" else f"{thing.texture} "
    return f"{texture}{thing.color} {thing.shape}"


def captions(scene: Scene) -> list[str]:
    """Return five true reference captions. The first is the simplest and relates the first two things."""
    names = [f"a {phrase(thing)}" for thing in scene.things]
    first, second = names[:2]
    rest = "".join(f" and {name}" for name in names[2:])
    beside = related(scene.things[0], "left of", scene.things[1]) and not related(
        scene.things[0], "above", scene.things[1]
    )
    forward, backward = ("left of", "right of") if beside else ("above", "below")
    return [
        f"{first} {forward} {second}{rest}",
        f"{second} {backward} {first}{rest}",
        f"there is {first} {forward} {second}{rest}",
        f"{first} and {second}{rest}",
        f"{' and '.join(reversed(names))}",
    ]


def description(scene: Scene) -> str:
    """Describe every cell in reading order, such as 'large striped red circle. nothing. word BAK. ...'."""
    return ". ".join(_cell(scene, place) for place in range(4))


def near_miss(scene: Scene, rng: random.Random) -> str:
    """A false caption for training: the caption of the scene after one to three changes."""
    changed = scene
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = _changed(changed, rng)
    caption = captions(changed)[0]
    return caption if caption not in captions(scene) else near_miss(scene, rng)


def hard_negatives(scene: Scene, pool: list[Scene], count: int) -> list[str]:
    """False captions from other images, ordered by the number of words shared with the true caption.

    Captions that are true of the scene (it contains all their things) are left out. Ties keep the order
    of the pool. May return fewer than `count` if the pool is small.
    """
    true = Counter(captions(scene)[0].split())
    phrases = {phrase(thing) for thing in scene.things}
    others = dict.fromkeys(
        captions(other)[0] for other in pool if not {phrase(thing) for thing in other.things} <= phrases
    )
    return sorted(others, key=lambda caption: -(Counter(caption.split()) & true).total())[:count]


def _cell(scene: Scene, cell: int) -> str:
    row, column = divmod(cell, 2)
    left, top = scene.word_box[:2]
    if (top // CELL, left // CELL) == (row, column):
        return f"word {scene.word}"
    for thing in scene.things:
        if (thing.box[1] // CELL, thing.box[0] // CELL) == (row, column):
            return f"{thing.size} {thing.texture} {thing.color} {thing.shape}"
    return "nothing"


def _changed(scene: Scene, rng: random.Random) -> Scene:
    thing, other = rng.sample(scene.things, 2)
    how = rng.choice(("color", "texture", "shape", "swap"))
    if how == "swap":
        return edits.swap_places(scene, thing.shape, other.shape)
    if how == "shape":
        return edits.replace_object(scene, thing.shape, rng.choice(edits.absent_shapes(scene)))
    return edits.change_attribute(scene, thing.shape, how, rng)
