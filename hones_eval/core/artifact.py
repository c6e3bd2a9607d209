"""Artifacts: folders with JSON for people and safetensors for numbers, checked when written and when read.

Format version 2. `<kind>.json` holds the header: format, versions, shapes of the tensors, the provenance, the
digest of the tensors, and `header_digest`, which covers everything else in the header. Version 1 has no
`header_digest` and is still read.
"""

import hashlib
import json
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

# Field types of the schema. They are checked by `checked`, not by the constructors.
Layers = Annotated[int, Field(strict=True, ge=1, le=limits.LAYERS)]
Heads = Annotated[int, Field(strict=True, ge=1, le=limits.HEADS)]
Width = Annotated[int, Field(strict=True, ge=1, le=limits.WIDTH)]
Integer = Annotated[int, Field(strict=True, ge=0, le=limits.INTEGER)]
Name = Annotated[str, Field(strict=True, max_length=limits.NAME)]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a language model that decide whether scores and scales fit it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layers: Layers
    heads: Heads
    head_width: Width
    hidden: Width
    neurons: Width
    vocabulary: Width


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
        return asdict(self)


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
    tensors = _load_tensors(folder / f"{kind}.safetensors")
    if digest(tensors) != header.get("digest"):
        raise HonesError(f"{folder}: {kind}.safetensors is not the file that {kind}.json was written with")
    return header, provenance, tensors


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
