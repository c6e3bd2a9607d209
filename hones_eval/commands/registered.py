"""Help texts that come from registries instead of docstrings."""

from collections.abc import Callable
from typing import Any, TypeVar

Command = TypeVar("Command", bound=Callable[..., Any])


def with_help(**texts: str) -> Callable[[Command], Command]:
    """Replace words of a command's docstring, which `--help` shows, by texts.

    Args:
        texts: the text for each word, such as METHODS.
    """

    def replaced(function: Command) -> Command:
        for word, text in texts.items():
            function.__doc__ = (function.__doc__ or "").replace(word, text)
        return function

    return replaced
