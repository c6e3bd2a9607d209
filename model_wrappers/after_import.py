"""Patches a third-party module right after it is imported, without importing it earlier."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hones_eval.errors import HonesError


def after_import(name: str, patch: Callable[[ModuleType], None]) -> None:
    """Call `patch` with the module called `name`: now if it is imported, otherwise as soon as it is.

    Raises: HonesError while the module is being imported, when neither is possible.
    """
    module = sys.modules.get(name)
    if module is None:
        sys.meta_path.insert(0, _PatchOnImport(name, patch))
    elif not getattr(module.__spec__, "_initializing", False):
        patch(module)
    else:
        raise HonesError(f"{name} is only partly imported: import lmms_eval.models before it")


class _PatchOnImport:
    """A finder that lets the usual ones find a module, and patches it after it has run."""

    def __init__(self, name: str, patch: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._patch = patch

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_patch(module: ModuleType) -> None:
            run(module)
            self._patch(module)

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec
