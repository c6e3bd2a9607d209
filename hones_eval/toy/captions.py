"""Captions of a scene graph: five references, phrases for grounding, hard negatives for retrieval."""

import random
from collections import Counter

from hones_eval.toy import edits
from hones_eval.toy.scenes import CELL, Scene, Thing, related


def phrase(thing: Thing) -> str:
    """A thing in words, such as 'striped red circle'; a solid one needs no texture."""
    texture = "" if thing.texture == "solid" else f"{thing.texture} "
    return f"{texture}{thing.color} {thing.shape}"


def captions(scene: Scene) -> list[str]:
    """Five references, all true; the first one is the plainest and names the first two things' relation."""
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
    """Every cell in reading order, such as 'large striped red circle. nothing. word BAK. small ...'."""
    return ". ".join(_cell(scene, place) for place in range(4))


def near_miss(scene: Scene, rng: random.Random) -> str:
    """A false caption for training: that of the scene with one to three changes."""
    changed = scene
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = _changed(changed, rng)
    caption = captions(changed)[0]
    return caption if caption not in captions(scene) else near_miss(scene, rng)


def hard_negatives(scene: Scene, pool: list[Scene], count: int) -> list[str]:
    """False captions from other pictures, most words shared with the true one first.

    Captions that are true of the scene (all their things are in it) are left out, ties keep the pool's order.
    May be shorter than `count` where the pool is small.
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
