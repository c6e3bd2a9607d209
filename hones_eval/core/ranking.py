"""A ranking: scores of heads and neurons, with where they came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hones_eval.core import notebook
from hones_eval.core.artifact import Provenance, digest, load_artifact, save_artifact
from hones_eval.core.sites import Head, Neuron, neuron_count, top_heads, top_neurons
from hones_eval.errors import HonesError, MisfitError

_HEAD_TENSORS = (
    "head_scores",
    "head_log_probability",
    "head_positive",
    "head_negative",
    "head_examples",
    "head_direction",
    "head_estimate",
)
_NEURON_TENSORS = (
    "neuron_scores",
    "neuron_examples",
    "neuron_direction",
    "neuron_estimate",
    "neuron_single",
    "neuron_joint",
)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of every head [L, H] and neuron [L, I] of a model's language model.

    `head_scores`: HONES, the drop of the task's metric; V-SEAM, the signed mean drop of the answer's
    probability. `head_log_probability`: the mean drop of the target's log-probability (HONES).
    `head_positive`, `head_negative`: V-SEAM only. `head_examples`: on how many examples each head was
    measured, if heads were raced or screened; a head that was not measured (0) has the score 0.
    `neuron_scores`: importance, when asked for. `neuron_examples`: the same for neurons, if only the best
    were measured (`--confirm`), and in a mixture of experts, where an example only measures the experts that
    it was routed to; `head_estimate`, `neuron_estimate`: the estimates that chose them. `neuron_single`,
    `neuron_joint`: the two effects whose mean the scores are (`--joint`).
    `head_direction`, `neuron_direction`: attribution patching, the signed mean of the estimates.
    `report`: counts and figures that a reader of the ranking should see.
    """

    provenance: Provenance
    head_scores: Tensor | None = None
    head_log_probability: Tensor | None = None
    head_positive: Tensor | None = None
    head_negative: Tensor | None = None
    neuron_scores: Tensor | None = None
    head_examples: Tensor | None = None
    neuron_examples: Tensor | None = None
    head_direction: Tensor | None = None
    neuron_direction: Tensor | None = None
    head_estimate: Tensor | None = None
    neuron_estimate: Tensor | None = None
    neuron_single: Tensor | None = None
    neuron_joint: Tensor | None = None
    report: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check that every tensor has the shape that the provenance names."""
        shape = self.provenance.shape
        for name, tensor in self._tensors().items():
            expected = (shape.layers, shape.neurons if name in _NEURON_TENSORS else shape.heads)
            if tuple(tensor.shape) != expected:
                raise MisfitError(f"{name} has the shape {tuple(tensor.shape)}, the model needs {expected}")

    @property
    def digest(self) -> str:
        """SHA-256 of the scores."""
        return digest(self._tensors())

    def heads(self, count: int) -> list[Head]:
        """The `count` measured heads with the highest `head_scores`; ties are broken by (layer, head)."""
        if self.head_scores is None:
            raise HonesError("this ranking has no head scores")
        if self.head_examples is None and self.provenance.shape.layer_heads is None:
            return top_heads(self.head_scores, count)
        return top_heads(self.head_scores, count, self._measured_heads())

    def neurons(self, fraction: float | None = None) -> list[Neuron]:
        """The best `fraction` of all neurons (default: the one that the ranking was made with, else 1 %)."""
        if self.neuron_scores is None:
            raise HonesError("this ranking has no neuron scores: rank with --method hones and --neurons")
        share = self.provenance.settings.get("neurons", 0.01) if fraction is None else fraction
        if not isinstance(share, int | float):
            raise HonesError(
                f"this ranking's settings give no fraction of neurons, but {share!r}: pass --neurons"
            )
        shape = self.provenance.shape
        count = neuron_count(self.neuron_scores[shape.neuron_mask()], share)
        measured = self.measured_neurons()
        if count > int(measured.sum()):
            raise HonesError(
                f"cannot choose {count} of the {int(measured.sum())} neurons that were measured: lower "
                "--neurons, or rank with more examples"
            )
        return top_neurons(self.neuron_scores.masked_fill(~measured, -torch.inf), count)

    def measured_neurons(self) -> Tensor:
        """Which neurons [L, I] have a score: those that exist, and of which an example was measured."""
        there = self.provenance.shape.neuron_mask()
        return there if self.neuron_examples is None else there & (self.neuron_examples > 0)

    @property
    def measured_heads(self) -> int:
        """How many heads have a score: all that exist, or those that a screen left."""
        return 0 if self.head_scores is None else int(self._measured_heads().sum())

    def _measured_heads(self) -> Tensor:
        """Which heads [L, H] have a score: those that exist, and that were measured on an example."""
        there = self.provenance.shape.head_mask()
        return there if self.head_examples is None else there & (self.head_examples > 0)

    def top_heads(self, count: int = 10) -> list[tuple[Head, float]]:
        """The `count` best heads with their scores, best first.

        Raises: HonesError when the ranking has no head scores, or fewer heads than `count`.
        """
        best = self.heads(count)
        assert self.head_scores is not None
        return [(head, float(self.head_scores[head])) for head in best]

    def top_neurons(self, count: int = 10) -> list[tuple[Neuron, float]]:
        """The `count` best neurons with their scores, best first.

        Raises: HonesError when the ranking has no neuron scores, or fewer neurons than `count`.
        """
        if self.neuron_scores is None:
            raise HonesError("this ranking has no neuron scores: rank with --method hones and --neurons")
        scores, measured = self.neuron_scores, self.measured_neurons()
        if count > int(measured.sum()):
            raise HonesError(
                f"cannot choose {count} of the {int(measured.sum())} neurons that were measured: lower "
                "--neurons, or rank with more examples"
            )
        best = top_neurons(scores.masked_fill(~measured, -torch.inf), count)
        return [(neuron, float(scores[neuron])) for neuron in best]

    def to_pandas(self) -> Any:
        """Every head as a row of a pandas.DataFrame: layer, head, and each of its scores.

        Raises: HonesError when the ranking has no head scores, or pandas is not installed.
        """
        if self.head_scores is None:
            raise HonesError("this ranking has no head scores")
        columns = {name: tensor for name, tensor in self._tensors().items() if name in _HEAD_TENSORS}
        rows = [
            {"layer": layer, "head": head} | {name: float(t[layer, head]) for name, t in columns.items()}
            for layer in range(self.head_scores.shape[0])
            for head in range(self.head_scores.shape[1])
        ]
        return notebook.data_frame(rows)

    def plot(self) -> Any:
        """A heat map of the head scores [L, H], as a matplotlib.figure.Figure.

        Raises: HonesError when the ranking has no head scores.
        """
        if self.head_scores is None:
            raise HonesError("this ranking has no head scores")
        count = sum(examples.count for examples in self.provenance.examples)
        title = f"{self.provenance.method} on {self.provenance.examples[0].task} (n = {count})"
        return notebook.heat_map(self.head_scores.numpy(), "layer", "head", "score", title)

    def __repr__(self) -> str:
        """The method, the examples and the best head, in one line."""
        source = self.provenance
        tasks = ", ".join(f"{examples.count} examples of {examples.task}" for examples in source.examples)
        best = ""
        if self.head_scores is not None:
            head, score = self.top_heads(1)[0]
            best = f"; best head {head.layer}.{head.head} with {score:.4g}"
        return f"<hones_eval.Ranking by {source.method} of {source.base_model} on {tasks}{best}>"

    def _repr_html_(self) -> str:
        """The best heads as a table."""
        if self.head_scores is None:
            return notebook.html_table([], repr(self))
        best = self.top_heads(min(10, self.measured_heads))
        rows = [{"layer": head.layer, "head": head.head, "score": score} for head, score in best]
        return notebook.html_table(rows, repr(self))

    def save(self, folder: str | Path) -> None:
        """Write `ranking.json` and `ranking.safetensors` into `folder`."""
        save_artifact(Path(folder), "ranking", self.provenance, self._tensors(), {"report": self.report})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder that `save` wrote. Raises: HonesError that names the file, for anything else."""
        header, provenance, tensors = load_artifact(Path(folder), "ranking")
        unknown = set(tensors) - {*_HEAD_TENSORS, *_NEURON_TENSORS}
        if unknown:
            raise HonesError(f"{folder}: a ranking has no tensors named {sorted(unknown)}")
        if not provenance.examples:
            raise HonesError(f"{folder}: this ranking does not say which examples it was made from")
        return cls(provenance=provenance, report=header.get("report"), **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        names = (*_HEAD_TENSORS, *_NEURON_TENSORS)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
