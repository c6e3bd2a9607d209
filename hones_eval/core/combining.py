"""Names of several steerings at once, as in `steering=a:0.5+b`."""

from typing import NamedTuple

from hones_eval.core.files import exists
from hones_eval.errors import HonesError


class Part(NamedTuple):
    """One of several steerings: where it is, and its strength."""

    path: str
    strength: float


def parts_of(text: str) -> list[Part]:
    """The parts of `a:0.5+b`: folders or hub ids, each with a strength after a colon (by default 1).

    A text that names an existing folder is that folder, whatever it contains.

    Raises: HonesError for a part without a path.
    """
    if exists(text):
        return [Part(text, 1.0)]
    found = []
    for part in text.split("+"):
        path, colon, strength = part.strip().rpartition(":")
        if not colon or not _is_number(strength):
            path, strength = part.strip(), "1"
        if not path:
            raise HonesError(f"steering={text}: a part has no folder: write FOLDER:STRENGTH+FOLDER:STRENGTH")
        found.append(Part(path, float(strength)))
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
