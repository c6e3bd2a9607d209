"""What a pass says while it runs: its cost once, and its progress every 30 seconds without a terminal."""

import time
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hones_eval.notes import duration, note

EVERY = 30.0
"""Seconds between two lines."""
LONG = 60.0
"""Seconds from which a pass says its cost once its first steps are measured."""
FIRST = 3
"""Steps after which the rate is believed: the first one loads kernels and fills caches."""


@runtime_checkable
class Reporting(Protocol):
    """A measure that has more to say of a running pass than the number of examples."""

    def cost(self) -> str:
        """What is done per example, and what would take less, such as `512 head passes per example`."""

    def so_far(self, sums: dict[str, Tensor]) -> str:
        """The result as it stands, such as `best heads so far 3.5, 2.1`."""


class ProgressLines(Callback):  # type: ignore[misc]
    """Says what a pass will cost and, where there is no terminal for a bar, how far it is."""

    def __init__(self, lines: bool) -> None:
        """Print `lines` of progress too, or leave them to a bar."""
        self.lines = lines
        self.began = self.last = 0.0
        self.done = 0

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock of a pass."""
        self._begin()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock of a training."""
        self._begin()

    def on_predict_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Count a step of a pass."""
        self._step(module, int(sum(trainer.num_predict_batches)))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Count a step of a training."""
        self._step(module, int(trainer.num_training_batches))

    def _begin(self) -> None:
        self.began = self.last = time.monotonic()
        self.done = 0

    def _step(self, module: LightningModule, total: int) -> None:
        self.done += 1
        now = time.monotonic()
        rate = (now - self.began) / self.done
        left = (total - self.done) * rate
        unit = getattr(module, "unit", "examples")
        measure = getattr(module, "measure", None)
        reporting = measure if isinstance(measure, Reporting) else None
        if self.done == min(FIRST, total - 1) and left > LONG:
            what = f" ({reporting.cost()})" if reporting is not None else ""
            note(f"{module.name}: {total} {unit} at {rate:.2g} s each{what}, about {duration(left)} left")
            self.last = now
        elif self.lines and now - self.last >= EVERY and self.done < total:
            found = f"; {reporting.so_far(module.totals.sums())}" if reporting is not None else ""
            note(
                f"{module.name}: {self.done} of {total} {unit}, {rate:.2g} s each, about "
                f"{duration(left)} left{found}"
            )
            self.last = now
