"""Adapters of PEFT (LoRA and others): loaded onto a base model, merged into it, and named in artifacts."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hones_eval.core.files import check_folder, exists, is_regular
from hones_eval.core.hub import split_revision
from hones_eval.errors import HonesError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


@dataclass(frozen=True)
class Adapter:
    """An adapter that was loaded onto a model: folder or hub id, and the hub's commit."""

    id: str
    revision: str | None = None


class ModelSource(TypedDict):
    """Where a model in memory was loaded from; the fields of that name in `Provenance`."""

    base_model: str
    revision: str | None
    adapter: str | None
    adapter_revision: str | None


def model_source(model: "PreTrainedModel") -> ModelSource:
    """The folder or hub id of a model and of its adapter, with their commits where they are from the hub.

    Both may be local folders; then there is no commit, and the digest of the weights identifies them.
    """
    adapter = adapter_of(model)
    return {
        "base_model": str(getattr(model, "name_or_path", "") or type(model).__name__),
        "revision": getattr(model.config, "_commit_hash", None),
        "adapter": None if adapter is None else adapter.id,
        "adapter_revision": None if adapter is None else adapter.revision,
    }


def load_adapter(model: Model, source: str, *, revision: str | None = None, merge: bool = False) -> Model:
    """Load a PEFT adapter onto a model in memory, which then computes what `PeftModel` computes.

    Args:
        model: the base model. It is changed in place.
        source: the adapter's folder or hub id. `org/name@revision` names a revision too.
        revision: a branch, tag or commit of the hub repository.
        merge: add the adapter to the weights, so that nothing of PEFT is left in the model. Needed to fold or
            export a steering. In half precision the merged weights are rounded, and so are the results.

    Returns: the model. `adapter_of` tells which adapter it has.
    Raises: HonesError when there is no adapter, when it does not fit, or when the model has one already.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    check_folder("peft", source)
    if revision is None and not exists(source):
        source, revision = split_revision(source)
    if has_adapter(model) or adapter_of(model) is not None:
        raise HonesError(f"peft={source}: the model has an adapter already; only one is supported")
    try:
        config = PeftConfig.from_pretrained(source, revision=revision)
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
            adapted = PeftModel.from_pretrained(model, source, revision=revision)
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise HonesError(f"peft={source} does not fit {type(model).__name__}: {first_line(error)}") from None
    saved = len(load_peft_weights(source, revision=revision))
    placed = len(get_peft_model_state_dict(adapted))
    if saved > placed:
        raise HonesError(
            f"peft={source} does not fit: {saved - placed} of its {saved} tensors have no place in "
            f"{type(model).__name__}"
        )
    inner: Any = adapted.merge_and_unload(safe_merge=True) if merge else adapted.get_base_model()
    inner.eval()
    name_adapter(inner, source, revision)
    return inner  # type: ignore[no-any-return]


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter that `load_adapter` put on a model, merged or not; None where there is none."""
    return model.__dict__.get("_hones_adapter")


def without_adapter(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a wrapper, where an adapter folder as `pretrained` is split into base model and `peft`."""
    pretrained = arguments.get("pretrained")
    base = None if pretrained is None else adapter_base(str(pretrained))
    if base is None:
        return dict(arguments)
    if arguments.get("peft") is not None:
        raise HonesError(f"pretrained={pretrained} and peft= are two adapters; only one is supported")
    return {**arguments, "pretrained": base, "peft": str(pretrained)}


def apply_adapter(
    model: "PreTrainedModel", peft: str | None, pretrained: object = None, *, merge: bool = False
) -> None:
    """Load the adapter that a user named by `peft=`, or by an adapter folder in the place of `pretrained=`.

    Args:
        model: the model that a wrapper has loaded; changed in place.
        peft: the adapter's folder or hub id; None for none.
        pretrained: the folder or hub id that the model was loaded from. Where it is that of an adapter on the
            hub, transformers has loaded the base model with the adapter already; it is only named here.
        merge: as in `load_adapter`.
    """
    if peft is not None and not str(peft).strip():
        raise HonesError("peft= is empty: give an adapter's folder or hub id, or leave it out")
    if peft is None and pretrained is not None and has_adapter(model):
        name_adapter(model, str(pretrained))
    if peft is not None:
        load_adapter(model, str(peft), merge=merge)


def name_adapter(model: "PreTrainedModel", source: str, revision: str | None = None) -> None:
    """Record the folder or hub id of the adapter that is on a model, for `adapter_of`."""
    model.__dict__["_hones_adapter"] = Adapter(source, _commit_of(source, revision))


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has layers of PEFT in it, whoever put them there. Merged adapters leave none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def adapter_base(source: str) -> str | None:
    """The base model that an adapter folder names; None when `source` is not an adapter folder."""
    path = Path(source) / "adapter_config.json"
    if not is_regular(path) or is_regular(Path(source) / "config.json"):
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


def _warn_of_another_base(model: "PreTrainedModel", source: str, made_for: str | None) -> None:
    name = str(getattr(model, "name_or_path", ""))
    if made_for and name and Path(made_for).name != Path(name).name:
        warnings.warn(f"the adapter {source} was made for {made_for} and is loaded onto {name}", stacklevel=3)


_EFFECTIVE: "WeakKeyDictionary[nn.Module, tuple[object, Tensor]]" = WeakKeyDictionary()


def effective_weight(module: nn.Module, width: int) -> Tensor:
    """The matrix [out features, width] by which a linear layer with an adapter multiplies its input.

    The layer's `weight` is that of the base model alone. The matrix is found by calling the layer on the
    columns of the identity, which holds for every kind of adapter, and is kept until a parameter changes.
    """
    parameters = list(module.parameters())
    state = (
        tuple((id(p), p._version) for p in parameters),
        tuple(getattr(module, "active_adapters", ())),
        tuple(getattr(module, "merged_adapters", ())),
        getattr(module, "disable_adapters", None),
    )
    known = _EFFECTIVE.get(module)
    if known is not None and known[0] == state:
        return known[1]
    like = next(p for p in parameters if p.is_floating_point())
    with torch.no_grad():  # `forward`, not a call: the hooks of a steering or a recorder are not part of it
        offset = module.forward(like.new_zeros(1, width))
        weight: Tensor = (module.forward(torch.eye(width, dtype=like.dtype, device=like.device)) - offset).T
    _EFFECTIVE[module] = (state, weight)
    return weight


def _commit_of(source: str, revision: str | None) -> str | None:
    """The commit of an adapter from the hub, as its cached file's path tells; None for a folder."""
    if exists(source):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "adapter_config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None
