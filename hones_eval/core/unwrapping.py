"""The Hugging Face model inside of what users hold: compiled modules, data parallel wrappers, PEFT models."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hones_eval.errors import UnsupportedModelError

# The attribute under which each wrapper keeps its module: torch.compile, and DataParallel and its relatives.
_HOLDERS = ("_orig_mod", "module")


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside a wrapper, or the model itself.

    `torch.compile(model)`, `DataParallel`, `DistributedDataParallel` and `PeftModel` are unwrapped. They
    call the inner model, so hooks and folded scales on the inner model also act through them.

    Raises: UnsupportedModelError when there is no Hugging Face model inside, or when the wrapper is a PEFT
    method that learns prompts: its effect is not in the weights of the inner model.
    """
    inner = held_model(model)
    if inner is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Hugging Face PreTrainedModel and holds none: give the "
            "model that `from_pretrained` returned, or DataParallel, torch.compile or PeftModel of it"
        )
    return inner


def held_model(value: object) -> PreTrainedModel | None:
    """The Hugging Face model that a value is or wraps, as `unwrapped` finds it; None where there is none."""
    inner: Any = value
    while not isinstance(inner, PreTrainedModel):
        if not isinstance(inner, nn.Module):
            return None
        if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            adapted: Any = inner
            _refuse_prompt_learning(adapted)
            inner = adapted.get_base_model()
            continue
        inner = next((held for name in _HOLDERS if (held := getattr(inner, name, None)) is not None), None)
    return inner


def _refuse_prompt_learning(model: Any) -> None:
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"adapter {name!r} is {config.peft_type.value}, which adds learned tokens to the prompt; "
                "only adapters that change layers (such as LoRA) are supported"
            )
