"""The log-probability and the margin of an example's gold answer, teacher-forced, under edits.

The margin is the sum over the answer's tokens of the token's logit minus the largest other logit. It costs
another pass over the logits, so it is read only where the run asks for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hones_eval.core import readouts
from hones_eval.engine.passes import Passes, Rows, SiteEdit, check_finite
from hones_eval.lmms.answers.kind import EditRun
from hones_eval.lmms.example import Example


class Target:
    """One example's target: its unedited log-probability `base`, and the drops [E] under edits.

    `base_margin` and `margin_drops` are those of the margin, where the run has `margins`.
    """

    def __init__(self, run: EditRun, example: Example) -> None:
        """Measure the target of `example`."""
        self.run = run
        self.example = example
        self.ids = torch.tensor(example.target_ids)
        self.drops = torch.zeros(len(run.edits), dtype=torch.float64)
        self.base = 0.0
        self.base_margin = 0.0
        self.margin_drops = torch.zeros(len(run.edits), dtype=torch.float64) if run.margins else None

    def replay(self, edits: Sequence[SiteEdit], neurons: bool = False) -> None:
        """Replay edits on prompt and target; with `neurons` the run's sink gets the FFN activations."""
        example, decoder = self.example, self.run.decoder
        inputs = decoder.append(example.inputs, example.target_ids[:-1])
        ahead = () if neurons else edits  # activations of many edits at many tokens would take memory
        passes = self.run.replayer.record(inputs, len(example.target_ids), ahead=ahead)
        self.start(passes, passes.base_logits)
        numbers = [self.run.numbers[edit] for edit in edits]
        for rows in passes.edited(edits, self.run.reader_of(example, passes, numbers) if neurons else None):
            self.add(rows)

    def start(self, passes: Passes, logits: Tensor) -> None:
        """Read the unedited log-probability from logits [target, vocabulary] that belong to `passes`.

        Raises: HonesError where the logits of the pass are not finite.
        """
        check_finite(passes, self.example.where)
        self.base = self._read(logits[None])[0]
        if self.margin_drops is not None:
            self.base_margin = self._read_margins(logits[None])[0]

    def add(self, rows: Rows) -> None:
        """Read the log-probabilities under some edits."""
        for edit, value in zip(rows.edits, self._read(rows.logits), strict=True):
            self.drops[self.run.numbers[edit]] = self.base - value
        if self.margin_drops is not None:
            for edit, value in zip(rows.edits, self._read_margins(rows.logits), strict=True):
                self.margin_drops[self.run.numbers[edit]] = self.base_margin - value

    def _read(self, logits: Tensor) -> list[float]:
        ids = self.ids.to(logits.device)
        values: list[float] = readouts.sequence_log_probability(logits[:, : len(ids)], ids).tolist()
        return values

    def _read_margins(self, logits: Tensor) -> list[float]:
        ids = self.ids.to(logits.device)
        values: list[float] = readouts.target_margin(logits[:, : len(ids)], ids).tolist()
        return values
