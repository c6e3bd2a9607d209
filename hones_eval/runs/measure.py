"""What one pass over examples gives: sums that add up over examples and ranks, and records that do not."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from hones_eval.lmms.examples import Example


class Measurement(NamedTuple):
    """What one example adds: tensors to be summed, and a record for what only a whole corpus can tell.

    Records are plain JSON where runs are to be resumable.
    """

    sums: dict[str, Tensor]
    record: Any = None


class Measure(Protocol):
    """One pass over the examples of a task; the loop adds up what `measure` gives."""

    def zeros(self) -> dict[str, Tensor]:
        """The sums before the first example; their size does not depend on the number of examples."""

    def measure(self, example: Example) -> Measurement:
        """What one example adds."""


class Staged(Measure, Protocol):
    """A pass in stages: what one stage measured, on whichever rank, can change what the next ones measure."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to measure; later stages are then passed over."""

    def stages(self) -> list[list[int]]:
        """Every example's index once, in stages."""

    def look(self, stage: Sequence[Measurement]) -> None:
        """Take in a stage: what its examples added, in its order; every rank calls this with the same."""

    def state(self) -> dict[str, Tensor]:
        """What was learned from the stages so far, beside the sums."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""


class Totals(NamedTuple):
    """The sums over all examples of all ranks, and every example's record by the example's index."""

    sums: dict[str, Tensor]
    records: dict[int, Any]
