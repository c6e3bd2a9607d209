"""Adapters of PEFT (LoRA and others): loaded onto a base model, merged into it, and named in artifacts."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hones_eval.errors import HonesError, first_line

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Adapter:
    """An adapter that was loaded onto a model: folder or hub id, and the hub's commit."""

    id: str
    revision: str | None = None


def load_adapter(model: Model, source: str, *, merge: bool = False) -> Model:
    """Load a PEFT adapter onto a model in memory, which then computes what `PeftModel` computes.

    Args:
        model: the base model. It is changed in place.
        source: the adapter's folder or hub id.
        merge: add the adapter to the weights, so that nothing of PEFT is left in the model. Needed to fold or
            export a steering. In half precision the merged weights are rounded, and so are the results.

    Returns: the model. `adapter_of` tells which adapter it has.
    Raises: HonesError when there is no adapter, when it does not fit, or when the model has one already.
    """
    from peft import PeftConfig, PeftModel

    if has_adapter(model) or adapter_of(model) is not None:
        raise HonesError(f"peft={source}: the model has an adapter already; only one is supported")
    try:
        config = PeftConfig.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise HonesError(
            f"peft={source}: no PEFT adapter there, neither as folder nor on the hub ({first_line(error)})"
        ) from None
    if getattr(config, "is_prompt_learning", False):
        raise HonesError(
            f"peft={source} is {config.peft_type.value}, which adds learned tokens to the prompt; only "
            "adapters that change layers (such as LoRA) are supported"
        )
    _warn_of_another_base(model, source, config.base_model_name_or_path)
    try:
        with warnings.catch_warnings():
            # PEFT only warns when tensors of the adapter found no place: the adapter would then not act.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, source)
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise HonesError(f"peft={source} does not fit {type(model).__name__}: {first_line(error)}") from None
    inner: Any = adapted.merge_and_unload(safe_merge=True) if merge else adapted.get_base_model()
    inner.eval()
    inner.__dict__["_hones_adapter"] = Adapter(source, _commit_of(source))
    return inner  # type: ignore[no-any-return]


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter that `load_adapter` put on a model, merged or not; None where there is none."""
    return model.__dict__.get("_hones_adapter")


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has layers of PEFT in it, whoever put them there. Merged adapters leave none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def adapter_base(source: str) -> str | None:
    """The base model that an adapter folder names; None when `source` is not an adapter folder."""
    path = Path(source) / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise HonesError(f"{path} is not valid JSON: {error}") from None
    if not base:
        raise HonesError(
            f"{path} names no base model (base_model_name_or_path): give base and peft= separately"
        )
    return str(base)


def _warn_of_another_base(model: PreTrainedModel, source: str, made_for: str | None) -> None:
    name = str(getattr(model, "name_or_path", ""))
    if made_for and name and Path(made_for).name != Path(name).name:
        warnings.warn(f"the adapter {source} was made for {made_for} and is loaded onto {name}", stacklevel=3)


def _commit_of(source: str) -> str | None:
    """The commit of an adapter from the hub, as its cached file's path tells; None for a folder."""
    if Path(source).exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "adapter_config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None
