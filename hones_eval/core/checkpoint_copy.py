"""Steered weights as a copy of a checkpoint: every file as it is, except what scales and shifts change.

Loading a model and saving it again renames tensors, may change their type, and needs the model in memory. A
copy keeps names, index, types, configuration and processor byte for byte, so that whatever reads the original
(a serving engine, another version of transformers) reads the copy. It takes the time of copying the files.
"""

import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import warn_of_rounding
from hones_eval.core.changes import site_changes
from hones_eval.core.export import no_stored_bias
from hones_eval.core.folding import with_shifts
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError, first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights in other formats beside the safetensors files would be unsteered copies of the model.
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", ".npz"}


class CannotCopyError(Exception):
    """A checkpoint whose tensors are not plainly the model's own: it has to be loaded and saved instead."""


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint; one from the hub is downloaded, or found in the hub's cache."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision))


class _Stored(NamedTuple):
    """Where a tensor is stored: the file, the first byte, and how to read it."""

    file: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, as copies in another format do."""
    return any(path.suffix in _OTHER_WEIGHTS for path in folder.rglob("*"))


def copy_scaled(source: Path, empty: PreTrainedModel, steering: Steering, folder: Path) -> None:
    """Copy the checkpoint `source` into `folder`, with scales in its weights and shifts in its biases.

    Args:
        source: a folder with safetensors weights and everything beside them.
        empty: the checkpoint's model on the meta device.
        steering: what to fold in.
        folder: where to copy to; it exists and is empty.

    Raises:
        CannotCopyError: with the reason, when a steered weight is not stored as a tensor of its own.
        HonesError: when the weights are quantized, or a shifted layer has no bias.
    """
    _refuse_quantized(empty)
    used = _files(source)
    stored = {name: tensor for file in used for name, tensor in _header(source / file)}
    names = _checkpoint_names(empty, list(stored))
    changes = []
    for name, shape, scales, shifts in _columns(empty, steering):
        weight = _find(f"{name}.weight", shape, names, stored)
        bias = None if shifts is None else _find(f"{name}.bias", shape[:1], names, stored)
        changes.append(_Change(weight, scales, bias, shifts))
    for dtype in {change.weight.dtype for change in changes}:
        warn_of_rounding(steering, dtype)
    for path in sorted(source.iterdir()):
        if path.is_file() and (path.name in used or path.suffix not in _OTHER_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and not path.name.startswith(".") and not _has_weights(path):
            shutil.copytree(path, folder / path.name)  # a second tokenizer, as InstructBLIP has
    for change in changes:
        if change.bias is not None and change.shifts is not None:  # by the weight as it is before its scales
            written = _written(folder / change.weight.file, change.weight, change.shifts)
            _add(folder / change.bias.file, change.bias, written)
        _multiply(folder / change.weight.file, change.weight, change.scales)


class _Change(NamedTuple):
    """A stored weight with the scales of its columns, and where there are shifts the layer's bias."""

    weight: _Stored
    scales: Tensor
    bias: _Stored | None
    shifts: Tensor | None


def _refuse_quantized(empty: PreTrainedModel) -> None:
    settings: Any = getattr(empty.config, "quantization_config", None)
    if settings is not None:
        kind = settings.get("quant_method") if isinstance(settings, Mapping) else type(settings).__name__
        raise HonesError(
            f"the weights are quantized ({kind}), so the model cannot be exported with the steering in them: "
            "export the unquantized base model, or use the steering with attach=hook"
        )


def _columns(
    empty: PreTrainedModel, steering: Steering
) -> Iterator[tuple[str, tuple[int, ...], Tensor, Tensor | None]]:
    """The name and the weight's shape of each layer that changes, with a scale and a shift per column."""
    anatomy = Anatomy.of(empty)
    steering.check_fits(anatomy.shape, type(empty).__name__)
    names = {module: name for name, module in empty.named_modules()}
    for site, scales, shifts in site_changes(anatomy, steering):
        module = site.module
        if module not in names or not isinstance(module, nn.Linear):
            raise CannotCopyError(f"{site.name} is not a linear layer of its own")
        if shifts is not None and module.bias is None:
            raise HonesError(no_stored_bias(site.name))
        yield names[module], tuple(module.weight.shape), scales, shifts


def _files(source: Path) -> list[str]:
    """The safetensors files of the checkpoint."""
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    if (source / SINGLE).is_file():
        return [SINGLE]
    raise CannotCopyError("there are no safetensors weights")


def _header(path: Path) -> Iterator[tuple[str, _Stored]]:
    """The floating-point tensors of a file, by their stored names."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, size)))
            ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise HonesError(f"{path} is not a safetensors file: {first_line(error)}") from None
    if 8 + length + max(ends, default=0) != size:
        raise HonesError(f"{path} is damaged: its header describes another size than its {size:,} bytes")
    for name, about in header.items():
        if name != "__metadata__" and about["dtype"] in _TYPES:
            start = 8 + length + about["data_offsets"][0]
            yield name, _Stored(path.name, start, _TYPES[about["dtype"]], tuple(about["shape"]))


def _checkpoint_names(empty: PreTrainedModel, stored: list[str]) -> dict[str, list[str]]:
    """The stored names of each parameter, by transformers' own rules for loading the checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(empty)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    parameters = empty.state_dict()
    found: dict[str, list[str]] = {}
    for name in stored:
        target, converted = rename_source_key(
            name, renamings, converters, empty.base_model_prefix, parameters
        )
        # A converted tensor (stacked, split, transposed) is not the parameter: it gets no name here.
        if converted is None:
            found.setdefault(target, []).append(name)
    return found


def _find(
    name: str, shape: tuple[int, ...], names: dict[str, list[str]], stored: dict[str, _Stored]
) -> _Stored:
    candidates = names.get(name, [])
    if len(candidates) != 1:
        raise CannotCopyError(f"{len(candidates)} tensors of the checkpoint are {name}")
    tensor = stored[candidates[0]]
    if tensor.shape != shape:
        raise CannotCopyError(f"{candidates[0]} has the shape {tensor.shape}, and {name} has {shape}")
    return tensor


def _multiply(path: Path, tensor: _Stored, scales: Tensor) -> None:
    """Multiply columns of a stored matrix in its file; only their bytes are written."""
    columns = torch.nonzero(scales != 1).flatten()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        rows, width = tensor.shape
        weight = torch.frombuffer(
            memory, dtype=tensor.dtype, count=rows * width, offset=tensor.start
        ).reshape(rows, width)
        weight[:, columns] = (weight[:, columns].float() * scales[columns].float()).to(tensor.dtype)
        del weight  # the map can only be closed when nothing uses it
        memory.flush()


def _written(path: Path, tensor: _Stored, shifts: Tensor) -> Tensor:
    """What shifts [in features] of the input of a stored weight write [out features], in float32."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        rows, width = tensor.shape
        weight = torch.frombuffer(
            memory, dtype=tensor.dtype, count=rows * width, offset=tensor.start
        ).reshape(rows, width)
        columns = torch.nonzero(shifts).flatten()
        written = with_shifts(weight[:, columns].float(), None, shifts[columns])
        del weight
        return written


def _add(path: Path, tensor: _Stored, numbers: Tensor) -> None:
    """Add numbers to a stored vector in its file."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        bias = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.shape[0], offset=tensor.start)
        bias.copy_((bias.float() + numbers).to(tensor.dtype))
        del bias
        memory.flush()
