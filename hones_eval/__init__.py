"""Find the heads and neurons that carry a task in a vision-language model, and scale them."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_eval.version import __version__

if TYPE_CHECKING:
    from hones_eval.core.anatomy import Anatomy
    from hones_eval.core.attach import steer
    from hones_eval.core.ranking import Ranking
    from hones_eval.core.steering import Steering

__all__ = ["Anatomy", "Ranking", "Steering", "__version__", "steer"]

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "model_wrappers").is_dir():
    # Running from a checkout: model_wrappers and tasks lie beside this folder, not in it.
    __path__.append(str(_root))

# Imported when they are asked for: they bring torch along, and lmms-eval imports this package
# only to learn the names of its models.
_HOMES = {
    "Anatomy": "core.anatomy",
    "Ranking": "core.ranking",
    "Steering": "core.steering",
    "steer": "core.attach",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
