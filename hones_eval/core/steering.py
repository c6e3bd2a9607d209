"""A steering: a scale for every head and every neuron, optionally shifts, and the provenance."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor

from hones_eval.core.artifact import ModelShape, Provenance, digest, load_artifact, save_artifact
from hones_eval.core.combining import Part, parts_of
from hones_eval.core.files import exists
from hones_eval.core.hub import download, upload
from hones_eval.core.model_card import model_card
from hones_eval.core.notebook import safe
from hones_eval.errors import HonesError, MisfitError
from hones_eval.limits import LARGEST_SCALE

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import nn

    from hones_eval.core.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Steering:
    """Scales, and optionally shifts, for the heads and neurons of a model.

    The activation `z` of each head and each neuron becomes `s * z + b`, with its scale `s` and its shift `b`.
    A scale of 1 and a shift of 0 change nothing.

    Attributes:
        head_scales: [L, H] float32, layers by query heads.
        neuron_scales: [L, I] float32, layers by FFN width.
        provenance: base model, method, settings and examples behind the scales.
        head_shifts: [L, H, d] float32, one vector of the head's width per head; None where all are 0.
        neuron_shifts: [L, I] float32; None where all are 0.

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
    head_shifts: Tensor | None = None
    neuron_shifts: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes against the provenance, and that every number is finite."""
        shape = self.provenance.shape
        expected = {
            "head_scales": (shape.layers, shape.heads),
            "neuron_scales": (shape.layers, shape.neurons),
            "head_shifts": (shape.layers, shape.heads, shape.head_width),
            "neuron_shifts": (shape.layers, shape.neurons),
        }
        for name, size in expected.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != size:
                raise MisfitError(f"{name} has the shape {tuple(tensor.shape)}, its model needs {size}")
            if not bool(torch.isfinite(tensor).all()):
                raise HonesError(f"{name} holds values that are not finite")
            if name.endswith("shifts") and not bool(tensor.any()):
                object.__setattr__(self, name, None)  # the dataclass is frozen

    @classmethod
    def by_hand(
        cls,
        model: "nn.Module | Anatomy",
        heads: Mapping[tuple[int, int], float] | None = None,
        neurons: Mapping[tuple[int, int], float] | None = None,
        *,
        head_shifts: Mapping[tuple[int, int], Tensor] | None = None,
        neuron_shifts: Mapping[tuple[int, int], float] | None = None,
    ) -> Self:
        """Make a steering from scales and shifts given by hand.

        Args:
            model: the model that the steering is for, or its anatomy.
            heads: scale by (layer, head), both counted from 0, as in `{(3, 5): 0.0}`. 0 masks a head.
            neurons: scale by (layer, neuron), as in `{(4, 123): 2.0}`.
            head_shifts: by (layer, head) a vector of the head's width that is added to its output.
            neuron_shifts: by (layer, neuron) a number that is added to its activation.

        Raises: HonesError when a site does not exist in the model, naming the site and the range, or when a
            shift of a head has another width.

        Example:
            `steering = Steering.by_hand(model, heads={(3, 5): 0.0}, neurons={(4, 123): 2.0})`
        """
        from hones_eval.core.adapters import model_source
        from hones_eval.core.anatomy import Anatomy

        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        shape = anatomy.shape
        head_scales, neuron_scales = (
            torch.ones(shape.layers, shape.heads),
            torch.ones(shape.layers, shape.neurons),
        )
        added = torch.zeros(shape.layers, shape.heads, shape.head_width)
        neurons_added = torch.zeros(shape.layers, shape.neurons)
        for (layer, head), scale in (heads or {}).items():
            head_scales[_site(shape, "head", layer, head)] = scale
        for (layer, neuron), scale in (neurons or {}).items():
            neuron_scales[_site(shape, "neuron", layer, neuron)] = scale
        for (layer, neuron), shift in (neuron_shifts or {}).items():
            neurons_added[_site(shape, "neuron", layer, neuron)] = shift
        for (layer, head), vector in (head_shifts or {}).items():
            place = _site(shape, "head", layer, head)
            width = shape.head_width_of(layer)
            if tuple(vector.shape) != (width,):
                raise HonesError(
                    f"the shift of head {layer}.{head} has the shape {tuple(vector.shape)}; it should be "
                    f"({width},), the head's width"
                )
            added[place][:width] = vector
        settings = {"heads": len(heads or {}), "neurons": len(neurons or {})}
        if head_shifts or neuron_shifts:
            settings |= {"shifted_heads": len(head_shifts or {}), "shifted_neurons": len(neuron_shifts or {})}
        source = Provenance(
            **model_source(anatomy.model), shape=shape, method="by hand", settings=settings, examples=[]
        )
        return cls(head_scales, neuron_scales, source, added, neurons_added)

    @property
    def is_noop(self) -> bool:
        """Whether every scale is 1, and nothing is added."""
        return not self.has_shifts and bool((self.head_scales == 1).all() and (self.neuron_scales == 1).all())

    @property
    def has_shifts(self) -> bool:
        """Whether a shift is not 0."""
        return self.head_shifts is not None or self.neuron_shifts is not None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors as they are stored; shifts only where there are some."""
        names = ("head_scales", "neuron_scales", "head_shifts", "neuron_shifts")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def distances(self) -> Tensor:
        """How far every scale is from 1: those of all heads, then those of all neurons, in one row."""
        return (torch.cat([self.head_scales.flatten(), self.neuron_scales.flatten()]) - 1).abs()

    @property
    def counts(self) -> dict[str, int]:
        """How many heads and neurons are scaled, and shifted where there are shifts."""
        found = {
            "scaled_heads": int((self.head_scales != 1).sum()),
            "scaled_neurons": int((self.neuron_scales != 1).sum()),
        }
        if self.head_shifts is not None:
            found["shifted_heads"] = int((self.head_shifts != 0).any(-1).sum())
        if self.neuron_shifts is not None:
            found["shifted_neurons"] = int((self.neuron_shifts != 0).sum())
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of scales and shifts. Two steerings with the same digest have the same effect."""
        return digest(self.tensors)

    def rounded_away(self, dtype: torch.dtype) -> int:
        """Count the scales that rounding undoes: not 1, but too close to 1 to change any number of `dtype`.

        Within a quarter of the type's epsilon of 1 (0.002 for bfloat16) every product rounds back to the
        unscaled number.
        """
        distances = self.distances
        return int(((distances > 0) & (distances <= torch.finfo(dtype).eps / 4)).sum())

    def at_strength(self, strength: float) -> Self:
        """Return this steering with every scale `s` replaced by `1 + strength * (s - 1)`.

        Shifts are multiplied by the strength.

        Strength 0 is the baseline, 1 this steering, and 2 is twice as far from the baseline.

        Raises: HonesError when the strength is not finite, or makes a scale or a shift larger than
            `LARGEST_SCALE`.
        """
        if not math.isfinite(strength):
            raise HonesError(f"strength={strength:g} is not a finite number")
        scaled = replace(
            self,
            head_scales=1 + strength * (self.head_scales - 1),
            neuron_scales=1 + strength * (self.neuron_scales - 1),
            head_shifts=None if self.head_shifts is None else strength * self.head_shifts,
            neuron_shifts=None if self.neuron_shifts is None else strength * self.neuron_shifts,
        )
        largest = max(float(tensor.abs().max()) for tensor in scaled.tensors.values())
        if abs(strength) > 1 and largest > LARGEST_SCALE:
            raise HonesError(
                f"strength={strength:g} makes a scale of {largest:.3g}; scales and shifts above "
                f"{LARGEST_SCALE:g} would overflow the activations: use a smaller strength"
            )
        return scaled

    def compose(self, other: "Steering") -> Self:
        """Combine two steerings: this one acts first, and the other on its result.

        Scales are multiplied; the other's scales also multiply the shifts of this one. The provenance is that
        of this steering and names the other under `settings["composed_with"]`.
        """
        other.check_fits(self.provenance.shape, "the steering to compose with")
        settings = self.provenance.settings | {"composed_with": other.provenance.to_json()}
        return replace(
            self._then(other),
            provenance=replace(
                self.provenance,
                settings=settings,
                examples=[*self.provenance.examples, *other.provenance.examples],
            ),
        )

    def _then(self, other: "Steering") -> Self:
        """This steering followed by another: `s2 * (s1 * z + b1) + b2`, with the provenance of this one."""

        def shifted(first: Tensor | None, scales: Tensor, second: Tensor | None) -> Tensor | None:
            if first is None:
                return second
            return first * scales if second is None else first * scales + second

        return replace(
            self,
            head_scales=self.head_scales * other.head_scales,
            neuron_scales=self.neuron_scales * other.neuron_scales,
            head_shifts=shifted(self.head_shifts, other.head_scales[..., None], other.head_shifts),
            neuron_shifts=shifted(self.neuron_shifts, other.neuron_scales, other.neuron_shifts),
        )

    @classmethod
    def combine(cls, parts: Sequence[tuple[Self, float]]) -> Self:
        """Combine steerings of one model: each acts at its own strength on the result of those before it.

        Scales are multiplied, so their order does not matter. A shift is multiplied by the scales of the
        steerings after it. The provenance lists all parts, how many sites more than one of them changes, and
        the examples of all.

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
        parts = [heads, _summary(self.neuron_scales, "neurons"), *self._shift_summary()]
        return f"Steering({self.provenance.base_model}: {', '.join(parts)})"

    def _shift_summary(self) -> list[str]:
        """How many heads and neurons have shifts; nothing where there are none."""
        counts = [(self.counts.get(f"shifted_{kind}", 0), kind) for kind in ("heads", "neurons")]
        return [f"{count} {kind if count > 1 else kind[:-1]} shifted" for count, kind in counts if count]

    def _repr_html_(self) -> str:
        """Table for notebooks: the provenance, and per layer the scaled heads and neurons."""
        source = self.provenance
        rows = [
            ("base model", source.base_model),
            ("method", source.method),
            ("examples", ", ".join(f"{part.task} ({part.count})" for part in source.examples) or "none"),
            ("heads", _summary(self.head_scales, "heads")),
            ("neurons", _summary(self.neuron_scales, "neurons")),
            *(("shifts", text) for text in self._shift_summary()),
        ]
        cells = "".join(f"<tr><th>{safe(name)}</th><td>{safe(text)}</td></tr>" for name, text in rows)
        return f"<table><caption>Steering</caption>{cells}</table>"

    def to_pandas(self) -> "DataFrame":
        """The changed sites as a data frame with the columns `kind`, `layer`, `site` and `scale`.

        Sites that are not changed are left out. Where the steering has shifts, a column `shift` has those of
        neurons and the norms of those of heads. Raises: HonesError when pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise HonesError("to_pandas needs pandas, which is not installed: pip install pandas") from None
        columns = ["kind", "layer", "site", "scale", "shift"]
        rows = self.to_rows()
        return DataFrame(rows, columns=columns) if self.has_shifts else DataFrame(rows, columns=columns[:4])

    def to_rows(self) -> list[tuple[str | int | float, ...]]:
        """The changed sites as (kind, layer, site, scale), and the shift where there are some; heads first.

        The shift of a head is shown by its norm.
        """
        norms = None if self.head_shifts is None else self.head_shifts.norm(dim=-1)
        found: list[tuple[str | int | float, ...]] = []
        kinds = (("head", self.head_scales, norms), ("neuron", self.neuron_scales, self.neuron_shifts))
        for kind, scales, shifts in kinds:
            changed = scales != 1 if shifts is None else (scales != 1) | (shifts != 0)
            for layer, site in torch.nonzero(changed).tolist():
                row = (kind, layer, site, float(scales[layer, site]))
                shift = 0.0 if shifts is None else float(shifts[layer, site])
                found.append((*row, shift) if self.has_shifts else row)
        return found

    def save(self, folder: str | Path) -> None:
        """Write `steering.json` and `steering.safetensors` into `folder`."""
        save_artifact(Path(folder), "steering", self.provenance, self.tensors, self.counts)

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> Self:
        """Read a folder written by `save`, or a Hugging Face hub repository written by `push`.

        Args:
            path: the folder, or a hub id such as `org/name`; several joined by `+` are combined, each with a
                strength after a colon, as in `runs/a:0.5+runs/b`.
            revision: a branch, tag or commit of the hub repository; also `org/name@revision`. The commit that
                was loaded is recorded in the provenance, `settings["hub"]`.
        """
        folder = Path(path)
        if not exists(folder) and parts_of(str(path)) != [Part(str(path), 1.0)]:
            return cls._load_parts(parts_of(str(path)), revision)
        hub = None
        if not exists(folder):
            found = download(str(path), revision)
            folder, hub = found.folder, {"repository": found.repo_id, "commit": found.commit}
        _, provenance, tensors = load_artifact(folder, "steering")
        if hub is not None:
            provenance = replace(provenance, settings=provenance.settings | {"hub": hub})
        if not SCALES <= set(tensors) <= SCALES | SHIFTS:
            raise HonesError(
                f"{path}: a steering holds head_scales and neuron_scales, not {sorted(tensors)}; shifts are "
                "optional"
            )
        return cls(provenance=provenance, **tensors)

    @classmethod
    def _load_parts(cls, parts: Sequence[Part], revision: str | None) -> Self:
        """The steering of several folders or hub ids."""
        loaded = [(cls.load(part.path, revision), part.strength) for part in parts]
        if len(loaded) == 1:
            return loaded[0][0].at_strength(loaded[0][1])
        return _combined(loaded, [part.path for part in parts])

    def push(
        self,
        repo_id: str,
        *,
        private: bool = True,
        rows: Sequence[Mapping[str, str]] = (),
        licence: str | None = None,
    ) -> str:
        """Upload the two files and a model card to a hub repository; create it when it does not exist.

        Args:
            repo_id: `org/name`.
            private: whether a repository that is created is private.
            rows: rows of a board's `leaderboard.csv` with this steering, for the card.
            licence: as the hub names licences.

        Returns: the commit.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        card = model_card(self.provenance, self.counts, self.digest, repo_id, rows, licence)
        files["README.md"] = card.encode()
        return upload(repo_id, files, private=private)


