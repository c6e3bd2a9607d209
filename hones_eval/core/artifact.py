"""Artifacts: folders with JSON for people and safetensors for numbers, checked when written and when read.

Format version 2. `<kind>.json` holds the header: format, versions, shapes of the tensors, the provenance, the
digest of the tensors, and `header_digest`, which covers everything else in the header.

Version 1 has no `header_digest` and is still read, with a warning: its scores or scales are as they were
written, but nothing shows whether its provenance (settings, examples, image hashes) was changed since. A file
of version 2 does not become one of version 1 by another number: version 1 lacks fields that version 2 has.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hones_eval import limits
from hones_eval.core.files import (
    check_plain,
    json_text,
    named_errors,
    publish,
    read_json,
    read_strict_json,
    stage_bytes,
    write_bytes,
    write_json,
    write_text,
)
from hones_eval.errors import HonesError
from hones_eval.version import __version__

__all__ = [
    "FORMAT_VERSION",
    "ExampleSet",
    "ModelShape",
    "Provenance",
    "digest",
    "hash_of",
    "load_artifact",
    "read_json",
    "save_artifact",
    "write_bytes",
    "write_json",
    "write_text",
]

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
NOT_IN_VERSION_1 = ("header_digest", "weights", "adapter", "adapter_revision")

# Field types of the schema. They are checked by `checked`, not by the constructors.
Layers = Annotated[int, Field(strict=True, ge=1, le=limits.LAYERS)]
Heads = Annotated[int, Field(strict=True, ge=1, le=limits.HEADS)]
Width = Annotated[int, Field(strict=True, ge=1, le=limits.WIDTH)]
Integer = Annotated[int, Field(strict=True, ge=0, le=limits.INTEGER)]
PerLayer = Annotated[list[Integer], Field(max_length=limits.LAYERS)]
Group = Annotated[list[Integer], Field(min_length=2, max_length=2)]
Groups = Annotated[
    list[Annotated[list[Group], Field(max_length=limits.LAYERS)]], Field(max_length=limits.LAYERS)
]
Name = Annotated[str, Field(strict=True, max_length=limits.NAME)]


@dataclass(frozen=True)
class ModelShape:
    """The numbers that decide whether scores and scales fit a model's language model.

    `heads`, `head_width` and `neurons` are those of the largest layer. Where layers differ, the lists have
    one number per layer: how many heads, how wide, how many neurons. Scores [L, H] and [L, I] then hold
    zeros, and scales ones, for heads and neurons that a layer lacks. In a mixture of experts `layer_experts`
    and `layer_expert_widths` are the number of routed experts per layer and the neurons of each: neuron
    `(layer, expert, i)` has the number `expert * width + i`, and those of shared experts come last.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layers: Layers
    heads: Heads
    head_width: Width
    hidden: Width
    neurons: Width
    vocabulary: Width
    layer_heads: PerLayer | None = None
    layer_head_widths: PerLayer | None = None
    layer_neurons: PerLayer | None = None
    layer_experts: PerLayer | None = None
    layer_expert_widths: PerLayer | None = None
    layer_expert_groups: Groups | None = None
    """Only where a layer has several groups of experts (of text and of image tokens in ERNIE 4.5 VL): per
    layer the number of experts and the neurons of each, `[experts, width]`, of every group. Its experts are
    numbered through all groups, and `layer_experts` and `layer_expert_widths` are 0 there."""

    def __post_init__(self) -> None:
        """Check that every list has a number for each layer, and none above the largest that is stated."""
        bounds = {
            "layer_heads": self.heads,
            "layer_head_widths": self.head_width,
            "layer_neurons": self.neurons,
            "layer_experts": self.neurons,
            "layer_expert_widths": self.neurons,
        }
        for name, largest in bounds.items():
            numbers = getattr(self, name)
            if numbers is not None and (len(numbers) != self.layers or max(numbers) > largest):
                raise ValueError(f"{name} needs {self.layers} numbers of at most {largest}")
        groups = self.layer_expert_groups
        if groups is not None and (
            len(groups) != self.layers
            or any(sum(count * width for count, width in layer) > self.neurons for layer in groups)
        ):
            raise ValueError(
                f"layer_expert_groups needs groups of at most {self.neurons} neurons for {self.layers} layers"
            )

    @classmethod
    def of_layers(
        cls,
        *,
        heads: list[int],
        head_widths: list[int],
        neurons: list[int],
        experts: list[int],
        expert_widths: list[int],
        hidden: int,
        vocabulary: int,
        groups: list[list[list[int]]] | None = None,
    ) -> Self:
        """The shape of layers with these numbers of heads and neurons; lists only where layers differ."""

        def differing(numbers: list[int]) -> list[int] | None:
            return numbers if len(set(numbers)) > 1 else None

        return cls(
            layers=len(heads),
            heads=max(heads),
            head_width=max(head_widths),
            hidden=hidden,
            neurons=max(neurons),
            vocabulary=vocabulary,
            layer_heads=differing(heads),
            layer_head_widths=differing(head_widths),
            layer_neurons=differing(neurons),
            layer_experts=experts if any(experts) else None,
            layer_expert_widths=expert_widths if any(experts) else None,
            layer_expert_groups=groups if any(groups or []) else None,
        )

    def differences(self, other: "ModelShape") -> list[str]:
        """What makes scores and scales for this shape unfit for a model of another, one phrase per size."""
        sizes = ("layers", "heads", "head_width", "neurons", "hidden")
        found = [
            f"{name}: {getattr(self, name)} here, {getattr(other, name)} there"
            for name in sizes
            if getattr(self, name) != getattr(other, name)
        ]
        lists = {
            "layer_heads": "heads per layer",
            "layer_head_widths": "head widths per layer",
            "layer_neurons": "neurons per layer",
            "layer_experts": "experts per layer",
            "layer_expert_widths": "neurons per expert",
            "layer_expert_groups": "groups of experts",
        }
        if self.layer_expert_groups is None or other.layer_expert_groups is None:
            del lists["layer_expert_groups"]  # older artifacts do not state them
        return found or [
            f"{text} differ" for name, text in lists.items() if getattr(self, name) != getattr(other, name)
        ]

    def heads_of(self, layer: int) -> int:
        """The number of heads of a layer."""
        return self.heads if self.layer_heads is None else self.layer_heads[layer]

    def head_width_of(self, layer: int) -> int:
        """The width of a layer's heads."""
        return self.head_width if self.layer_head_widths is None else self.layer_head_widths[layer]

    def neurons_of(self, layer: int) -> int:
        """The number of neurons of a layer."""
        return self.neurons if self.layer_neurons is None else self.layer_neurons[layer]

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return self.layer_experts is not None or self.layer_expert_groups is not None

    def expert_groups(self, layer: int) -> list[tuple[int, int]]:
        """The number of routed experts and the neurons of each, of every group of experts of a layer."""
        if self.layer_expert_groups is not None and self.layer_expert_groups[layer]:
            return [(count, width) for count, width in self.layer_expert_groups[layer]]
        if self.layer_experts is None or self.layer_expert_widths is None or not self.layer_experts[layer]:
            return []
        return [(self.layer_experts[layer], self.layer_expert_widths[layer])]

    def expert_of(self, layer: int, neuron: int) -> tuple[int, int] | None:
        """The routed expert of a neuron and its number there; None in dense layers and shared experts."""
        start = experts = 0
        for count, width in self.expert_groups(layer):
            if neuron < start + count * width:
                expert, i = divmod(neuron - start, width)
                return experts + expert, i
            start, experts = start + count * width, experts + count
        return None

    def alike(self, layer: int, neuron: int) -> range:
        """The neurons that are routed to as often as one: those of its expert, or all that always are active.

        Always active are the neurons of dense layers and of shared experts.
        """
        start = 0
        for count, width in self.expert_groups(layer):
            if neuron < start + count * width:
                first = neuron - (neuron - start) % width
                return range(first, first + width)
            start += count * width
        return range(start, self.neurons_of(layer))

    def routed_alike(self, layer: int) -> list[range]:
        """The neurons of a layer in groups that are routed to alike: each expert, and all always active."""
        found, start = [], 0
        for count, width in self.expert_groups(layer):
            found += [range(start + i * width, start + (i + 1) * width) for i in range(count)]
            start += count * width
        return [*found, range(start, self.neurons_of(layer))]

    def routed(self, layer: int, activations: Tensor) -> Tensor:
        """Whether each neuron could be active [..., I], given the activations of a layer [..., I].

        The neurons of an expert could if any of them is not 0: tokens that are not routed to it have zeros
        there. All other neurons that exist always could.
        """
        found = torch.zeros(activations.shape, dtype=torch.bool, device=activations.device)
        found[..., : self.neurons_of(layer)] = True
        start = 0
        for count, width in self.expert_groups(layer):
            part = slice(start, start + count * width)
            active = (activations[..., part].unflatten(-1, (count, width)) != 0).any(-1)
            found[..., part] = active.repeat_interleave(width, dim=-1)
            start = part.stop
        return found

    def head_mask(self) -> Tensor:
        """Which entries of a tensor [L, H] are heads that exist."""
        return _lengths_mask([self.heads_of(layer) for layer in range(self.layers)], self.heads)

    def neuron_mask(self) -> Tensor:
        """Which entries of a tensor [L, I] are neurons that exist."""
        return _lengths_mask([self.neurons_of(layer) for layer in range(self.layers)], self.neurons)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping, without the lists that are not needed."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _lengths_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


