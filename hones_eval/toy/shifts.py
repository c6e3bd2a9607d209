"""Shifted scenes: the same questions on kinds of images that the toy model never saw in training.

On its own distribution a trained model may leave nothing to improve; a shift leaves room for steering.
`size` and `extra_object` change the graph, the other variants only how it is drawn.
"""

import dataclasses
import random
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hones_eval.toy.drawing import Paper, draw
from hones_eval.toy.edits import absent_shapes
from hones_eval.toy.scenes import COLORS, SIDE, TEXTURES, Box, Scene, SceneError, Thing, overlap

Shift = Literal["background", "noise", "contrast", "font", "size", "extra_object"]

_NOISE = 56  # largest change of a colour value
_CONTRAST = 0.4
_NEW_SIDE = {"large": 28, "small": 10}
_EXTRA_SIDES = (12, 10, 8)


def shift_scene(scene: Scene, shift: Shift) -> Scene:
    """The graph under a shift: other sizes, one more object, or the graph as it is.

    Raises:
        SceneError: there is no room for one more object.
    """
    if shift == "size":
        return dataclasses.replace(scene, things=tuple(_resized(thing) for thing in scene.things))
    if shift == "extra_object":
        return _with_extra(scene)
    return scene


def shift_image(scene: Scene, shift: Shift) -> NDArray[np.uint8]:
    """Draw an (already shifted) graph in the style of the shift, `[64, 64, 3]`.

    Backgrounds and noise depend on the scene's seed alone, so a scene and its edits get the same.
    """
    if shift not in get_args(Shift):
        raise SceneError(f"scenes have no shift '{shift}'; the shifts are {', '.join(get_args(Shift))}")
    rng = random.Random(f"{shift}/{scene.seed}")
    if shift == "background":
        return draw(scene, Paper(background=_gradient(rng)))
    pixels = draw(scene, Paper(scalable_font=shift == "font"))
    if shift == "noise":
        unit = np.frombuffer(rng.randbytes(pixels.size), dtype=np.uint8).reshape(pixels.shape) / 127.5 - 1
        return _rounded(pixels + _NOISE * unit)
    return _rounded(128 + _CONTRAST * (pixels - 128.0)) if shift == "contrast" else pixels


def _rounded(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded


def _resized(thing: Thing) -> Thing:
    side = _NEW_SIDE[thing.size]
    left = (thing.box[0] + thing.box[2] - side) // 2
    top = (thing.box[1] + thing.box[3] - side) // 2
    return dataclasses.replace(thing, box=(left, top, left + side, top + side))


def _with_extra(scene: Scene) -> Scene:
    rng = random.Random(f"extra/{scene.seed}")
    shape, color, texture = rng.choice(absent_shapes(scene)), rng.choice(COLORS), rng.choice(TEXTURES)
    taken = [thing.box for thing in scene.things] + [scene.word_box]
    for side in _EXTRA_SIDES:
        free = _free_boxes(side, taken)
        if free:
            extra = Thing(shape, color, texture, "small", rng.choice(free))
            return dataclasses.replace(scene, things=(*scene.things, extra))
    raise SceneError(
        f"scene {scene.seed} has no room for one more object of {_EXTRA_SIDES[-1]} pixels; use another scene"
    )


def _free_boxes(side: int, taken: list[Box]) -> list[Box]:
    starts = range(0, SIDE - side + 1, 2)
    boxes = [(left, top, left + side, top + side) for top in starts for left in starts]
    return [box for box in boxes if not any(overlap(box, other) for other in taken)]


def _gradient(rng: random.Random) -> NDArray[np.float32]:
    """From one muted colour to another across the image, `[64, 64, 3]`."""
    first, last = (np.array([rng.randrange(20, 130) for _ in range(3)], dtype=np.float32) for _ in range(2))
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)
    slope = np.float32(rng.choice((0, 0.5)))
    share = (1 - slope) * ramp[None, :] + slope * ramp[:, None]
    colors: NDArray[np.float32] = (first + share[:, :, None] * (last - first)).astype(np.float32)
    return colors
