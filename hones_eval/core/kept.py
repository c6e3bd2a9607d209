"""Results that later runs need not compute again, in a file of the user's cache folder.

Nothing depends on such a file: where it is missing, damaged or cannot be written, results are computed again.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from hones_eval.core.files import read_strict_json, write_json
from hones_eval.errors import HonesError

MOST, MOST_BYTES = 500, 1 << 20
"""The number of results in a file, and its size, at most."""


class KeptResults:
    """Plain JSON values by key; the oldest make room for new ones."""

    def __init__(self, name: str) -> None:
        """Keep them in the file `name` of the cache folder."""
        self.name = name

    def path(self) -> Path:
        """The file, which need not exist. `XDG_CACHE_HOME` may be set at any time."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "hones-eval" / self.name

    def get(self, key: str) -> Any | None:
        """The value of a key; None where it is not known."""
        return self._all().get(key)

    def keep(self, key: str, value: Any) -> None:
        """Add a value, where the folder can be written to."""
        known = self._all()
        if key in known and known[key] == value:
            return
        with contextlib.suppress(OSError):
            write_json(self.path(), dict([*known.items(), (key, value)][-MOST:]))

    def _all(self) -> dict[str, Any]:
        try:
            content = read_strict_json(self.path(), MOST_BYTES)
        except HonesError:
            return {}
        return content if isinstance(content, dict) else {}