SCALES, SHIFTS = {"head_scales", "neuron_scales"}, {"head_shifts", "neuron_shifts"}
"""The tensors of a steering's file: the scales always, the shifts where they are not all 0."""

S = TypeVar("S", bound=Steering)


def _combined(parts: Sequence[tuple[S, float]], names: Sequence[str] | None = None) -> S:
    """Combine steerings of one model, which act one after the other.

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
    heads, neurons = (torch.stack([changed(part) for part in scaled]) for changed in (_heads, _neurons))
    examples = {used.hash: used for part in scaled for used in part.provenance.examples}
    settings = {
        "how": "combined",
        "parts": [f"{name} x{strength:g}" for name, (_, strength) in zip(called, parts, strict=True)],
        "digests": [part.digest for part, _ in parts],
        "heads_scaled_by_several": int((heads.sum(0) > 1).sum()),
        "neurons_scaled_by_several": int((neurons.sum(0) > 1).sum()),
    }
    methods = dict.fromkeys(part.provenance.method for part in scaled)
    provenance = replace(
        first.provenance,
        method="+".join(methods),
        settings=settings,
        examples=list(examples.values()),
        ranking={"method": "combined", "digests": [_ranking_of(part) for part in scaled]},
    )
    together = first
    for part in scaled[1:]:
        together = together._then(part)
    largest = max(float(tensor.abs().max()) for tensor in together.tensors.values())
    if largest > LARGEST_SCALE:
        raise HonesError(
            f"together these steerings make a scale of {largest:.3g}; scales above {LARGEST_SCALE:g} would "
            "overflow the activations: use smaller strengths"
        )
    return replace(together, provenance=provenance)


def _heads(steering: Steering) -> Tensor:
    """Which heads [L, H] a steering changes."""
    scaled = steering.head_scales != 1
    return scaled if steering.head_shifts is None else scaled | (steering.head_shifts != 0).any(-1)


def _neurons(steering: Steering) -> Tensor:
    """Which neurons [L, I] a steering changes."""
    scaled = steering.neuron_scales != 1
    return scaled if steering.neuron_shifts is None else scaled | (steering.neuron_shifts != 0)


def _ranking_of(part: Steering) -> str:
    """The digest of the ranking that a steering was made from; empty for none."""
    return str((part.provenance.ranking or {}).get("digest", ""))


def _site(shape: ModelShape, kind: str, layer: int, site: int) -> tuple[int, int]:
    """A site as an index of scales. Raises: HonesError when the model does not have it."""
    layers, widest = shape.layers, shape.heads if kind == "head" else shape.neurons
    width = widest
    if 0 <= layer < layers:
        width = shape.heads_of(layer) if kind == "head" else shape.neurons_of(layer)
    if 0 <= layer < layers and 0 <= site < width:
        return layer, site
    own = f"; layer {layer} has {width}" if width != widest else ""
    raise HonesError(
        f"there is no {kind} {layer}.{site}: this model has layers 0 to {layers - 1} with {kind}s "
        f"0 to {widest - 1}{own}"
    )


def _summary(scales: Tensor, kind: str) -> str:
    """Count of the scaled sites and the range of their scales, as in `2 of 64 heads x0 to x1.5`."""
    changed = scales[scales != 1]
    text = f"{changed.numel()} of {scales.numel()} {kind}"
    if not changed.numel():
        return text
    low, high = float(changed.min()), float(changed.max())
    return f"{text} x{low:g}" if low == high else f"{text} x{low:g} to x{high:g}"