@dataclass(frozen=True)
class ExampleSet:
    """The examples that a result was made from: task, split, ids, and a hash of their content."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    task: Name
    split: Name
    count: Annotated[int, Field(strict=True, ge=0, le=limits.EXAMPLES)]
    offset: Integer
    hash: Name
    doc_ids: Annotated[list[Integer], Field(strict=True, max_length=limits.EXAMPLES)] = field(
        default_factory=list
    )
    image_hashes: Annotated[list[Name], Field(strict=True, max_length=limits.EXAMPLES)] = field(
        default_factory=list
    )

    text_hashes: Annotated[list[Name], Field(strict=True, max_length=limits.EXAMPLES)] = field(
        default_factory=list
    )
    """Of the questions that show no image."""

    def shared_texts(self, other: "ExampleSet") -> set[str]:
        """Hashes of the questions without an image that both sets contain."""
        return set(self.text_hashes) & set(other.text_hashes)

    def shared_images(self, other: "ExampleSet") -> set[str]:
        """Hashes of the images that both sets contain."""
        return set(self.image_hashes) & set(other.image_hashes)


@dataclass(frozen=True)
class Provenance:
    """Where an artifact came from: base model, examples, method, settings, and the ranking used."""

    base_model: Name
    revision: Name | None
    shape: ModelShape
    method: Name
    settings: Annotated[dict[str, Any], Field(strict=True)]
    examples: Annotated[list[ExampleSet], Field(max_length=limits.EXAMPLE_SETS)]
    seed: Annotated[int, Field(strict=True, ge=-limits.INTEGER, le=limits.INTEGER)] = 0
    ranking: Annotated[dict[str, Any], Field(strict=True)] | None = None
    weights: Name | None = None
    """The digest of the model's weights (`core.weights`); None in artifacts from before it was recorded."""
    adapter: Name | None = None
    """Folder or hub id of the PEFT adapter that was on the base model; None without one."""
    adapter_revision: Name | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild from the JSON made by `to_json`; unknown keys are ignored.

        Raises: ValidationError when a field is missing, has another type, or is outside its limits.
        """
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        made: Self = _adapter(cls).validate_python(known)
        return made

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self) | {"shape": self.shape.to_json()}


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def first_problem(error: ValidationError) -> str:
    """The first thing that a schema found wrong, as `field: reason`."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, independent of the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def header_digest(header: Mapping[str, Any]) -> str:
    """SHA-256 over a header's content without its own digest, independent of layout and order of keys."""
    content = {name: value for name, value in header.items() if name != "header_digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of(parts: Iterable[str]) -> str:
    """SHA-256 of a sequence of strings, including where each one ends."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def save_artifact(
    folder: Path, kind: str, provenance: Provenance, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]
) -> None:
    """Write `<kind>.json` and `<kind>.safetensors`.

    Everything is checked before anything is written. Both files are then written under temporary names, and
    `<kind>.json` gets its name last: without it there is no artifact. A crash in between leaves none.

    Raises: HonesError when a tensor is not finite or a field cannot be stored; nothing is written then.
    """
    content = {name: tensor.detach().cpu().to(torch.float32).contiguous() for name, tensor in tensors.items()}
    for name, tensor in content.items():
        if not bool(torch.isfinite(tensor).all()):
            raise HonesError(f"{kind} tensor {name} holds values that are not finite; nothing was written")
    header = {
        "format": f"hones-eval {kind}",
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "digest": digest(content),
        "tensors": {name: list(tensor.shape) for name, tensor in content.items()},
    }
    header = _storable(kind, header | dict(extra) | provenance.to_json())
    texts = {f"{kind}.safetensors": save(content), f"{kind}.json": json_text(header).encode()}
    _write_files(folder, texts)


def _storable(kind: str, header: Mapping[str, Any]) -> dict[str, Any]:
    """The header as JSON will give it back, with its digest, after the checks that loading makes."""
    try:
        check_plain(header)
        plain: dict[str, Any] = json.loads(json.dumps(header, allow_nan=False))
        Provenance.from_json(plain)
    except ValidationError as error:
        raise HonesError(
            f"the {kind} cannot be stored ({first_problem(error)}); nothing was written"
        ) from None
    except (TypeError, ValueError) as error:
        raise HonesError(f"the {kind} cannot be stored ({error}); nothing was written") from None
    return plain | {"header_digest": header_digest(plain)}


def _write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files; the last one named commits them, so an old one is removed first."""
    staged: dict[Path, Path] = {}
    *_, commit = contents
    try:
        for name, content in contents.items():
            with named_errors(folder / name):
                staged[folder / name] = stage_bytes(folder / name, content)
        (folder / commit).unlink(missing_ok=True)
        for path, temporary in staged.items():
            publish(temporary, path)
    except BaseException:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
        raise


def load_artifact(folder: Path, kind: str) -> tuple[dict[str, Any], Provenance, dict[str, Tensor]]:
    """Read an artifact that `save_artifact` wrote.

    Returns: the JSON header, the provenance, and the tensors.
    Raises: HonesError when a file is missing, damaged, changed, too large, or of another kind or version.
    """
    path = folder / f"{kind}.json"
    header = read_strict_json(path, limits.ARTIFACT_JSON_BYTES)
    if not isinstance(header, dict) or header.get("format") != f"hones-eval {kind}":
        raise HonesError(f"{path} is not a hones-eval {kind}: its 'format' says otherwise")
    version = header.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise HonesError(
            f"{folder} has {kind} format {version!r}; hones-eval {__version__} reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}: make it again, or install the version "
            f"{header.get('package_version')!r}"
        )
    try:
        provenance = Provenance.from_json(header)
    except ValidationError as error:
        raise HonesError(f"{path} does not fit its schema: {first_problem(error)}") from None
    if version > 1 and header.get("header_digest") != header_digest(header):
        raise HonesError(
            f"{path} was changed after it was written: its content does not match its digest; make it again"
        )
    if version == 1:
        _check_version_1(path, header)
    tensors = _load_tensors(folder / f"{kind}.safetensors")
    if digest(tensors) != header.get("digest"):
        raise HonesError(f"{folder}: {kind}.safetensors is not the file that {kind}.json was written with")
    return header, provenance, tensors


def _check_version_1(path: Path, header: Mapping[str, Any]) -> None:
    """Refuse a header of version 2 that calls itself version 1, and warn of what version 1 cannot promise."""
    newer = [name for name in NOT_IN_VERSION_1 if name in header]
    if newer:
        raise HonesError(
            f"{path} was changed after it was written: it says format 1, which has no {newer[0]!r}; make it "
            "again"
        )
    warnings.warn(
        f"{path} has format 1, whose digest does not cover settings, examples and image hashes: the check "
        "that discovery and test share no image relies on them; make it again to have them covered",
        stacklevel=4,
    )


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.stat().st_size > limits.ARTIFACT_TENSOR_BYTES:
            raise HonesError(f"{path} is larger than {limits.ARTIFACT_TENSOR_BYTES:,} bytes")
        tensors = load_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise HonesError(f"{path} does not exist") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise HonesError(f"{path} is not a safetensors file: {error}") from None
    except OSError as error:
        raise HonesError(f"{path}: {error.strerror or error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise HonesError(f"{path}: {name} is {tensor.dtype}; an artifact holds torch.float32")
        if not bool(torch.isfinite(tensor).all()):
            raise HonesError(f"{path}: {name} holds values that are not finite")
    return tensors
