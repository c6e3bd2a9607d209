"""The identity of a model by the content of its weights.

A path or a hub id does not identify a model: another checkpoint can be put at the same path. So results are
tied to a digest of the tensors that actually run, adapters and quantized tensors included.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

FULL_BYTES = 2 << 30  # up to this size every byte is hashed
BLOCK, BLOCKS = 16 << 10, 16  # bytes per block; blocks per tensor in the sampled form


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
    loaded = [tensor for _, tensor in named if not tensor.is_meta]
    form = "sha256" if sum(tensor.nbytes for tensor in loaded) <= FULL_BYTES else "sampled"
    total = hashlib.sha256()
    for name, tensor in named:
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        if tensor.is_meta:
            continue
        total.update(_sampled(tensor) if form == "sampled" else _bytes(tensor))
    if len(loaded) < len(named):
        form = "partial"
    types = sorted({str(t.dtype).removeprefix("torch.") for _, t in named if t.is_floating_point()})
    return f"{form}-{'+'.join(types)}-{total.hexdigest()[:40]}"


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


def _sampled(tensor: Tensor) -> bytes:
    flat = _flat(tensor)
    if flat.numel() <= BLOCK * BLOCKS:
        return _bytes(flat)
    starts = torch.linspace(0, flat.numel() - BLOCK, BLOCKS, dtype=torch.float64).long().tolist()
    blocks = torch.cat([flat[start : start + BLOCK] for start in starts])
    return _bytes(blocks) + str(_sum_of_bits(flat)).encode()


def _sum_of_bits(flat: Tensor) -> int:
    """The sum of all 16-bit words, which every changed element changes with near certainty."""
    words = flat[: flat.numel() // 2 * 2].view(torch.int16)
    return sum(int(part.sum(dtype=torch.int64)) for part in words.split(1 << 28))
