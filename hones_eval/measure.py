"""What one pass over examples gives: sums that add up over examples and ranks, and records that do not."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from hones_eval.examples import Example


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


class Totals(NamedTuple):
    """The sums over all examples of all ranks, and every example's record by the example's index."""

    sums: dict[str, Tensor]
    records: dict[int, Any]
