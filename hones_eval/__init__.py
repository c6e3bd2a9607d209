"""Find the heads and neurons that carry a task in a vision-language model, and scale them."""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "model_wrappers").is_dir():
    # Running from a checkout: model_wrappers and tasks lie beside this folder, not in it.
    __path__.append(str(_root))
