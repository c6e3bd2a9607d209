"""The models that this package gives to lmms-eval: their names, what they steer, and the run at hand."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .run_manifest import RunRecord


class Family(NamedTuple):
    """A model of ours: the wrapper of lmms-eval that it steers, and its classes in the module of its name."""

    base: str
    simple: str
    chat: str | None = None


FAMILIES = {
    "llava": Family("llava_hf", "SimpleLlava", "Llava"),
    "qwen2_5_vl": Family("qwen2_5_vl", "SimpleQwen", "Qwen"),
    "instructblip": Family("instructblip", "InstructBlip"),
    "hf": Family("hones_hf", "SimpleHf", "Hf"),
}
BASES = {f"{method}_{name}": one.base for method in ("hones", "vseam") for name, one in FAMILIES.items()}
GENERIC = ("hones", "vseam")

generic_base: str | None = None
"""What `base=` named last: models are built before their tasks are loaded."""
latest_record: "RunRecord | None" = None
"""The record of the steered model that was built last."""


def own_names() -> set[str]:
    """Every name that this plug-in gives to lmms-eval."""
    return {*BASES, *GENERIC}


def own_name_of(base: str) -> str | None:
    """The name of our own class for a base wrapper, where we have one."""
    return next((name for name, known in BASES.items() if known == base), None)


def base_name(model: Any) -> Any:
    """The name whose prompts a model is to see: a steered model's base, and any other model's own."""
    if isinstance(model, str):
        return BASES.get(model, generic_base if model in GENERIC and generic_base else model)
    return _base_of(model) or model


def is_ours(model: Any) -> bool:
    """A name of ours, or one that can only be meant for one of ours."""
    if isinstance(model, str):
        return re.split("[-_]", model)[0] in GENERIC
    return _base_of(model) is not None


def _base_of(model: Any) -> str | None:
    """The base of a steered model, asked of its class: a mock of a model has whatever it is asked for."""
    base = getattr(type(model), "base_wrapper", None)
    return base if isinstance(base, str) else None
