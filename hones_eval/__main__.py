"""The `hones-eval` command."""

import os
import sys
import traceback
from collections.abc import Sequence

import jsonargparse

from hones_eval.errors import HonesError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; by default those of the process. `--debug` anywhere shows the
            trace of an error that is otherwise one line.

    Returns: 0, or 1 when the command failed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    _calm_libraries()
    from hones_eval.commands import COMMANDS  # after the libraries have been told to be quiet

    try:
        jsonargparse.auto_cli(
            COMMANDS,
            args=[one for one in given if one != "--debug"],
            prog="hones-eval",
            as_positional=False,
            description=__doc__,
        )
    except HonesError as error:
        if debug:
            traceback.print_exc()
        print(f"hones-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _calm_libraries() -> None:
    """Thread pools that fight over tokenizers, and start-up banners, help nobody who runs a command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")


if __name__ == "__main__":
    sys.exit(main())
