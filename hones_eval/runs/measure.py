"""The result of one pass over examples: sums over examples and ranks, and records per example."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from hones_eval.lmms.examples import Example


class Measurement(NamedTuple):
    """One example's contribution: tensors to be summed, and a record for metrics of a whole corpus.

    Records of resumable runs are plain JSON.
    """

    sums: dict[str, Tensor]
    record: Any = None


class Measure(Protocol):
    """One pass over the examples of a task; the loop adds up the results of `measure`."""

    def zeros(self) -> dict[str, Tensor]:
        """The sums before the first example, whose sizes do not depend on the number of examples."""

    def measure(self, example: Example) -> Measurement:
        """One example's contribution."""


class Staged(Measure, Protocol):
    """A pass in stages: the results of one stage, from all ranks, can change what the next one measures."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to measure; later stages are then skipped."""

    def stages(self) -> list[list[int]]:
        """The indices of all examples, each once, by stage."""

    def look(self, stage: Sequence[Measurement]) -> None:
        """Take in the measurements of one stage, in order; every rank is given the same."""

    def state(self) -> dict[str, Tensor]:
        """The state after the stages so far, apart from the sums."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state`."""


class Totals(NamedTuple):
    """The sums over all examples of all ranks, and every example's record by the example's index."""

    sums: dict[str, Tensor]
    records: dict[int, Any]
