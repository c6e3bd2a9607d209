"""`--model hones --model_args base=<any lmms-eval model>,...`: makes the steered class on demand."""

from difflib import get_close_matches
from typing import Any, cast

from lmms_eval.api.model import lmms

from hones_eval.errors import HonesError

from . import registry
from .steered import Steered


class AnyBase(lmms):  # type: ignore[misc]
    """Stands for the chat wrapper that `base=` names, or the simple one where there is no chat wrapper."""

    is_simple = False

    def __new__(cls, base: str | None = None, **kwargs: Any) -> Any:
        """Build the steered form of `base`; the other keywords are those of `Steered` and of `base`."""
        if base is None:
            raise HonesError("--model hones needs base=<an lmms-eval model>, for example base=llava_hf")
        steered = steered_class(str(base), force_simple=cls.is_simple)
        registry.generic_base = str(base)
        return steered(**kwargs)


class SimpleAnyBase(AnyBase):
    """The same with `--force_simple`."""

    is_simple = True


def steered_class(base: str, *, force_simple: bool = False) -> type[Steered]:
    """The steered class of an lmms-eval model: this package's own, or else a new one.

    Raises: HonesError when lmms-eval has no such model, or cannot import it.
    """
    from lmms_eval.models import MODEL_REGISTRY_V2

    known = MODEL_REGISTRY_V2.list_model_names()
    if base not in known or base in registry.own_names():
        near = get_close_matches(base, [name for name in known if name not in registry.own_names()])
        hint = f"did you mean {' or '.join(near)}?" if near else "`lmms-eval models` lists them"
        raise HonesError(f"base={base!r} is not a model of lmms-eval: {hint}")
    own = registry.own_name_of(base)
    if own is not None:
        return cast(type[Steered], MODEL_REGISTRY_V2.get_model_class(own, force_simple=force_simple))
    try:
        stock = MODEL_REGISTRY_V2.get_model_class(base, force_simple=force_simple)
    except ImportError as error:
        raise HonesError(f"base={base!r} cannot be imported by lmms-eval: {error}") from error
    return type(f"Steered{stock.__name__}", (Steered, stock), {"base_wrapper": base})
