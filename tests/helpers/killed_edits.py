"""Run `hones-eval edit`, killing it in the middle of its writes. Usage:

    python killed_edits.py STEP edit --questions ... --out ...

The first run is killed before its first file gets its name, the next STEP files later, and so on, until one
ends well. Prints how many were killed.
"""

import os
import signal
import sys

from hones_eval.__main__ import main


def killed(arguments: list[str], at: int) -> bool:
    """Whether a run in a process of its own was killed before its `at`-th file got its name."""
    child = os.fork()
    if child == 0:
        replace, left = os.replace, iter(range(1, at))

        def counted(source: str, target: str) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = counted  # type: ignore[assignment]
        os._exit(main(arguments))
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"a run ended with the wait status {status}")
    return status == signal.SIGKILL


if __name__ == "__main__":
    step, kills = int(sys.argv[1]), 0
    while killed(sys.argv[2:], kills * step + 1):
        kills += 1
    print(kills)
