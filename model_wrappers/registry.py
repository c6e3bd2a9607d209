"""The models that this package adds to lmms-eval: their names and bases, and the state of the current run."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .run_manifest import RunRecord


class Family(NamedTuple):
    """One model of this package: the lmms-eval wrapper that it steers, and its classes.

    The classes are in the module of the family's name.
    """

    base: str
    simple: str
    chat: str | None = None


FAMILIES = {
    "llava": Family("llava_hf", "SimpleLlava", "Llava"),
    "qwen2_5_vl": Family("qwen2_5_vl", "SimpleQwen", "Qwen"),
    "instructblip": Family("instructblip", "InstructBlip"),
    "hf": Family("hones_hf", "SimpleHf", "Hf"),
}
GENERIC = ("hones", "vseam")
BASES = {f"{method}_{name}": family.base for method in GENERIC for name, family in FAMILIES.items()}

generic_base: str | None = None
"""The last value of `base=`: models are built before their tasks are loaded."""
latest_record: "RunRecord | None" = None
"""The record of the last steered model that was built."""


def own_names() -> set[str]:
    """Every model name that this plug-in adds to lmms-eval."""
    return {*BASES, *GENERIC}


def own_name_of(base: str) -> str | None:
    """The name of this package's model for a base wrapper; None where there is none."""
    return next((name for name, known in BASES.items() if known == base), None)


def base_name(model: Any) -> Any:
    """The name whose prompts a model receives: a steered model's base, and any other model's own."""
    if isinstance(model, str):
        return BASES.get(model, generic_base if model in GENERIC and generic_base else model)
    return _base_of(model) or model


def is_ours(model: Any) -> bool:
    """Whether a model is one of this package, or a name that can only be meant for one."""
    if isinstance(model, str):
        return re.split("[-_]", model)[0] in GENERIC
    return _base_of(model) is not None


def _base_of(model: Any) -> str | None:
    """The base of a steered model. Its class is asked, as a mock of a model has every attribute."""
    base = getattr(type(model), "base_wrapper", None)
    return base if isinstance(base, str) else None
