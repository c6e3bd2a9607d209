"""The errors that a user can mend. The command line prints them as one line."""

import re


class HonesError(Exception):
    """Something the user asked for cannot be done; the message says what, where, and the way out."""


class UsageError(HonesError):
    """The flags of a command cannot be read."""


class UnsupportedModelError(HonesError):
    """The model's anatomy is one that this package does not serve, and the message names why."""


class MisfitError(HonesError):
    """A ranking or steering was made for a model of another shape."""


class EditError(HonesError):
    """An edit or a recorder did not run, or met a tensor of another shape than it was made for."""


class TaskError(HonesError):
    """An lmms-eval task cannot be used for discovery as it stands."""


# Marks that change the direction of the text around them, and so can make a text misleading.
_DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_UNSEEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff{_DIRECTION}\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with control characters, direction marks and surrogates spelled out, as `⟨U+202E⟩`.

    Text from files must not reach a terminal or a page otherwise. Line breaks and tabs stay.
    """
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", text)


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """What an error says, on one line of bearable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."
