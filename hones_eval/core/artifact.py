"""Folders that hold results: JSON for people, safetensors for numbers, written whole or not at all."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hones_eval.errors import HonesError
from hones_eval.version import __version__

FORMAT_VERSION = 1
_PLAIN_LIST = re.compile(r'\[(?:\s*(?:"[^"\\\s]*"|[-+.\w]+),?)*\s*\]')


@dataclass(frozen=True)
class ModelShape:
    """The numbers that decide whether scores and scales fit a model's language model."""

    layers: int
    heads: int
    head_width: int
    hidden: int
    neurons: int
    vocabulary: int


@dataclass(frozen=True)
class ExampleSet:
    """The examples that a result was made from: which, of what, and a hash that pins their content."""

    task: str
    split: str
    count: int
    offset: int
    hash: str
    doc_ids: list[int] = field(default_factory=list)
    image_hashes: list[str] = field(default_factory=list)

    def shared_images(self, other: "ExampleSet") -> set[str]:
        """Hashes of the pictures that both sets hold."""
        return set(self.image_hashes) & set(other.image_hashes)


@dataclass(frozen=True)
class Provenance:
    """Where an artifact came from: base model, examples, method, settings, and the ranking behind it."""

    base_model: str
    revision: str | None
    shape: ModelShape
    method: str
    settings: dict[str, Any]
    examples: list[ExampleSet]
    seed: int = 0
    ranking: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild from the JSON made by `to_json`; keys of the file that are not fields are left out."""
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        known["shape"] = _typed(ModelShape, known["shape"])
        known["examples"] = [_typed(ExampleSet, one) for one in known["examples"]]
        return _typed(cls, known)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


Kind = TypeVar("Kind")


def _typed(kind: type[Kind], content: Mapping[str, Any]) -> Kind:
    """A dataclass from JSON, which people edit. Raises: TypeError when a value has not its field's type."""
    made = kind(**content)
    for name, wanted in get_type_hints(kind).items():
        if not _is_a(wanted, getattr(made, name)):
            raise TypeError(f"{name} should be {getattr(wanted, '__name__', wanted)}")
    return made


def _is_a(wanted: Any, value: object) -> bool:
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is UnionType:
        return any(_is_a(part, value) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_is_a(parts[0], one) for one in value)
    return isinstance(value, origin or wanted)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, independent of the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def hash_of(parts: Iterable[str]) -> str:
    """SHA-256 of a sequence of strings, with their borders."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it, so that no reader meets half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: object) -> None:
    """Write indented JSON, plain lists on one line; NaN and infinity, unknown to JSON, are refused."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, _PLAIN_LIST.sub(lambda match: " ".join(match[0].split()), text) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; what is not JSON is an error that names the file and the place."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise HonesError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HonesError(f"{path} is not valid JSON: {error}") from None


def save_artifact(
    folder: Path, kind: str, provenance: Provenance, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]
) -> None:
    """Write `<kind>.safetensors` and then `<kind>.json`, which carries the digest of the tensors."""
    content = {name: tensor.detach().cpu().to(torch.float32).contiguous() for name, tensor in tensors.items()}
    for name, tensor in content.items():
        if not bool(torch.isfinite(tensor).all()):
            raise HonesError(f"{kind} tensor {name} holds values that are not finite; nothing was written")
    write_bytes(folder / f"{kind}.safetensors", save(content))
    header = {
        "format": f"hones-eval {kind}",
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "digest": digest(content),
        "tensors": {name: list(tensor.shape) for name, tensor in content.items()},
    }
    write_json(folder / f"{kind}.json", header | dict(extra) | provenance.to_json())


def load_artifact(folder: Path, kind: str) -> tuple[dict[str, Any], Provenance, dict[str, Tensor]]:
    """Read what `save_artifact` wrote.

    Returns: the JSON header, the provenance, and the tensors.
    Raises: HonesError when a file is missing, of another kind or version, or does not match its digest.
    """
    header = read_json(folder / f"{kind}.json")
    if not isinstance(header, dict) or header.get("format") != f"hones-eval {kind}":
        raise HonesError(f"{folder / f'{kind}.json'} is not a hones-eval {kind}: its 'format' says otherwise")
    if header.get("format_version") != FORMAT_VERSION:
        raise HonesError(
            f"{folder} has {kind} format {header.get('format_version')}; hones-eval {__version__} reads "
            f"{FORMAT_VERSION}: make it again, or install the version {header.get('package_version')}"
        )
    tensors = _load_tensors(folder / f"{kind}.safetensors")
    if digest(tensors) != header.get("digest"):
        raise HonesError(f"{folder}: {kind}.safetensors is not the file that {kind}.json was written with")
    try:
        provenance = Provenance.from_json(header)
    except (KeyError, TypeError) as error:
        raise HonesError(
            f"{folder / f'{kind}.json'} misses or misnames a field, or gives it another type: {error}"
        ) from None
    return header, provenance, tensors


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise HonesError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise HonesError(f"{path} is not a safetensors file: {error}") from None
