"""Several processes that share one job: they end together, and none waits for one that failed."""

from torch import distributed

from hones_eval.errors import HonesError, first_line


def several() -> bool:
    """Whether this process is in a process group with others."""
    return distributed.is_available() and distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is alone, or the first of several."""
    return not several() or distributed.get_rank() == 0


def wait_for_others() -> None:
    """Return when every process has reached this point, as at the end of a command.

    Raises: HonesError when one of them has already ended.
    """
    if not several():
        return
    try:
        distributed.all_gather_object([None] * distributed.get_world_size(), None)
    except RuntimeError as error:
        raise left_alone(error) from error


def leave_others() -> None:
    """Leave the process group, if there is one.

    The threads of a group that still exists when Python exits can end the process by SIGABRT.
    """
    if several():
        distributed.destroy_process_group()


def is_about_others(error: BaseException) -> bool:
    """Whether an error is that of a failed collective, by which a process learns that another one ended.

    Failures of the gloo backend have no type of their own; their message names it.
    """
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def left_alone(error: BaseException) -> HonesError:
    """The error of a process that cannot continue because another one ended; `error` is how it noticed."""
    if not several():
        return HonesError(
            "the processes could not connect: MASTER_ADDR and MASTER_PORT have to be those of the first one, "
            f"and the port has to be free ({first_line(error)})"
        )
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    return HonesError(
        f"process {rank} of {ranks} stopped because another process ended; see that process's error. If it "
        "was killed and printed none, run the same command again, with --resume where it has that flag"
    )
