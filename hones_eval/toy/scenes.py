"""Scene graphs, generated from a seed: the content of an image.

An image of 64 x 64 pixels has four cells. One contains a word in a blue box, the others contain two or
three things of different shapes. The word decides the split: every word belongs to exactly one split, so no
image, edited or not, can ever appear in two of them.
"""

import hashlib
import random
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from hones_eval.errors import HonesError

Split = Literal["train", "discovery", "development", "test"]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

SIDE = 64
CELL = 32
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("large", "small")
PLACES = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
SPLIT_SIZE: dict[str, int] = {"train": 10_000_000, "discovery": 1000, "development": 1000, "test": 1000}

_SIDE_OF_SIZE = {"large": 24, "small": 14}
_OFFSETS = {"large": (2, 4, 6), "small": (6, 8, 10, 12)}
_WORD_BOX = (26, 18)
_FAR = 16  # centres further apart than this, in pixels, lie in different columns or rows
_VERSION = "scenes-1"


class SceneError(HonesError):
    """An impossible scene: unknown split, index beyond the split, or things that do not fit."""


@dataclass(frozen=True)
class Thing:
    """One object: its shape, look and box. The corners of the box are even pixels."""

    shape: str
    color: str
    texture: str
    size: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, in pixels from the top left."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def place(self) -> str:
        """The cell that the centre lies in, such as 'top left'."""
        x, y = self.centre
        return PLACES[2 * (y >= CELL) + (x >= CELL)]


@dataclass(frozen=True)
class Scene:
    """A scene graph: things in reading order, and the word in its blue box. `seed` names the image."""

    seed: str
    things: tuple[Thing, ...]
    word: str
    word_box: Box

    def __post_init__(self) -> None:
        """Reject graphs that cannot be drawn: repeated shapes, things outside the image or overlapping."""
        shapes = [thing.shape for thing in self.things]
        if len(set(shapes)) != len(shapes):
            raise SceneError(f"scene {self.seed}: each shape may appear once, got {shapes}")
        boxes = [thing.box for thing in self.things] + [self.word_box]
        for box in boxes:
            if min(box) < 0 or max(box) > SIDE:
                raise SceneError(f"scene {self.seed}: box {box} is not inside the {SIDE} x {SIDE} image")
        for i, box in enumerate(boxes):
            if any(overlap(box, other) for other in boxes[:i]):
                raise SceneError(
                    f"scene {self.seed}: box {box} overlaps another box; move it or make it smaller"
                )

    def thing(self, shape: str) -> Thing | None:
        """The thing of this shape, or None."""
        return next((thing for thing in self.things if thing.shape == shape), None)


def scene(split: Split, index: int) -> Scene:
    """Image number `index` of a split; the same on every machine.

    Raises:
        SceneError: the split is unknown or has too few images.
    """
    check_count(split, index + 1)
    rng = random.Random(f"{_VERSION}/{split}/{index}")
    cells = rng.sample(range(4), rng.choice((3, 4)))
    word_cell, *thing_cells = cells
    shapes = rng.sample(SHAPES, len(thing_cells))
    things = tuple(_thing(rng, shape, cell) for shape, cell in zip(shapes, sorted(thing_cells), strict=True))
    left, top = _corner(word_cell)
    box = _box(left + rng.choice((2, 4)), top + rng.choice((4, 6, 8, 10)), *_WORD_BOX)
    return Scene(f"{split}-{index:05d}", things, rng.choice(WORDS[split]), box)


def check_count(split: str, count: int) -> None:
    """Raise SceneError unless the split exists and has `count` images."""
    if split not in get_args(Split):
        raise SceneError(f"scenes have no split '{split}'; the splits are {', '.join(get_args(Split))}")
    if not 0 <= count <= SPLIT_SIZE[split]:
        raise SceneError(
            f"asked for {count} images of the {split} split of scenes, which has {SPLIT_SIZE[split]}; "
            "ask for fewer"
        )


def related(first: Thing, relation: str, second: Thing) -> bool:
    """Whether `first` is left of, right of, above or below `second`: centres more than 16 pixels apart."""
    (x1, y1), (x2, y2) = first.centre, second.centre
    gaps = {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}
    return gaps[relation] > _FAR


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _thing(rng: random.Random, shape: str, cell: int) -> Thing:
    size = rng.choice(SIZES)
    left, top = _corner(cell)
    x, y = left + rng.choice(_OFFSETS[size]), top + rng.choice(_OFFSETS[size])
    box = _box(x, y, _SIDE_OF_SIZE[size], _SIDE_OF_SIZE[size])
    return Thing(shape, rng.choice(COLORS), rng.choice(TEXTURES), size, box)


def _corner(cell: int) -> tuple[int, int]:
    return CELL * (cell % 2), CELL * (cell // 2)


def _box(left: int, top: int, width: int, height: int) -> Box:
    return left, top, left + width, top + height


def _split_of(word: str) -> Split:
    """Assign a word to a split by its hash: a tenth each to the three evaluation splits."""
    tenth = hashlib.sha256(f"{_VERSION}/{word}".encode()).digest()[0] % 10
    return ("discovery", "development", "test")[tenth] if tenth < 3 else "train"


_CONSONANTS, _VOWELS = "BCDFGHKLMNPRSTVZ", "AEIOU"
_EVALUATED = {
    split: tuple(
        word for word in map("".join, product(_CONSONANTS, _VOWELS, _CONSONANTS)) if _split_of(word) == split
    )
    for split in get_args(Split)[1:]
}
# Training uses all other triples of letters, so that the model learns to read and not a list of words.
WORDS: dict[str, tuple[str, ...]] = {
    "train": tuple(
        word
        for word in map("".join, product(_CONSONANTS + _VOWELS, repeat=3))
        if not any(word in words for words in _EVALUATED.values())
    ),
    **_EVALUATED,
}
