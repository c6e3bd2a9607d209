"""Patterns of materials, drawn from noise: lightness and colour of a surface seen under even light."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from hones_eval.editing.vocabulary import COLOURS, Colour

Field = NDArray[np.float32]
WOOD = Colour(40, 66, 14, 34)
METAL = Colour(55, 78, -1, -4)
BRICK = Colour(34, 50, 30, 28)
MORTAR = Colour(66, 74, 2, 8)
STONE = Colour(48, 68, 0, 5)
FABRIC = Colour(48, 66, 4, 14)
PLASTIC = ("red", "blue", "green", "yellow", "orange", "white")


def texture(material: str, height: int, width: int, unit: float, seed: int, colour: str | None) -> Field:
    """Draw a material as CIE Lab `[height, width, 3]`.

    Args:
        material: one of those that are drawn: wood, metal, brick, stone, fabric, plastic.
        height: in pixels.
        width: in pixels.
        unit: the thing's size in pixels; the pattern's grain is a fixed share of it.
        seed: of the noise.
        colour: of a plastic or fabric, where one is asked for.
    """
    chance = np.random.default_rng(seed)
    drawn: dict[str, Callable[[], Field]] = {
        "wood": lambda: _wood(height, width, unit, chance),
        "metal": lambda: _metal(height, width, unit, chance),
        "brick": lambda: _brick(height, width, unit, chance),
        "stone": lambda: _stone(height, width, unit, chance),
        "fabric": lambda: _fabric(height, width, unit, chance, COLOURS[colour] if colour else FABRIC),
        "plastic": lambda: _plastic(height, width, COLOURS[colour or str(chance.choice(PLASTIC))]),
    }
    return drawn[material]().astype(np.float32)


def _wood(height: int, width: int, unit: float, chance: np.random.Generator) -> Field:
    """Boards, each cut from another place of rings that noise bends, with fibres along them."""
    board = max(8.0, unit / 4)
    rows = np.arange(height)[:, None] / board
    plank = np.floor(rows).astype(int)
    shift = chance.uniform(0, 50, size=int(plank.max()) + 1)[plank]
    bend = noise(height, width, (unit / 5, unit * 1.2), chance)
    rings = np.sin((rows * 5 + bend * 5 + shift) * 2 * np.pi / 2.2)
    fibre = noise(height, width, (1.2, max(6.0, unit / 6)), chance)
    tone = 0.55 + 0.24 * rings + 0.2 * fibre + 0.12 * np.sin(shift * 7)
    seam = np.abs(rows - np.round(rows)) * board < max(0.8, board / 40)
    lab = _tinted(tone.clip(0, 1), WOOD)
    lab[..., 0] -= 14 * np.broadcast_to(seam, tone.shape)
    return lab


def _metal(height: int, width: int, unit: float, chance: np.random.Generator) -> Field:
    """Brushed: long fine scratches, and broad bands of reflected light across them."""
    scratches = noise(height, width, (0.8, max(20.0, unit / 2)), chance)
    rows, columns = np.mgrid[0:height, 0:width] / unit
    sheen = np.sin((columns + 0.35 * rows) * 2 * np.pi * 1.6 + chance.uniform(0, 6))
    return _tinted((0.5 + 0.16 * scratches + 0.42 * sheen).clip(-0.4, 1.5), METAL)


def _brick(height: int, width: int, unit: float, chance: np.random.Generator) -> Field:
    """Courses in stretcher bond, each brick a shade of its own, in lighter mortar."""
    high = max(5.0, unit / 9)
    long = high * 2.6
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    course = np.floor(rows / high).astype(int)
    along = columns + (course % 2) * long / 2
    number = np.floor(along / long).astype(int)
    shade = chance.uniform(-0.35, 0.35, size=(int(course.max()) + 1, int(number.max()) + 1))[course, number]
    joint = max(1.0, high / 8)
    mortar = (rows % high < joint) | (along % long < joint)
    grain = noise(height, width, (1.5, 1.5), chance)
    lab = _tinted((0.5 + shade + 0.22 * grain).clip(-0.2, 1.3), BRICK)
    lab[mortar] = _tinted((0.5 + 0.3 * grain).clip(0, 1), MORTAR)[mortar]
    return lab


def _stone(height: int, width: int, unit: float, chance: np.random.Generator) -> Field:
    """Mottled at several scales, with dark and light specks."""
    cloud = noise(height, width, (unit / 6, unit / 6), chance)
    mottle = noise(height, width, (unit / 25, unit / 25), chance)
    specks = noise(height, width, (0.8, 0.8), chance)
    return _tinted((0.5 + 0.3 * cloud + 0.22 * mottle + 0.28 * specks).clip(-0.6, 1.5), STONE)


def _fabric(height: int, width: int, unit: float, chance: np.random.Generator, home: Colour) -> Field:
    """A plain weave: threads over and under by turns, with slubs."""
    thread = max(2.5, unit / 40)
    rows, columns = np.mgrid[0:height, 0:width] / thread
    over = (np.floor(rows) + np.floor(columns)) % 2
    ridge = np.where(over == 1, np.sin(np.pi * (rows % 1)), np.sin(np.pi * (columns % 1)))
    slubs = noise(height, width, (thread, thread * 10), chance)
    return _tinted((0.15 + 0.75 * ridge + 0.14 * slubs).clip(-0.3, 1.2), home)


def _plastic(height: int, width: int, home: Colour) -> Field:
    """One colour, no grain: what makes it plastic is its gloss, which the light adds."""
    return _tinted(np.full((height, width), 0.6), home)


def _tinted(tone: NDArray[np.floating], home: Colour) -> Field:
    """Lab between a colour's dark and light end."""
    lightness = home.dark + tone * (home.light - home.dark)
    return np.stack(
        [lightness, np.full_like(lightness, home.a), np.full_like(lightness, home.b)], axis=-1
    ).astype(np.float32)  # fmt: skip


def noise(height: int, width: int, size: tuple[float, float], chance: np.random.Generator) -> Field:
    """Smooth noise of mean 0 and deviation 0.5 whose blobs are `size` (down, across) pixels."""
    cells = max(2, round(height / max(size[0], 0.5)) + 1), max(2, round(width / max(size[1], 0.5)) + 1)
    small = chance.standard_normal((min(cells[0], height + 2), min(cells[1], width + 2))).astype(np.float32)
    large = np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))
    return np.asarray((large - large.mean()) / max(float(large.std()), 1e-6) * 0.5, np.float32)
