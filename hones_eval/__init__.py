"""Find the heads and neurons that carry a task in a vision-language model, and scale them."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hones_eval.anatomy import Anatomy
    from hones_eval.ranking import Ranking
    from hones_eval.steer_model import steer
    from hones_eval.steering import Steering

__version__ = "0.1.0"
__all__ = ["Anatomy", "Ranking", "Steering", "steer"]

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "model_wrappers").is_dir():
    # Running from a checkout: model_wrappers and tasks lie beside this folder, not in it.
    __path__.append(str(_root))

# Imported when they are asked for: they bring torch along, and lmms-eval imports this package
# only to learn the names of its models.
_HOMES = {"Anatomy": "anatomy", "Ranking": "ranking", "Steering": "steering", "steer": "steer_model"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
