"""The `hones-eval` command."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence

import jsonargparse

from hones_eval.commands import COMMANDS, command
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
    given = [one for one in given if one != "--debug"]
    _calm_libraries()
    names = [given[0]] if given and given[0] in COMMANDS else COMMANDS
    try:
        jsonargparse.auto_cli(
            {name: command(name) for name in names},
            args=given,
            prog="hones-eval",
            as_positional=False,
            description="Find the heads and neurons that carry a task, scale them, see whether it helped.",
        )
    except HonesError as error:
        if debug:
            traceback.print_exc()
        print(f"hones-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _calm_libraries() -> None:
    """Start-up banners, and bars that are no terminal's, would bury the one line that matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


if __name__ == "__main__":
    sys.exit(main())
