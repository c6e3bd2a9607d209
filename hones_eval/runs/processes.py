"""Several processes at one piece of work: they end together, and none waits for one that failed."""

from torch import distributed

from hones_eval.errors import HonesError, first_line


def several() -> bool:
    """Whether this process is in a process group with others."""
    return distributed.is_available() and distributed.is_initialized()


def wait_for_others() -> None:
    """Return when every process has come here, as at the end of a command.

    Raises: HonesError when one of them has ended before.
    """
    if not several():
        return
    try:
        distributed.all_gather_object([None] * distributed.get_world_size(), None)
    except RuntimeError as error:
        raise left_alone(error) from error


def leave_others() -> None:
    """End this process's part in the process group, if there is one.

    The threads of a group that is still there when Python exits can end the process by SIGABRT.
    """
    if several():
        distributed.destroy_process_group()


def is_about_others(error: BaseException) -> bool:
    """Whether a collective failed, which is how a process learns that another has ended; gloo has no type."""
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def left_alone(error: BaseException) -> HonesError:
    """What a process says that cannot go on without another one; `error` is how it noticed."""
    if not several():
        return HonesError(
            "the processes did not meet: MASTER_ADDR and MASTER_PORT have to be the first one's, and the "
            f"port free ({first_line(error)})"
        )
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    return HonesError(f"process {rank} of {ranks} was left alone: another one ended, and says why itself")
