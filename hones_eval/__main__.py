"""The `hones-eval` command."""

import os
import re
import sys
import tempfile
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser, Namespace

from hones_eval.commands import COMMANDS, command
from hones_eval.errors import HonesError
from hones_eval.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; by default those of the process. `--debug` anywhere shows the
            trace of an error that is otherwise one line.

    Returns: 0, or 1 when the command failed, 2 when its flags cannot be read, 130 when it was interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [one for one in given if one != "--debug"]
    _calm_libraries()
    try:
        chosen = _read(given)
        arguments_of_command = chosen[chosen.subcommand].as_dict()
        arguments_of_command.pop("config")
        _check(**arguments_of_command)
        command(chosen.subcommand)(**arguments_of_command)
        if several := sys.modules.get("hones_eval.runs.processes"):
            several.wait_for_others()
    except (HonesError, ArgumentError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"hones-eval: {_in_a_line(error)}{_way_out(error, given)}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns an interrupt of a pass into an exit without a word.
        if KeyboardInterrupt not in (type(error), type(error.__context__)):
            raise
        print(f"hones-eval: interrupted{_way_on(given)}", file=sys.stderr)
        return 130
    finally:
        if several := sys.modules.get("hones_eval.runs.processes"):
            several.leave_others()
    return 0


def _read(given: Sequence[str]) -> Namespace:
    """The command and its flags. Raises: ArgumentError, or HonesError for a file of flags that is no text."""
    try:
        return _parser(given).parse_args(given)
    except UnicodeDecodeError as error:
        raise HonesError(f"the file that --config names is not UTF-8 text: {error}") from None


def _check(**arguments: Any) -> None:
    """Refuse before any work what would fail after it: a folder to write to that is none, a seed below 0."""
    if arguments.get("seed", 0) < 0:
        raise HonesError(f"--seed {arguments['seed']}: a seed is 0 or more")
    out = arguments["out"]
    there = next(one for one in (out, *out.absolute().parents) if one.exists())
    if not there.is_dir():
        raise HonesError(f"--out {out}: {there} is a file, and a folder is to be written")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise HonesError(f"--out {out}: nothing can be written in {there} ({error.strerror})") from None


def _in_a_line(error: Exception) -> str:
    """What an error says; of a flag what was given and what is expected, without the parser's reasoning."""
    said = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    for pattern in _REFUSED_FLAGS:
        if refused := re.fullmatch(pattern, said):
            wanted = re.sub(r"<class '(\w+)'>|typing\.", r"\1", refused["wanted"]).removesuffix(", NoneType")
            return f"--{refused['flag']} {refused['given'] or repr('')}: {wanted} is expected"
    return said


# How jsonargparse says that a value has none of the types of a flag.
_REFUSED_FLAGS = (
    r'Parser key "(?P<flag>\w+)": Expected a (?P<wanted>.*)\. Got value: ?(?P<given>.*)',
    r'Parser key "(?P<flag>\w+)": Does not validate .*? Subtypes: \[(?P<wanted>.*?)\] Errors: .*'
    r" Given value: ?(?P<given>.*)",
)


def _way_out(error: Exception, given: Sequence[str]) -> str:
    """Errors of ours name it themselves; for flags it is the help."""
    if not isinstance(error, ArgumentError):
        return ""
    return f" (see hones-eval {given[0]} --help)" if given and given[0] in COMMANDS else " (see --help)"


def _way_on(given: Sequence[str]) -> str:
    """What is not lost of a command that was interrupted."""
    resumable = given[:1] and given[0] in COMMANDS and "resume" in signature(command(given[0])).parameters
    return "; with --resume the same command goes on from what was measured" if resumable else ""


def _parser(given: Sequence[str]) -> ArgumentParser:
    """Flags from signatures, help from docstrings; folders need no flag, and switches no value."""
    parser = ArgumentParser(
        prog="hones-eval",
        exit_on_error=False,
        description="Find the heads and neurons that carry a task, scale them, see whether it helped.",
    )
    parser.add_argument("--version", action="version", version=f"hones-eval {__version__}")
    commands = parser.add_subcommands()
    # Only the command that is asked for is imported: most of them bring torch along.
    for name in [given[0]] if given and given[0] in COMMANDS else COMMANDS:
        function = command(name)
        description = (function.__doc__ or "").split("Args:")[0].strip()
        flags = ArgumentParser(exit_on_error=False, description=description)
        flags.add_argument("--config", action="config", help="a YAML file with values for these flags")
        bare = set()
        for parameter in signature(function).parameters.values():
            if parameter.annotation == list[Path]:
                bare.add(parameter.name)
                flags.add_argument(parameter.name, nargs="+", type=Path, help=_help(function, parameter.name))
            elif parameter.default is False:
                bare.add(parameter.name)
                flags.add_argument(
                    f"--{parameter.name}", action="store_true", help=_help(function, parameter.name)
                )
        flags.add_function_arguments(function, as_group=False, skip=bare)
        commands.add_subcommand(name, flags, help=(function.__doc__ or "").splitlines()[0])
    return parser


def _help(function: Callable[..., None], parameter: str) -> str | None:
    documented = docstring_parser.parse(function.__doc__ or "").params
    return next((one.description for one in documented if one.arg_name == parameter), None)


def _calm_libraries() -> None:
    """Start-up banners, and bars that are no terminal's, would bury the one line that matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


if __name__ == "__main__":
    sys.exit(main())
