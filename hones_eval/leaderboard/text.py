"""Text of boards: answers, cells of tables, numbers and file names."""

import math
import re
import unicodedata
from pathlib import Path

from hones_eval.pages.text import LONGEST, shown

__all__ = [
    "LONGEST",
    "cell",
    "number",
    "one_line",
    "path_name",
    "plain_cell",
    "probability",
    "shown",
    "shown_answer",
    "slug",
]


def shown_answer(value: object) -> str:
    """An answer as `shown`; for choices, the one with the smallest value and the values of all."""
    if not isinstance(value, list) or len(value) < 2 or not all(map(_is_choice, value)):
        return shown(value)
    values = [float(choice[0]) for choice in value]
    return f"choice {values.index(min(values)) + 1} of {', '.join(format(logit, '.4g') for logit in values)}"


def _is_choice(value: object) -> bool:
    """Whether this is a pair of a log-likelihood and whether it is greedy, as lmms-eval writes them."""
    if not isinstance(value, list) or len(value) != 2 or str(value[1]) not in ("True", "False"):
        return False
    try:
        float(value[0])
    except (TypeError, ValueError):
        return False
    return True


def one_line(value: object, longest: int = 120) -> str:
    """As `shown`, on one line."""
    return " ".join(shown(value, longest).split())


def cell(value: object) -> str:
    """A value as the content of a Markdown table's cell; no Markdown or HTML in it takes effect."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~&])", r"\\\1", one_line(value))


def plain_cell(value: object) -> str:
    """A text for CSV that no spreadsheet treats as a formula."""
    text = one_line(value, 500)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def number(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """A number for tables: fixed digits, a true minus sign, and an empty text if there is no number."""
    if value is None or not math.isfinite(value):
        return ""
    places = digits if abs(value) < 10 else 2
    text = f"{value:+.{places}f}" if sign else f"{value:.{places}f}"
    if float(text) == 0:
        text = f"{0:.{places}f}"
    return text.replace("-", "−")


def probability(value: float | None) -> str:
    """A p-value for tables."""
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def slug(text: str) -> str:
    """A short file name out of any text."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", ascii_text).strip("-").lower()[:60] or "run"


def path_name(path: Path) -> str:
    """A file's folder and name, which is the same on every machine."""
    return f"{path.parent.name}/{path.name}"
