"""Whole jobs as functions, for notebooks and for the commands: load, rank, scale, verify.

`import hones_eval as he` gives the same names; see docs/python.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hones_eval.api.model import Model, load
    from hones_eval.api.model_anatomy import AnatomyReport, anatomy
    from hones_eval.api.ranking import rank
    from hones_eval.api.scaling import scale
    from hones_eval.api.verification import Verification, verify

__all__ = ["AnatomyReport", "Model", "Verification", "anatomy", "load", "rank", "scale", "verify"]

# Imported when they are asked for: scaling by a given factor needs no lmms-eval and no Lightning.
_MODULES = {
    "AnatomyReport": "model_anatomy",
    "Model": "model",
    "anatomy": "model_anatomy",
    "load": "model",
    "rank": "ranking",
    "scale": "scaling",
    "Verification": "verification",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
