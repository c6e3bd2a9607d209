"""The `hones-eval` command."""

import os
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path

import docstring_parser
from jsonargparse import ArgumentParser

from hones_eval import __version__
from hones_eval.commands import COMMANDS, command
from hones_eval.errors import HonesError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; by default those of the process. `--debug` anywhere shows the
            trace of an error that is otherwise one line.

    Returns: 0, or 1 when the command failed, or 2 when its flags cannot be read.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [one for one in given if one != "--debug"]
    _calm_libraries()
    try:
        chosen = _parser(given).parse_args(given)
        arguments_of_command = chosen[chosen.subcommand].as_dict()
        arguments_of_command.pop("config")
        command(chosen.subcommand)(**arguments_of_command)
        if several := sys.modules.get("hones_eval.processes"):
            several.wait_for_others()
    except (HonesError, ArgumentError) as error:
        if debug:
            traceback.print_exc()
        print(f"hones-eval: {' '.join(str(error).split())}{_way_out(error, given)}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    finally:
        if several := sys.modules.get("hones_eval.processes"):
            several.leave_others()
    return 0


def _way_out(error: Exception, given: Sequence[str]) -> str:
    """Errors of ours name it themselves; for flags it is the help."""
    if isinstance(error, HonesError):
        return ""
    return f" (see hones-eval {given[0]} --help)" if given and given[0] in COMMANDS else " (see --help)"


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
