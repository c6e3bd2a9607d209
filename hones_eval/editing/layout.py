"""Find where to move a thing so that a given relation to another thing holds."""

from typing import Literal, NamedTuple

from hones_eval.editing.boxes import Window
from hones_eval.editing.problems import RecordError

Goal = Literal["left", "right", "above", "below", "away", "far"]


class Shift(NamedTuple):
    """Pixels to the right and down."""

    dx: int
    dy: int


def goal_of(value: str) -> Goal:
    """The goal for the moved thing's position, from the words of a relation."""
    words = value.split()
    for goal in ("left", "right"):
        if goal in words:
            return "left" if goal == "left" else "right"
    if value in ("above", "over"):
        return "above"
    if value in ("below", "under", "underneath", "beneath"):
        return "below"
    return "far" if "far" in words else "away"


def place(moved: Window, anchor: Window, width: int, height: int, goal: Goal) -> Shift:
    """Find the shortest shift of `moved` to where `goal` holds against `anchor`, wholly inside the image.

    A thing that was higher than the thing it leaves is moved down to its foot, so that it does not float.

    Raises: RecordError when there is no room.
    """
    gap = max(4, round(0.04 * width))
    if goal == "far":
        gap = max(round(1.5 * max(moved.width, moved.height)), round(0.2 * width))
    left = Shift(anchor.left - gap - moved.right, 0)
    right = Shift(anchor.right + gap - moved.left, 0)
    above = Shift(0, anchor.top - gap - moved.bottom)
    below = Shift(0, anchor.bottom + gap - moved.top)
    foot = max(0, min(anchor.bottom, height) - moved.bottom)
    wanted: dict[Goal, list[Shift]] = {
        "left": [left],
        "right": [right],
        "above": [above],
        "below": [below],
        "away": [Shift(left.dx, foot), Shift(right.dx, foot), left, right],
        "far": [left, right],
    }
    fitting = [shift for shift in wanted[goal] if _fits(moved.moved(*shift), width, height)]
    if not fitting:
        raise RecordError(f"there is no room to move it {goal} within the image")
    grounded = [shift for shift in fitting if shift.dy] or fitting
    return min(grounded, key=lambda shift: abs(shift.dx) + abs(shift.dy))


OPPOSITE: dict[Goal, Goal] = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "away": "away",
    "far": "far",
}


def must_not_hold(goal: Goal, moved: Window, anchor: Window) -> None:
    """Reject a change that the boxes contradict.

    Raises: RecordError when the centres already lie as `goal` wants them, against what the answer says.
    """
    dx = moved.left + moved.right - anchor.left - anchor.right
    dy = moved.top + moved.bottom - anchor.top - anchor.bottom
    already = {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}
    if already.get(goal, False):
        raise RecordError(f"its answer and its boxes disagree: the boxes already show it {goal}")


def mirrored_differ(first: Window, second: Window) -> bool:
    """Whether two things are so far apart horizontally that mirroring swaps them."""
    span = first.joined(second).width
    return abs((first.left + first.right) - (second.left + second.right)) / 2 >= 0.2 * span


def _fits(window: Window, width: int, height: int) -> bool:
    return window.left >= 0 and window.top >= 0 and window.right <= width and window.bottom <= height
