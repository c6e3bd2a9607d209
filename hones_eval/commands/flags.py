"""Reading a command line: which command, its flags and their values, and one clear line when one is wrong."""

import inspect
import re
from argparse import ArgumentError
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from hones_eval.commands import ARTIFACTS, BY_PLACE, COMMANDS, TWO_WORDS, command
from hones_eval.commands.help_texts import choices, placeholder, sections
from hones_eval.errors import UsageError

SWITCHES = ("json", "debug")


class Call(NamedTuple):
    """A command line that was understood."""

    name: str
    arguments: dict[str, Any]
    overwrite: bool


def read(given: Sequence[str]) -> Call:
    """Turn the words after `hones-eval` into a command and its arguments.

    Args:
        given: the words, without `--json` and `--debug`.

    Raises: UsageError when there is no such command or flag, a value is of the wrong kind or a flag is
        missing; HonesError when the file of `--config` cannot be read.
    """
    name = _command_name(given)
    words = list(given[1:])
    _refuse_unknown_flags(name, words)
    overwrite = "--overwrite" in words
    words = _appended(name, [word for word in words if word != "--overwrite"])
    try:
        chosen = parser_of(name).parse_args(words).as_dict()
    except ArgumentError as error:
        raise UsageError(_explained(name, error)) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the file that --config names is not UTF-8 text: {error}") from None
    chosen.pop("config")
    return Call(name, chosen, overwrite)


def _appended(name: str, words: Sequence[str]) -> list[str]:
    """The same words, where each use of a flag for a list of texts adds one text to it.

    `--set A --set B` becomes jsonargparse's `--set+ A --set+ B`; `--set "[A,B]"` is a whole list.
    """
    parameters = inspect.signature(command(name)).parameters.values()
    flags = {f"--{p.name}" for p in parameters if p.annotation in (list[str], list[str] | None)}
    found = list[str]()
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in flags and not (value if equals else "".join(words[place + 1 : place + 2])).startswith("["):
            word = f"{flag}+{equals}{value}"
        found.append(word)
    return found


def parser_of(name: str) -> Any:
    """A jsonargparse parser of a command: folders need no flag, and switches no value."""
    from jsonargparse import ArgumentParser  # only where something is parsed: --help does without

    function = command(name)
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    bare = set()
    qualified = function.__qualname__
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in BY_PLACE.get(name, ()):
            bare.add(parameter.name)
            parser.add_argument(parameter.name, type=parameter.annotation)
        elif parameter.annotation == list[Path] and parameter.default is parameter.empty:
            bare.add(parameter.name)
            parser.add_argument(parameter.name, nargs="+", type=Path)
        elif parameter.default is False:
            bare.add(parameter.name)
            parser.add_argument(f"--{parameter.name}", action="store_true")
    # jsonargparse looks for the function by its name in every parent module, where `hones_eval.rank` and
    # its like import torch when they are looked up.
    function.__qualname__ = f"{qualified} command"
    try:
        parser.add_function_arguments(function, as_group=False, skip=bare)
    finally:
        function.__qualname__ = qualified
    return parser


def _command_name(given: Sequence[str]) -> str:
    if not given:
        raise UsageError(f"a subcommand is missing: give one of {', '.join(COMMANDS)}")
    name = given[0]
    if name in COMMANDS:
        return name
    if name.startswith("-"):
        raise UsageError(f"{name} is not a flag of hones-eval itself: give the command first, then its flags")
    shown = [TWO_WORDS.get(known, known) for known in COMMANDS]
    two = " ".join(given[:2])
    typed = two if any(known.partition(" ")[0] == name for known in shown) else name
    raise UsageError(f"there is no command {typed!r}: {_nearest(typed, shown)}")


def _refuse_unknown_flags(name: str, words: Sequence[str]) -> None:
    """Name the nearest flag for one that the command does not have."""
    known = [*inspect.signature(command(name)).parameters, "config"]
    known += ["overwrite"] if name in ARTIFACTS else []
    for word in words:
        if not re.match(r"--[A-Za-z]", word):
            continue
        flag = word[2:].partition("=")[0]
        # jsonargparse's own notations: `--limits.TASK N` sets one key, `--factors+ X` adds to a list.
        if flag.partition(".")[0].removesuffix("+") not in known:
            shown = [f"--{one}" for one in known]
            raise UsageError(f"{name} has no flag --{flag}: {_nearest('--' + flag.replace('-', '_'), shown)}")


def _nearest(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _explained(name: str, error: Exception) -> str:
    """What is wrong with the flags, in one line without the parser's own reasoning."""
    text = " ".join(str(error).split())
    if missing := re.search(r"arguments are required: (.*)", text):
        return _missing(name, missing[1].split(", "))
    for pattern in _WRONG_VALUES:
        if found := re.fullmatch(pattern, text):
            return _wrong_value(name, found["flag"], found["given"])
    if found := re.fullmatch(r"argument (?P<flag>--\w+): expected one argument", text):
        return f"{found['flag']} is given without a value"
    if found := re.fullmatch(r'(?:Parser key "config": )?File does not exist: (?P<file>.*)', text):
        return f"--config {found['file']}: there is no such file"
    if found := re.fullmatch(r"unrecognized arguments: (?P<words>.*)", text):
        return f"{name} does not know what to do with: {found['words']}"
    return text


# How jsonargparse says that a value does not fit the type of a flag.
_WRONG_VALUES = (
    r'Parser key "(?P<flag>\w+)": Expected a .*\. Got value: ?(?P<given>.*)',
    r'Parser key "(?P<flag>\w+)": Does not validate .* Given value: ?(?P<given>.*)',
)


def _missing(name: str, flags: Sequence[str]) -> str:
    function = command(name)
    described = sections(function)[1]
    shown = []
    for flag in flags:
        kind = inspect.signature(function).parameters[flag].annotation
        own = flag.upper() if kind == list[Path] or flag in BY_PLACE.get(name, ()) else f"--{flag}"
        text = described.get(flag, "").split(";")[0].split(". ")[0].rstrip(".")
        names = choices(kind)
        shown.append(f"{own} ({f'one of {chr(44).join(names)}'.replace(',', ', ') if names else text})")
    return f"missing: {'; '.join(shown)}"


def _wrong_value(name: str, flag: str, given: str) -> str:
    kind = inspect.signature(command(name)).parameters[flag].annotation
    names = choices(kind)
    if len(names) > 1:
        near = get_close_matches(given, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"--{flag} {given or repr('')}: {hint}choose one of {', '.join(names)}"
    return f"--{flag} {given or repr('')}: {_kind(kind)} is expected"


def _kind(annotation: Any) -> str:
    """A type in words."""
    words = {"[X,...]": "a list of numbers, [0.5,1.5],", "[NAME,...]": "a list of names, [a,b],"}
    words |= {"N": "a whole number", "X": "a number", "PATH": "a path", "true|false": "true or false"}
    shown = str(placeholder(annotation))
    return (
        " or ".join(words.get(part, part) for part in shown.split("|"))
        if shown not in words
        else words[shown]
    )
