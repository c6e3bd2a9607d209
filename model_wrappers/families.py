"""The steered classes of families that need no code of their own, made from their rows in the registry.

`hones_eval.model_wrappers.families.llava_chat` is the steered class of lmms-eval's chat wrapper of the family
`llava`. It is made when the attribute is first read, so that only the wrapper in use is imported.
"""

from importlib import import_module
from typing import Any

from .registry import FAMILIES
from .steered import Steered


def __getattr__(name: str) -> type[Steered]:
    """Make the class `<family>_<form>`. Raises: AttributeError when the registry has no such form."""
    family_name, _, form = name.rpartition("_")
    family = FAMILIES.get(family_name)
    path = None if family is None or form not in ("simple", "chat") else getattr(family, form)
    if family is None or path is None:
        raise AttributeError(f"{__name__} has no steered class {name!r}")
    module, _, stock = path.rpartition(".")
    settings: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"Steered `{family.base}`.",
        "base_wrapper": family.base,
        "own_likelihoods": family.own_likelihoods,
    }
    made = type(name, (Steered, getattr(import_module(module), stock)), settings)
    globals()[name] = made
    return made
