"""The commands of `hones-eval`: each a function whose signature is its flags and whose docstring its help."""

from collections.abc import Callable
from importlib import import_module

# One module a command, imported only when it is asked for: most of them bring torch along.
COMMANDS = (
    "demo",
    "rank",
    "scale",
    "verify",
    "compare",
    "study",
    "trace",
    "lens",
    "edit",
    "leaderboard",
    "export",
)


def command(name: str) -> Callable[..., None]:
    """The function behind a command's name."""
    function: Callable[..., None] = getattr(import_module(f"hones_eval.commands.{name}"), name)
    return function
