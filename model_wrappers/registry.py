"""The models that this package adds to lmms-eval: their names and bases, and the state of the current run."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .run_manifest import RunRecord


class Family(NamedTuple):
    """One model of this package: the lmms-eval model that it steers, and the wrapper classes.

    A class of lmms-eval becomes a steered class in `families`, so that a family is one row here. A class of
    this package is used as it is.
    """

    base: str
    """lmms-eval's name of the model, whose prompts it receives."""
    simple: str | None = None
    """Path of the wrapper class for lmms-eval's simple requests; None where there is none."""
    chat: str | None = None
    """Path of the wrapper class for chats; None where there is none."""
    own_likelihoods: bool = True
    """Whether the wrapper's log-likelihoods work; where it has none, this does not matter."""


def _stock(base: str, name: str, *, own_likelihoods: bool = True) -> Family:
    """A family whose wrapper classes in lmms-eval's two forms have one name."""
    simple, chat = (f"lmms_eval.models.{form}.{base}.{name}" for form in ("simple", "chat"))
    return Family(base, simple, chat, own_likelihoods)


FAMILIES = {
    "llava": _stock("llava_hf", "LlavaHf", own_likelihoods=False),  # they fail on transformers 5
    "qwen2_5_vl": _stock("qwen2_5_vl", "Qwen2_5_VL"),
    "qwen3_vl": _stock("qwen3_vl", "Qwen3_VL"),
    "instructblip": Family("instructblip", f"{__package__}.instructblip.InstructBlip"),
    "hf": Family("hones_hf", f"{__package__}.hf.SimpleHf", f"{__package__}.hf.Hf"),
}
GENERIC = ("hones", "vseam")
BASES = {f"{method}_{name}": family.base for method in GENERIC for name, family in FAMILIES.items()}

generic_base: str | None = None
"""The last value of `base=`: models are built before their tasks are loaded."""
wanted_settings: dict[str, Any] = {}
"""The generation settings that the user of the current run gave."""
latest_record: "RunRecord | None" = None
"""The record of the last steered model that was built."""


def class_path(name: str, form: str) -> str | None:
    """Path of a family's steered class for `simple` or `chat` requests; None where there is none."""
    path: str | None = getattr(FAMILIES[name], form)
    if path is None or path.startswith(f"{__package__}."):
        return path
    return f"{__package__}.families.{name}_{form}"


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
