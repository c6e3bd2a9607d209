"""A steering: scales of heads and neurons, with where they came from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from hones_eval.core.artifact import ModelShape, Provenance, digest, load_artifact, save_artifact
from hones_eval.errors import HonesError, MisfitError, first_line


@dataclass(frozen=True, eq=False)
class Steering:
    """What every head's slice and every neuron is multiplied by.

    `head_scales` [L, H] and `neuron_scales` [L, I], float32; 1 leaves a site as it is.
    """

    head_scales: Tensor
    neuron_scales: Tensor
    provenance: Provenance

    def __post_init__(self) -> None:
        """Check the shapes against the provenance, and that every scale is finite."""
        shape = self.provenance.shape
        expected = {
            "head_scales": (shape.layers, shape.heads),
            "neuron_scales": (shape.layers, shape.neurons),
        }
        for name, size in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != size:
                raise MisfitError(f"{name} has the shape {tuple(tensor.shape)}, its model needs {size}")
            if not bool(torch.isfinite(tensor).all()):
                raise HonesError(f"{name} holds values that are not finite")

    @property
    def is_noop(self) -> bool:
        """Whether every scale is 1."""
        return bool((self.head_scales == 1).all() and (self.neuron_scales == 1).all())

    @property
    def digest(self) -> str:
        """SHA-256 of the scales: two steerings with the same digest do the same."""
        return digest({"head_scales": self.head_scales, "neuron_scales": self.neuron_scales})

    def swallowed(self, dtype: torch.dtype) -> int:
        """How many scales other than 1 are so near to it that no number of a floating-point type changes.

        Within a quarter of the type's epsilon, 0.002 for bfloat16, the product rounds back to what it was.
        """
        distances = (torch.cat([self.head_scales.flatten(), self.neuron_scales.flatten()]) - 1).abs()
        return int(((distances > 0) & (distances <= torch.finfo(dtype).eps / 4)).sum())

    def at_strength(self, strength: float) -> Self:
        """A scale `s` becomes `1 + strength * (s - 1)`: 0 is the baseline, 1 this steering."""
        return replace(
            self,
            head_scales=1 + strength * (self.head_scales - 1),
            neuron_scales=1 + strength * (self.neuron_scales - 1),
        )

    def compose(self, other: "Steering") -> Self:
        """Both at once: the product of the scales. The provenance keeps this one's and names the other."""
        other.check_fits(self.provenance.shape, "the steering to compose with")
        settings = self.provenance.settings | {"composed_with": other.provenance.to_json()}
        return replace(
            self,
            head_scales=self.head_scales * other.head_scales,
            neuron_scales=self.neuron_scales * other.neuron_scales,
            provenance=replace(
                self.provenance,
                settings=settings,
                examples=[*self.provenance.examples, *other.provenance.examples],
            ),
        )

    def check_fits(self, shape: ModelShape, name: str) -> None:
        """Raise MisfitError, naming both sides, when a model called `name` has another shape."""
        mine = self.provenance.shape
        differing = [
            f"{field}: {getattr(mine, field)} here, {getattr(shape, field)} there"
            for field in ("layers", "heads", "head_width", "neurons", "hidden")
            if getattr(mine, field) != getattr(shape, field)
        ]
        if differing:
            raise MisfitError(
                f"the steering for {self.provenance.base_model} does not fit {name} ({'; '.join(differing)})"
            )

    def save(self, folder: str | Path) -> None:
        """Write `steering.json` and `steering.safetensors` into `folder`."""
        tensors = {"head_scales": self.head_scales, "neuron_scales": self.neuron_scales}
        counts = {
            "scaled_heads": int((self.head_scales != 1).sum()),
            "scaled_neurons": int((self.neuron_scales != 1).sum()),
        }
        save_artifact(Path(folder), "steering", self.provenance, tensors, counts)

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> Self:
        """Read a folder that `save` wrote, or a Hugging Face hub repository that `push` made."""
        folder = Path(path)
        if not folder.exists():
            folder = _download(str(path), revision)
        _, provenance, tensors = load_artifact(folder, "steering")
        if set(tensors) != {"head_scales", "neuron_scales"}:
            raise HonesError(f"{path}: a steering holds head_scales and neuron_scales, not {sorted(tensors)}")
        return cls(provenance=provenance, **tensors)

    def push(self, repo_id: str, *, private: bool = True) -> None:
        """Upload the two files to a Hugging Face hub model repository, which is made when missing."""
        import tempfile

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)


def _download(repo_id: str, revision: str | None) -> Path:
    try:
        files = ["steering.json", "steering.safetensors"]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise HonesError(
            f"no steering at {repo_id!r}: there is no such folder, and the hub has none ({reason})"
        ) from None
