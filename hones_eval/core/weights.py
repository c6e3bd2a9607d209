"""The identity of a model by the content of its weights.

A path or a hub id does not identify a model: another checkpoint can be put at the same path. So results are
tied to a digest of the tensors that actually run, adapters and quantized tensors included.

Reading every byte of a large model takes seconds to minutes, so a digest is kept twice: in memory as long as
no tensor was changed, and, for models of `KEPT_BYTES` and more, in a file of the user's cache folder. A key
there is made of the paths, sizes and times of the checkpoint's files and of a sample of the tensors in
memory. Only a model that was just loaded takes its digest from there.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hones_eval.core.kept import KeptResults

FULL_BYTES = 2 << 30  # up to this size every byte is hashed
KEPT_BYTES = 256 << 20  # from this size on a digest is kept in the cache folder
KEPT = KeptResults("weights.json")
cache_file = KEPT.path
BLOCK, BLOCKS = 16 << 10, 16  # bytes per block; blocks per tensor in the sampled form
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")

_written = [0]
"""How often this package has written to weights in a way that PyTorch does not count."""
_known: "WeakKeyDictionary[nn.Module, tuple[object, str]]" = WeakKeyDictionary()


def weights_digest(model: nn.Module) -> str:
    """A digest of a model's parameters and buffers, such as `sha256-bfloat16-5f3c...`.

    Models of up to 2 GiB are hashed byte for byte (`sha256`). Larger ones take a cheaper form (`sampled`): 16
    evenly spaced blocks of 16 KiB per tensor are hashed, and a sum over the bits of all elements, computed on
    the tensor's device. `partial` marks a model with tensors that are not loaded (on the meta device). The
    second part names the floating-point types: the same checkpoint in another type has another digest.

    Args:
        model: the model as it runs, before a steering is folded into its weights.
    """
    named = sorted(_tensors(model))
    sample = _hashed(named, "blocks")
    state = (sample, _versions(named), _written[0])
    if model in _known and _known[model][0] == state:
        return _known[model][1]
    size = sum(tensor.nbytes for _, tensor in named if not tensor.is_meta)
    # Later digests of a model are of what was changed in memory since it was loaded.
    files = _files(model) if size >= KEPT_BYTES and model not in _known else []
    key = _key(files, sample) if files else ""
    kept = KEPT.get(key) if key else None
    found = kept if isinstance(kept, str) else _digest(named, size)
    if key:
        KEPT.keep(key, found)
    _known[model] = (state, found)
    return found


def weights_written() -> None:
    """Tell that weights are written to through `.data`, which changes no version of a tensor."""
    _written[0] += 1


def _digest(named: Sequence[tuple[str, Tensor]], size: int) -> str:
    """The digest of tensors of `size` bytes, from their content."""
    form = "sha256" if size <= FULL_BYTES else "sampled"
    total = _hashed(named, form)
    if any(tensor.is_meta for _, tensor in named):
        form = "partial"
    types = sorted({str(t.dtype).removeprefix("torch.") for _, t in named if t.is_floating_point()})
    return f"{form}-{'+'.join(types)}-{total[:40]}"


def _hashed(named: Sequence[tuple[str, Tensor]], form: str) -> str:
    """SHA-256 over names, types, shapes and, by the form, all bytes, some with a sum, or some bytes alone."""
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        if tensor.is_meta:
            continue
        if form == "sha256":
            total.update(_bytes(tensor))
        else:
            total.update(_sampled(tensor, with_sum=form == "sampled"))
    return total.hexdigest()


def _versions(named: Sequence[tuple[str, Tensor]]) -> object:
    """The places of tensors in memory and how often they were written to; unequal to itself if unknown."""
    try:
        return tuple((tensor.data_ptr(), tensor._version) for _, tensor in named if not tensor.is_meta)
    except RuntimeError:  # tensors made in inference mode do not count
        return float("nan")


def _files(model: nn.Module) -> list[Path]:
    """The checkpoint's files of a model from a folder or from the hub's cache; empty where unknown."""
    source = str(getattr(model, "name_or_path", "") or "")
    folder = Path(source)
    if source and not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        commit = getattr(getattr(model, "config", None), "_commit_hash", None)
        with contextlib.suppress(ValueError):  # not the form of a hub id
            cached = try_to_load_from_cache(source, "config.json", revision=commit)
            folder = Path(cached).parent if isinstance(cached, str) else folder
    if not source or not folder.is_dir():
        return []
    return sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))


def _key(files: Sequence[Path], sample: str) -> str:
    parts: list[Any] = [sample]
    for path in files:
        stat = path.stat()
        parts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the state, with tensor subclasses (quantized ones) as their parts."""
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            yield from _parts(name.replace("_orig_mod.", ""), value.detach())


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    inner, _ = tensor.__tensor_flatten__()
    for part in inner:
        yield from _parts(f"{name}.{part}", getattr(tensor, part).detach())


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return _flat(tensor).cpu().numpy().tobytes()


def _sampled(tensor: Tensor, with_sum: bool) -> bytes:
    flat = _flat(tensor)
    if flat.numel() <= BLOCK * BLOCKS:
        return _bytes(flat)
    starts = torch.linspace(0, flat.numel() - BLOCK, BLOCKS, dtype=torch.float64).long().tolist()
    blocks = torch.cat([flat[start : start + BLOCK] for start in starts])
    return _bytes(blocks) + (str(_sum_of_bits(flat)).encode() if with_sum else b"")


def _sum_of_bits(flat: Tensor) -> int:
    """The sum of all 16-bit words, which every changed element changes with near certainty."""
    words = flat[: flat.numel() // 2 * 2].view(torch.int16)
    return sum(int(part.sum(dtype=torch.int64)) for part in words.split(1 << 28))
