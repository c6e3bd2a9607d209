"""The errors that a user can correct. The command line prints them as one line."""

import re
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


class HonesError(Exception):
    """A request of the user cannot be met; the message says what was wrong, where, and the way out."""


class UsageError(HonesError):
    """The flags of a command cannot be read."""


class UnsupportedModelError(HonesError):
    """This package does not support the model's anatomy; the message says why."""


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


def naming_arguments(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """A function whose errors name its arguments as Python does: `heads`, where the command says `--heads`.

    The commands and the Python API share their checks, whose messages name flags.
    """
    flags = re.compile(rf"--({'|'.join(signature(function).parameters)})\b")

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        try:
            return function(*args, **kwargs)
        except HonesError as error:
            error.args = (flags.sub(r"\1", str(error)),)
            raise

    return call


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """An error message on one line, of at most 400 characters and an ellipsis."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."
