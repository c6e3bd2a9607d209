"""The editors by name: the levels that each serves, and what it does to a picture."""

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
    """An edited picture, and where it was allowed to change, `[H, W]`."""

    picture: Pixels
    mask: NDArray[np.bool_]
    thing: str | None = None
    """What was edited, where that is not the change's target."""


Apply = Callable[[Pixels, Change, Masker, int], Edited]


@dataclass(frozen=True)
class Editor:
    """One way to edit."""

    name: str
    kind: Kind
    categories: frozenset[str]
    """The categories it serves; the levels follow."""
    apply: Apply | None
    """From picture, change, mask maker and seed; None where the picture comes from elsewhere."""

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
            f"the editor {chosen} does not serve {record.category}; "
            f"it serves {', '.join(sorted(editor.categories))}"
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


def window_of(box: Box | None, picture: Pixels) -> Window:
    """A box cut to the picture.

    Raises: RecordError when there is none, or nothing is left of it.
    """
    if box is None:
        raise RecordError("it has no box")
    return box.inside(picture.shape[1], picture.shape[0])


def _remove(picture: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    region = masks(picture, window_of(change.target.box, picture))
    return Edited(*remove(picture, region, seed))


def _recolor(picture: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    whole = masks(picture, window_of(change.target.box, picture))
    region = spread(picture, toned(picture, whole, change.was) if change.was else whole)
    return Edited(recolor(picture, region, change.value), region.footprint(*picture.shape[:2]))


def _retexture(picture: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    region = masks(picture, window_of(change.target.box, picture))
    made = retexture(picture, region, change.value, seed, change.colour)
    return Edited(made, region.footprint(*picture.shape[:2]))


def _move(picture: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    assert change.anchor is not None
    box, anchor = window_of(change.target.box, picture), window_of(change.anchor.box, picture)
    goal = goal_of(change.value)
    must_not_hold(goal, box, anchor)
    if masks is box_mask and box.overlaps(anchor):
        raise RecordError(
            f"its boxes overlap, so the box of {change.target.name!r} would take part of "
            f"{change.anchor.name!r} along; use --mask cut or segmenter"
        )
    height, width = picture.shape[:2]
    moved = change.target.name
    try:
        shift = place(box, anchor, width, height, goal)
    except RecordError:
        if goal == "away":
            raise
        # Moving the other one the other way makes the same true.
        shift = place(anchor, box, width, height, OPPOSITE[goal])
        box, moved = anchor, change.anchor.name
    region = masks(picture, box)
    if region.rough:
        raise RecordError(
            f"{moved!r} cannot be cut out by its colours to be moved; "
            "use --mask segmenter, or, where its box holds nothing of the other thing, --mask box"
        )
    return Edited(*move(picture, region, shift, seed), moved)


def _mirror(picture: Pixels, change: Change, masks: Masker, seed: int) -> Edited:
    assert change.anchor is not None
    one, other = window_of(change.target.box, picture), window_of(change.anchor.box, picture)
    must_not_hold(goal_of(change.value), one, other)
    if not mirrored_differ(one, other):
        raise RecordError("its two boxes lie about above each other, so a mirror swaps nothing")
    return Edited(*mirror(picture, best_stretch(picture, one.joined(other))))


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
