"""The texts of `--help`, made from the signatures and docstrings of the commands."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from hones_eval.commands import ARTIFACTS, BY_PLACE, COMMANDS, command

# Flags that most commands share, by the heading under which they are shown.
GROUPS = {
    "Model": ("model", "model_args", "peft", "pretrained", "dtype"),
    "Task and examples": (
        *("tasks", "include_path", "limit", "limits", "test_limit", "test_limits", "offset"),
        *("gen_kwargs", "metric", "target"),
    ),
    "Speed and devices": ("batch_size", "devices", "num_nodes", "workers"),
    "Run": ("seed", "resume"),
}
OWN = "What is computed"

# Flags that every command has, and the one that only commands with an artifact have.
EVERY = {
    "config": ("FILE", "a YAML file with values for these flags; flags on the command line win"),
    "json": (None, "print the answer as JSON on standard output; everything else goes to standard error"),
    "debug": (None, "show the full trace of an error that is otherwise one line"),
    "help": (None, "show this text"),
}
OVERWRITE = "replace what an earlier run left in --out, which is otherwise refused"


def program_help() -> str:
    """The text of `hones-eval --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: hones-eval COMMAND [flags]",
        "",
        "Find the heads and neurons that carry a task in a vision-language model, scale them, and test",
        "whether that helped.",
        "",
        "Commands:",
        *(f"  {name:{width}}  {_first_line(command(name))}" for name in COMMANDS),
        "",
        "Flags:",
        f"  {'--version':{width}}  print the version",
        f"  {'--help':{width}}  show this text; hones-eval COMMAND --help shows the flags of a command",
        "",
        "Start here:",
        "  hones-eval demo --out demo        the whole job on the bundled model, in a few minutes",
        "  hones-eval rank --help            how to find heads and neurons of your own model",
    ]
    return "\n".join(lines)


def command_help(name: str) -> str:
    """The text of `hones-eval COMMAND --help`: usage, examples, then the flags in groups."""
    function = command(name)
    parameters = dict(inspect.signature(function).parameters)
    about, described, examples = sections(function)
    required = [key for key, one in parameters.items() if one.default is one.empty]
    by_place = BY_PLACE.get(name, ())
    usage = " ".join(
        key.upper() if key in by_place else _usage(key, parameters[key].annotation) for key in required
    )
    groups: dict[str, list[str]] = {"Required": required}
    for heading, names in {OWN: _own(parameters), **GROUPS}.items():
        groups[heading] = [key for key in names if key in parameters and key not in required]
    lines = [f"usage: hones-eval {name} {usage} [flags]".replace("  ", " "), "", about]
    if examples:
        lines += ["", "Examples:", *(f"  {line}" for line in examples)]
    for heading, names in groups.items():
        if names:
            lines += ["", f"{heading}:"]
            for key in names:
                if key in by_place:
                    lines += _entry(key.upper(), described.get(key, ""))
                else:
                    lines += _flag(parameters[key], described.get(key, ""))
    lines += ["", "Every command:"]
    if name in ARTIFACTS:
        lines += _entry("--overwrite", OVERWRITE)
    for key, (value, text) in EVERY.items():
        lines += _entry(f"--{key} {value}" if value else f"--{key}", text)
    return "\n".join(lines)


def sections(function: Callable[..., Any]) -> tuple[str, dict[str, str], list[str]]:
    """A command's docstring: what it does, the text of each flag, and its example lines."""
    text = inspect.cleandoc(function.__doc__ or "")
    about, _, rest = text.partition("\nArgs:\n")
    arguments, _, examples = rest.partition("\nExample:\n")
    found = re.split(r"^    (\w+): ", arguments, flags=re.MULTILINE)[1:]
    described = {name: " ".join(words.split()) for name, words in zip(found[::2], found[1::2], strict=True)}
    return about.strip(), described, textwrap.dedent(examples).strip().splitlines()


def placeholder(annotation: Any) -> str | None:
    """How the value of a flag is shown in help and errors, as in `--limit N`; None for a switch."""
    if annotation is bool:
        return "true|false"
    parts = [one for one in get_args(annotation) if one is not NoneType]
    if get_origin(annotation) is Literal:
        return "NAME"
    if get_origin(annotation) is list:
        return f"[{placeholder(parts[0])},...]"
    if get_origin(annotation) is dict:
        return '{"NAME": N}'
    if parts:
        return "|".join(
            str(get_args(one)[0]) if _is_one_word(one) else str(placeholder(one)) for one in parts
        )
    return {int: "N", float: "X", Path: "PATH"}.get(annotation, "TEXT")


def choices(annotation: Any) -> list[str]:
    """The values that a flag takes where they are a list of names, else nothing."""
    if get_origin(annotation) is Literal:
        return [str(one) for one in get_args(annotation)]
    return [name for part in get_args(annotation) for name in choices(part)]


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def _is_one_word(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _own(parameters: dict[str, inspect.Parameter]) -> list[str]:
    shared = {name for names in GROUPS.values() for name in names}
    return [name for name in parameters if name not in shared]


def _usage(name: str, annotation: Any) -> str:
    if annotation == list[Path]:
        return f"{name.upper().removesuffix('S')}..."
    return f"--{name} {placeholder(annotation)}"


def _flag(parameter: inspect.Parameter, text: str) -> list[str]:
    kind = parameter.annotation
    if kind == list[Path] and parameter.default is parameter.empty:
        return _entry(_usage(parameter.name, kind), text)
    if parameter.default is False:
        return _entry(f"--{parameter.name}", text)
    names = choices(kind)
    if len(names) > 1:
        text = f"{text.rstrip('.')}. One of: {', '.join(names)}."
    if parameter.default not in (parameter.empty, None, ""):
        shown = str(parameter.default).lower() if isinstance(parameter.default, bool) else parameter.default
        text = f"{text} [default: {shown}]"
    return _entry(f"--{parameter.name} {placeholder(kind)}", text)


def _entry(flag: str, text: str) -> list[str]:
    """A flag and its text, wrapped to the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110) - 2
    lines = list(_wrapped(text, width - 24))
    if len(flag) > 22:
        return [f"  {flag}", *(f"{'':26}{line}" for line in lines)]
    return [f"  {flag:24}{lines[0] if lines else ''}", *(f"{'':26}{line}" for line in lines[1:])]


def _wrapped(text: str, width: int) -> Iterator[str]:
    yield from textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
