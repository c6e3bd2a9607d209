"""Text from models and data sets, made safe to show: control characters spelled out, long texts cut."""

from typing import Any

from hones_eval.errors import printable

LONGEST = 400


def shown(value: object, longest: int = LONGEST) -> str:
    """Any value as text of bounded length, with control and direction marks spelled out, as `⟨U+202E⟩`.

    A list of one text is shown as that text. The templates escape for HTML.
    """
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    try:
        text = value if isinstance(value, str) else repr(value) if value is not None else ""
    except RecursionError:
        text = "(nested too deeply to show)"
    cut = printable(text[:longest].replace("\r\n", "\n").replace("\t", " "))
    return cut if len(text) <= longest else f"{cut} … ({len(text):,} characters)"


def shown_line(value: Any, longest: int = 2000) -> str:
    """A value as `str` gives it, of bounded length, on one line and without control characters."""
    return " ".join(shown("" if value is None else str(value), longest).split())
