"""A ranking: scores of heads and neurons, with where they came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from hones_eval.core.artifact import Provenance, digest, load_artifact, save_artifact
from hones_eval.core.sites import Head, Neuron, neuron_count, top_heads, top_neurons
from hones_eval.errors import HonesError, MisfitError

_HEAD_TENSORS = (
    "head_scores",
    "head_log_probability",
    "head_positive",
    "head_negative",
    "head_examples",
)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of every head [L, H] and neuron [L, I] of a model's language model.

    `head_scores`: HONES, the drop of the task's metric; V-SEAM, the signed mean drop of the answer's
    probability. `head_log_probability`: the mean drop of the target's log-probability (HONES).
    `head_positive`, `head_negative`: V-SEAM only. `head_examples`: on how many examples each head was
    measured, if heads were raced or screened; a head that was not measured (0) has the score 0.
    `neuron_scores`: importance, when asked for.
    `report`: counts and figures that a reader of the ranking should see.
    """

    provenance: Provenance
    head_scores: Tensor | None = None
    head_log_probability: Tensor | None = None
    head_positive: Tensor | None = None
    head_negative: Tensor | None = None
    neuron_scores: Tensor | None = None
    head_examples: Tensor | None = None
    report: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check that every tensor has the shape that the provenance names."""
        shape = self.provenance.shape
        for name, tensor in self._tensors().items():
            expected = (shape.layers, shape.neurons if name == "neuron_scores" else shape.heads)
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
        measured = None if self.head_examples is None else self.head_examples > 0
        return top_heads(self.head_scores, count, measured)

    def neurons(self, fraction: float | None = None) -> list[Neuron]:
        """The best `fraction` of all neurons (default: the one that the ranking was made with, else 1 %)."""
        if self.neuron_scores is None:
            raise HonesError("this ranking has no neuron scores: rank with --method hones and --neurons")
        share = self.provenance.settings.get("neurons", 0.01) if fraction is None else fraction
        if not isinstance(share, int | float):
            raise HonesError(
                f"this ranking's settings give no fraction of neurons, but {share!r}: pass --neurons"
            )
        return top_neurons(self.neuron_scores, neuron_count(self.neuron_scores, share))

    def save(self, folder: str | Path) -> None:
        """Write `ranking.json` and `ranking.safetensors` into `folder`."""
        save_artifact(Path(folder), "ranking", self.provenance, self._tensors(), {"report": self.report})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder that `save` wrote. Raises: HonesError that names the file, for anything else."""
        header, provenance, tensors = load_artifact(Path(folder), "ranking")
        unknown = set(tensors) - {*_HEAD_TENSORS, "neuron_scores"}
        if unknown:
            raise HonesError(f"{folder}: a ranking has no tensors named {sorted(unknown)}")
        if not provenance.examples:
            raise HonesError(f"{folder}: this ranking does not say which examples it was made from")
        return cls(provenance=provenance, report=header.get("report"), **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        names = (*_HEAD_TENSORS, "neuron_scores")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
