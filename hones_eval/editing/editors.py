"""The editors by name, with the levels that each can edit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hones_eval.choices import EditorName, Level
from hones_eval.editing.boxes import Box, Window
from hones_eval.editing.counterfactual import Change, Kind
from hones_eval.editing.layout import OPPOSITE, goal_of, mirrored_differ, must_not_hold, place
from hones_eval.editing.masks import Masker, box_mask
from hones_eval.editing.moving import best_stretch, mirror, move, remove
from hones_eval.editing.photographs import Pixels
from hones_eval.editing.problems import RecordError
from hones_eval.editing.recolor import recolor, spread, toned
from hones_eval.editing.records import Record
from hones_eval.editing.retexture import retexture


class Edited(NamedTuple):
    """An edited image, and the mask `[H, W]` where it was allowed to change."""

    image: Pixels
    mask: NDArray[np.bool_]
    thing: str | None = None
    """The name of the edited thing, if it is not the target of the change."""


Apply = Callable[[Pixels, Change, Masker, int], Edited]


@dataclass(frozen=True)
class Editor:
    """An editor."""

    name: str
    kind: Kind
    categories: frozenset[str]
    """The categories that it can edit; they determine the levels."""
    apply: Apply | None
    """A function of image, change, mask maker and seed; None if the edited image comes from elsewhere."""

    def serves(self, record: Record) -> bool:
        """Whether a record is of a level and category that this editor can change."""
        return record.category in self.categories


def editor_for(record: Record, name: EditorName) -> Editor:
    """Give the editor of that name; `auto` chooses among those that need no weights.

    Raises: RecordError when it does not serve the record's category.
    """
    chosen = _AUTO[record.category] if name == "auto" else name
    editor = EDITORS[chosen]
    if not editor.serves(record):
        raise RecordError(
            f"the editor {chosen} cannot edit {record.category}; "
            f"it can edit {', '.join(sorted(editor.categories))}"
        )
    return editor


def levels_of(name: EditorName) -> tuple[Level, ...]:
    """The levels that an editor can serve."""
    if name == "auto":
        return ("object", "attribute", "relation")
    categories = EDITORS[name].categories
    groups: tuple[tuple[Level, frozenset[str]], ...] = (
        ("object", OBJECTS),
        ("attribute", ATTRIBUTES),
        ("relation", RELATED),
    )
    return tuple(level for level, members in groups if members & categories)


def window_of(box: Box | None, image: Pixels) -> Window:
    """A box cut to the image.

    Raises: RecordError when there is none, or nothing is left of it.
    """
    if box is None:
        raise RecordError("it has no box")
    return box.inside(image.shape[1], image.shape[0])


def _remove(image: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    region = masks(image, window_of(change.target.box, image))
    return Edited(*remove(image, region, seed))


def _recolor(image: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    whole = masks(image, window_of(change.target.box, image))
    region = spread(image, toned(image, whole, change.was) if change.was else whole)
    return Edited(recolor(image, region, change.value), region.footprint(*image.shape[:2]))


def _retexture(image: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    region = masks(image, window_of(change.target.box, image))
    made = retexture(image, region, change.value, seed, change.colour)
    return Edited(made, region.footprint(*image.shape[:2]))


def _move(image: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    assert change.anchor is not None
    box, anchor = window_of(change.target.box, image), window_of(change.anchor.box, image)
    goal = goal_of(change.value)
    must_not_hold(goal, box, anchor)
    if masks is box_mask and box.overlaps(anchor):
        raise RecordError(
            f"its boxes overlap, so moving the box of {change.target.name!r} would also move part of "
            f"{change.anchor.name!r}; use --mask cut or segmenter"
        )
    height, width = image.shape[:2]
    moved = change.target.name
    try:
        shift = place(box, anchor, width, height, goal)
    except RecordError:
        if goal == "away":
            raise
        # Moving the other one the other way makes the same true.
        shift = place(anchor, box, width, height, OPPOSITE[goal])
        box, moved = anchor, change.anchor.name
    region = masks(image, box)
    if region.rough:
        raise RecordError(
            f"{moved!r} cannot be cut out by its colours; "
            "use --mask segmenter, or, where its box holds nothing of the other thing, --mask box"
        )
    return Edited(*move(image, region, shift, seed), moved)


def _mirror(image: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    assert change.anchor is not None
    target, anchor = window_of(change.target.box, image), window_of(change.anchor.box, image)
    must_not_hold(goal_of(change.value), target, anchor)
    if not mirrored_differ(target, anchor):
        raise RecordError("its two boxes lie one above the other, so mirroring does not swap them")
    return Edited(*mirror(image, best_stretch(image, target.joined(anchor))))


OBJECTS = frozenset({"object", "animal", "indoor", "vehicle"})
ATTRIBUTES = frozenset({"color", "material"})
RELATED = frozenset({"action", "spatial"})
EVERYTHING = OBJECTS | ATTRIBUTES | RELATED
EDITORS: dict[str, Editor] = {
    "remove": Editor("remove", "remove", OBJECTS, _remove),
    "recolor": Editor("recolor", "recolor", frozenset({"color"}), _recolor),
    "retexture": Editor("retexture", "retexture", frozenset({"material"}), _retexture),
    "move": Editor("move", "move", RELATED, _move),
    "mirror": Editor("mirror", "mirror", RELATED, _mirror),
    "inpaint": Editor("inpaint", "generate", EVERYTHING, None),
    "folder": Editor("folder", "adopt", EVERYTHING, None),
}
_AUTO: dict[str, str] = {
    **dict.fromkeys(OBJECTS, "remove"),
    "color": "recolor",
    "material": "retexture",
    **dict.fromkeys(RELATED, "move"),
}
