"""A steering: a scale for every head and every neuron, with its provenance."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from hones_eval.core.artifact import ModelShape, Provenance, digest, load_artifact, save_artifact
from hones_eval.core.combining import Part, parts_of
from hones_eval.errors import HonesError, MisfitError, first_line
from hones_eval.limits import LARGEST_SCALE

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import nn

    from hones_eval.core.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Steering:
    """Scales for the heads and neurons of a model.

    The activation of each head and each neuron is multiplied by its scale; a scale of 1 changes nothing.

    Attributes:
        head_scales: [L, H] float32, layers by query heads.
        neuron_scales: [L, I] float32, layers by FFN width.
        provenance: base model, method, settings and examples behind the scales.

    Examples:
        >>> from hones_eval.core.artifact import ModelShape, Provenance
        >>> shape = ModelShape(layers=2, heads=4, head_width=8, hidden=32, neurons=64, vocabulary=100)
        >>> heads = torch.ones(2, 4)
        >>> heads[1, 3] = 0
        >>> source = Provenance("org/model", None, shape, "by hand", {}, [])
        >>> Steering(heads, torch.ones(2, 64), source)
        Steering(org/model: 1 of 8 heads x0, 0 of 128 neurons)
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

    @classmethod
    def by_hand(
        cls,
        model: "nn.Module | Anatomy",
        heads: Mapping[tuple[int, int], float] | None = None,
        neurons: Mapping[tuple[int, int], float] | None = None,
    ) -> Self:
        """Make a steering from scales given by hand.

        Args:
            model: the model that the steering is for, or its anatomy.
            heads: scale by (layer, head), both counted from 0, as in `{(3, 5): 0.0}`. 0 masks a head.
            neurons: scale by (layer, neuron), as in `{(4, 123): 2.0}`.

        Raises: HonesError when a site does not exist in the model, naming the site and the range.

        Example:
            `steering = Steering.by_hand(model, heads={(3, 5): 0.0}, neurons={(4, 123): 2.0})`
        """
        from hones_eval.core.adapters import model_source
        from hones_eval.core.anatomy import Anatomy

        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        shape = anatomy.shape
        head_scales = _scales_by_site(heads or {}, "head", shape.layers, shape.heads)
        neuron_scales = _scales_by_site(neurons or {}, "neuron", shape.layers, shape.neurons)
        settings = {"heads": len(heads or {}), "neurons": len(neurons or {})}
        source = Provenance(
            **model_source(anatomy.model), shape=shape, method="by hand", settings=settings, examples=[]
        )
        return cls(head_scales=head_scales, neuron_scales=neuron_scales, provenance=source)

    @property
    def is_noop(self) -> bool:
        """Whether every scale is 1."""
        return bool((self.head_scales == 1).all() and (self.neuron_scales == 1).all())

    @property
    def digest(self) -> str:
        """SHA-256 of the scales. Two steerings with the same digest have the same effect."""
        return digest({"head_scales": self.head_scales, "neuron_scales": self.neuron_scales})

    def rounded_away(self, dtype: torch.dtype) -> int:
        """Count the scales that rounding undoes: not 1, but too close to 1 to change any number of `dtype`.

        Within a quarter of the type's epsilon of 1 (0.002 for bfloat16) every product rounds back to the
        unscaled number.
        """
        distances = (torch.cat([self.head_scales.flatten(), self.neuron_scales.flatten()]) - 1).abs()
        return int(((distances > 0) & (distances <= torch.finfo(dtype).eps / 4)).sum())

    def at_strength(self, strength: float) -> Self:
        """Return this steering with every scale `s` replaced by `1 + strength * (s - 1)`.

        Strength 0 is the baseline, 1 this steering, and 2 is twice as far from the baseline.

        Raises: HonesError when the strength is not finite, or makes a scale larger than `LARGEST_SCALE`.
        """
        if not math.isfinite(strength):
            raise HonesError(f"strength={strength:g} is not a finite number")
        scaled = replace(
            self,
            head_scales=1 + strength * (self.head_scales - 1),
            neuron_scales=1 + strength * (self.neuron_scales - 1),
        )
        largest = max(float(scaled.head_scales.abs().max()), float(scaled.neuron_scales.abs().max()))
        if abs(strength) > 1 and largest > LARGEST_SCALE:
            raise HonesError(
                f"strength={strength:g} makes a scale of {largest:.3g}; scales above {LARGEST_SCALE:g} "
                "would overflow the activations: use a smaller strength"
            )
        return scaled

    def compose(self, other: "Steering") -> Self:
        """Combine two steerings: the product of their scales.

        The provenance is that of this steering and names the other under `settings["composed_with"]`.
        """
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

    @classmethod
    def combine(cls, parts: Sequence[tuple[Self, float]]) -> Self:
        """Combine steerings of one model: the product of their scales, each at its own strength.

        The provenance lists all parts, how many sites more than one of them scales, and the examples of all.

        Args:
            parts: steerings with their strengths, as in `[(a, 0.5), (b, 1)]`.

        Raises: HonesError for no parts; MisfitError for parts of models of different shapes.
        """
        return _combined(parts)

    def check_fits(self, shape: ModelShape, name: str) -> None:
        """Raise MisfitError, naming both sides, when the model called `name` has another shape."""
        differing = self.provenance.shape.differences(shape)
        if differing:
            raise MisfitError(
                f"the steering for {self.provenance.base_model} does not fit {name} ({'; '.join(differing)})"
            )

    def __repr__(self) -> str:
        """One line: the base model, and how many heads and neurons are scaled by how much."""
        heads = _summary(self.head_scales, "heads")
        return f"Steering({self.provenance.base_model}: {heads}, {_summary(self.neuron_scales, 'neurons')})"

    def _repr_html_(self) -> str:
        """Table for notebooks: the provenance, and per layer the scaled heads and neurons."""
        source = self.provenance
        rows = [
            ("base model", source.base_model),
            ("method", source.method),
            ("examples", ", ".join(f"{part.task} ({part.count})" for part in source.examples) or "none"),
            ("heads", _summary(self.head_scales, "heads")),
            ("neurons", _summary(self.neuron_scales, "neurons")),
        ]
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
        return f"<table><caption>Steering</caption>{cells}</table>"

    def to_pandas(self) -> "DataFrame":
        """The scaled sites as a data frame with the columns `kind`, `layer`, `site` and `scale`.

        Sites with a scale of 1 are left out. Raises: HonesError when pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise HonesError("to_pandas needs pandas, which is not installed: pip install pandas") from None
        rows = [
            (kind, layer, site, float(scales[layer, site]))
            for kind, scales in (("head", self.head_scales), ("neuron", self.neuron_scales))
            for layer, site in torch.nonzero(scales != 1).tolist()
        ]
        return DataFrame(rows, columns=["kind", "layer", "site", "scale"])

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
        """Read a folder written by `save`, or a Hugging Face hub repository written by `push`.

        Args:
            path: the folder, or a hub id such as `org/name`; several joined by `+` are combined, each with a
                strength after a colon, as in `runs/a:0.5+runs/b`.
            revision: a branch, tag or commit of the hub repository.
        """
        folder = Path(path)
        if not folder.exists() and parts_of(str(path)) != [Part(str(path), 1.0)]:
            return cls._load_parts(parts_of(str(path)), revision)
        if not folder.exists():
            folder = _download(str(path), revision)
        _, provenance, tensors = load_artifact(folder, "steering")
        if set(tensors) != {"head_scales", "neuron_scales"}:
            raise HonesError(f"{path}: a steering holds head_scales and neuron_scales, not {sorted(tensors)}")
        return cls(provenance=provenance, **tensors)

    @classmethod
    def _load_parts(cls, parts: Sequence[Part], revision: str | None) -> Self:
        """The steering of several folders or hub ids."""
        loaded = [(cls.load(part.path, revision), part.strength) for part in parts]
        if len(loaded) == 1:
            return loaded[0][0].at_strength(loaded[0][1])
        return _combined(loaded, [part.path for part in parts])

    def push(self, repo_id: str, *, private: bool = True) -> None:
        """Upload the two files to a Hugging Face hub model repository; create it when it does not exist."""
        import tempfile

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)


S = TypeVar("S", bound=Steering)


def _combined(parts: Sequence[tuple[S, float]], names: Sequence[str] | None = None) -> S:
    """Combine steerings of one model: the product of their scales.

    Args:
        parts: steerings with their strengths.
        names: what to call them in the provenance; by default method and digest.

    Returns: a steering whose provenance lists all parts, how many sites more than one of them scales, and the
        examples of all.
    Raises: HonesError for no parts; MisfitError for parts of models of different shapes.
    """
    if not parts:
        raise HonesError("there is nothing to combine: give one or more steerings")
    called = names or [f"{part.provenance.method} {part.digest[:12]}" for part, _ in parts]
    scaled = [part.at_strength(strength) for part, strength in parts]
    first = scaled[0]
    for other, name in zip(scaled[1:], called[1:], strict=True):
        other.check_fits(first.provenance.shape, f"the model of {called[0]}")
        if other.provenance.base_model != first.provenance.base_model:
            warnings.warn(
                f"{called[0]} was made for {first.provenance.base_model}, but {name} for "
                f"{other.provenance.base_model}, which has the same shape",
                stacklevel=3,
            )
    heads = torch.stack([part.head_scales for part in scaled])
    neurons = torch.stack([part.neuron_scales for part in scaled])
    examples = {used.hash: used for part in scaled for used in part.provenance.examples}
    settings = {
        "how": "combined",
        "parts": [f"{name} x{strength:g}" for name, (_, strength) in zip(called, parts, strict=True)],
        "digests": [part.digest for part, _ in parts],
        "heads_scaled_by_several": int(((heads != 1).sum(0) > 1).sum()),
        "neurons_scaled_by_several": int(((neurons != 1).sum(0) > 1).sum()),
    }
    methods = dict.fromkeys(part.provenance.method for part in scaled)
    provenance = replace(
        first.provenance,
        method="+".join(methods),
        settings=settings,
        examples=list(examples.values()),
        ranking={"method": "combined", "digests": [_ranking_of(part) for part in scaled]},
    )
    scales = {"head_scales": heads.prod(0), "neuron_scales": neurons.prod(0)}
    largest = max(float(tensor.abs().max()) for tensor in scales.values())
    if largest > LARGEST_SCALE:
        raise HonesError(
            f"together these steerings make a scale of {largest:.3g}; scales above {LARGEST_SCALE:g} would "
            "overflow the activations: use smaller strengths"
        )
    return replace(first, **scales, provenance=provenance)


def _ranking_of(part: Steering) -> str:
    """The digest of the ranking that a steering was made from; empty for none."""
    return str((part.provenance.ranking or {}).get("digest", ""))


def _scales_by_site(given: Mapping[tuple[int, int], float], kind: str, layers: int, width: int) -> Tensor:
    scales = torch.ones(layers, width)
    for (layer, site), scale in given.items():
        if not (0 <= layer < layers and 0 <= site < width):
            raise HonesError(
                f"there is no {kind} {layer}.{site}: this model has layers 0 to {layers - 1} with {kind}s "
                f"0 to {width - 1}"
            )
        scales[layer, site] = scale
    return scales


def _summary(scales: Tensor, kind: str) -> str:
    """Count of the scaled sites and the range of their scales, as in `2 of 64 heads x0 to x1.5`."""
    changed = scales[scales != 1]
    text = f"{changed.numel()} of {scales.numel()} {kind}"
    if not changed.numel():
        return text
    low, high = float(changed.min()), float(changed.max())
    return f"{text} x{low:g}" if low == high else f"{text} x{low:g} to x{high:g}"


def _download(repo_id: str, revision: str | None) -> Path:
    try:
        files = ["steering.json", "steering.safetensors"]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise HonesError(
            f"no steering at {repo_id!r}: there is no such folder, and the hub has none ({reason})"
        ) from None
