"""Errors that stop one record but not the run."""

from typing import Literal, NamedTuple

from hones_eval.errors import HonesError


class RecordError(HonesError):
    """One record cannot be edited; the run names it with this reason and goes on."""

    def __init__(self, reason: str, level: Literal["object", "attribute", "relation"] | None = None) -> None:
        """Keep the semantic level, if known, so that problems are counted by level."""
        super().__init__(reason)
        self.level = level


class Problem(NamedTuple):
    """A record that cannot be edited, and why."""

    question_id: str
    level: Literal["object", "attribute", "relation"] | None
    reason: str


def no_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch means that memory ran out, on any device."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate", "Insufficient memory")
    )
