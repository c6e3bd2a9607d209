"""The commands of `hones-eval`: each a function whose signature is its flags and whose docstring its help.

A command's module imports only what its signature needs. Whatever brings torch, Lightning or lmms-eval is
imported by the function when it runs, so that `--help` and refused flags take no time.
"""

from collections.abc import Callable
from importlib import import_module

from hones_eval.commands.answer import Answer

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
    "spike-in",
    "power",
    "task-new",
    "anatomy",
    "edit-sites",
    "condition",
    "push",
    "pull",
    "smol-build",
)


# Commands that are written as two words.
TWO_WORDS = {"task-new": "task new", "smol-build": "smol build"}

# The files that a finished run of a command leaves in --out, at least one of them. An --out that holds one is
# refused unless --overwrite (or the command's own --resume) is given. Commands that are missing here may be
# run again on the same folder: `study` and `edit` continue, and refuse other settings themselves;
# `leaderboard` rebuilds its page from logs.
ARTIFACTS = {
    "demo": ("ranking/ranking.json",),
    "rank": ("ranking.json",),
    "scale": ("steering.json",),
    "verify": ("verify.json",),
    "compare": ("compare.json",),
    "trace": ("trace.json",),
    "lens": ("lens.json",),
    "spike-in": ("spike_in.json",),
    "power": ("power.json",),
    "condition": ("condition.json",),
    "pull": ("steering.json",),
    "edit-sites": ("steering.json",),
    "export": ("config.json", "adapter_config.json"),
}


# Arguments that are given by their place, without a flag.
BY_PLACE = {"push": ("folder", "repository"), "pull": ("repository", "out")}

# Commands whose result gets a page, index.html in --out. A board is a page itself.
PAGED = ("rank", "scale", "verify", "compare", "trace", "lens", "study", "spike-in", "edit")


def command(name: str) -> Callable[..., Answer | None]:
    """The function of a command; the module and the function of `edit-sites` are called `edit_sites`."""
    word = name.replace("-", "_")
    function: Callable[..., Answer | None] = getattr(import_module(f"hones_eval.commands.{word}"), word)
    return function
