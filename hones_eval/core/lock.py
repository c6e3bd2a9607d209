"""One writer per output folder: a lock that a second command is refused by."""

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import ParamSpec, TypeVar

from hones_eval.core.files import LOCK, clear_dead_files
from hones_eval.errors import HonesError
from hones_eval.notes import is_first_process

MOST_FOLDERS, DEEPEST = 10_000, 6  # looked through for dead temporary files; levels below the folder

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_held: dict[Path, int] = {}  # folders that this process has locked, and the thread that did


@contextlib.contextmanager
def only_writer(out: Path, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Hold an output folder's lock, after deleting temporary files that killed commands left in it.

    The lock is `out/.hones-eval.lock`, locked by the operating system and naming its owner. A killed owner
    loses the system's lock, so its file is recognized as stale. Of a run's several processes only the first
    takes the lock. The thread that holds a lock may take it again, as a command and the job inside it do. A
    folder that was made for the lock and stays empty is removed again.

    Raises: HonesError that names the owner, when another command writes to the folder.
    """
    if not is_first_process(environment):
        yield
        return
    place = out.resolve()
    if _held.get(place) == threading.get_ident():
        yield
        return
    made = [folder for folder in (out, *out.absolute().parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    handle = _take(out)
    _held[place] = threading.get_ident()
    try:
        clear_dead_files(place.parent, place.name)
        for folder in _folders(out):
            clear_dead_files(folder)
        yield
    finally:
        del _held[place]
        # Before the system's lock goes, so that nobody takes a dead file.
        (out / LOCK).unlink(missing_ok=True)
        os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty: there is a result
                folder.rmdir()


def writes_to_out(job: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a job hold the lock of its argument `out` while it runs; without that argument it takes none."""
    parameters = signature(job)

    @wraps(job)
    def locked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        out = parameters.bind(*args, **kwargs).arguments.get("out")
        with contextlib.nullcontext() if out is None else only_writer(Path(out)):
            return job(*args, **kwargs)

    return locked


def _take(out: Path) -> int:
    """Lock the file and write the owner into it. Returns: its descriptor, which holds the lock."""
    path = out / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = _owner(path)
            if not _is_at(handle, path):  # its owner deleted it meanwhile
                os.close(handle)
                continue
            if owner.get("host", socket.gethostname()) != socket.gethostname():
                raise BlockingIOError
        except BlockingIOError:
            os.close(handle)
            raise _refusal(out, _owner(path)) from None
        except BaseException:
            os.close(handle)
            raise
        now = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(content).encode(), 0)
        return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text()[:1000])
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(out: Path, owner: Mapping[str, object]) -> HonesError:
    host, process = owner.get("host", "another host"), owner.get("process", "unknown")
    way_out = "wait for it, or give another --out"
    if host != socket.gethostname():
        way_out += f"; if that process no longer runs, delete {out / LOCK}"
    since = owner.get("since", "an unknown time")
    return HonesError(
        f"--out {out}: process {process} on {host} has been writing here since {since}: {way_out}"
    )


def _folders(out: Path) -> Iterator[Path]:
    """The folder and those up to `DEEPEST` levels below it; a study writes four levels deep."""
    level, seen = [out], 0
    for _ in range(DEEPEST + 1):
        below = []
        for folder in level:
            seen += 1
            if seen > MOST_FOLDERS:
                return
            yield folder
            with contextlib.suppress(OSError):
                below += [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
        level = below
