"""Lines on standard error that say what a long command is doing."""

import os
import sys
from collections.abc import Mapping

from hones_eval.errors import printable

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher's variables name this process the first of its run; alone, it is."""
    return all(environment.get(name, "0") in ("", "0") for name in _RANKS)


def note(line: str) -> None:
    """Print a line on standard error at once. Of a run's several processes only the first prints."""
    if is_first_process():
        print(printable(line), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time span in words, such as `45 s`, `12 min` or `2 h 10 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
