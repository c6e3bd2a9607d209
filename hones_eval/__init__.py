"""Find the heads and neurons that carry a task in a vision-language model, and scale them.

The public names are those of `__all__`; docs/python.md shows them at work.
"""

from importlib import import_module
from inspect import isfunction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_eval.errors import naming_arguments
from hones_eval.version import __version__

if TYPE_CHECKING:
    from hones_eval.api.model import Model, load
    from hones_eval.api.model_anatomy import AnatomyReport, anatomy
    from hones_eval.api.ranking import rank
    from hones_eval.api.scaling import scale
    from hones_eval.api.verification import Verification, verify
    from hones_eval.core.anatomy import Anatomy
    from hones_eval.core.attach import steer
    from hones_eval.core.ranking import Ranking
    from hones_eval.core.steering import Steering
    from hones_eval.leaderboard import Board, make_board

__all__ = [
    "Anatomy",
    "AnatomyReport",
    "Board",
    "Model",
    "Ranking",
    "Steering",
    "Verification",
    "__version__",
    "anatomy",
    "load",
    "make_board",
    "rank",
    "scale",
    "steer",
    "verify",
]

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "model_wrappers").is_dir():
    # Running from a checkout: model_wrappers and tasks are next to this folder, not in it.
    __path__.append(str(_root))

# Imported when they are asked for: they bring torch along, and lmms-eval imports this package
# only to learn the names of its models.
_HOMES = {
    "Anatomy": "core.anatomy",
    "AnatomyReport": "api.model_anatomy",
    "Board": "leaderboard",
    "Model": "api.model",
    "Ranking": "core.ranking",
    "Steering": "core.steering",
    "Verification": "api.verification",
    "anatomy": "api.model_anatomy",
    "load": "api.model",
    "make_board": "leaderboard",
    "rank": "api.ranking",
    "scale": "api.scaling",
    "steer": "core.attach",
    "verify": "api.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return naming_arguments(found) if isfunction(found) else found
