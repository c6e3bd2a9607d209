"""Modules whose weights accelerate keeps on disk or in another device's memory until they are called.

Between calls such a weight is a tensor on the meta device, without values. A hook of accelerate, `_hf_hook`,
loads it before the module's forward and drops it afterwards.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads a module's weights, or those of a part of it, when it is called."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on; the meta device for a model without values."""
    device = next(module.parameters()).device
    if device.type != "meta" or not is_offloaded(module):
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def in_memory(module: Module, read: Callable[[Module], Any]) -> Tensor:
    """A weight of a module, loaded for the moment where the module is offloaded.

    Args:
        module: the module that holds the weight.
        read: gives the weight of the module.
    """
    weight: Tensor = read(module)
    if not isinstance(weight, Tensor) or not weight.is_meta or not hasattr(module, "_hf_hook"):
        return weight
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return read(module).detach()  # type: ignore[no-any-return]
