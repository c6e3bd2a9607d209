"""Files that are written whole or not at all, and JSON from outside that is read within limits."""

import contextlib
import json
import math
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hones_eval import limits
from hones_eval.errors import HonesError

LOCK = ".hones-eval.lock"  # of a folder that a command writes to: see core/lock.py

# A list without spaces in its strings and without lists in it. The quantifiers are possessive (`++`): a list
# that does not match costs one look at it, and not one per way to cut its words into pieces.
_ITEM = r'(?:"[^"\\\s]*+"|[-+.\w]++)'
_PLAIN_LIST = re.compile(rf"\[\s*+(?:{_ITEM}(?:,\s*+{_ITEM})*+)?+\s*+\]")
# .<name>.<host>-<pid>-<random>.tmp: the owner can be told from the name alone.
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^/]+)-(?P<pid>\d+)-\w+\.tmp")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it.

    No reader ever sees half a file, also after a crash of the machine.

    Raises: OSError that names the file, e.g. when the disk is full; nothing is left then.
    """
    with named_errors(path):
        temporary = stage_bytes(path, content)
        publish(temporary, path)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON, plain lists on one line. Raises: ValueError for NaN and infinity."""
    write_text(path, json_text(content))


def json_text(content: object) -> str:
    """Indented JSON with plain lists on one line. Raises: ValueError for NaN and infinity."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return _PLAIN_LIST.sub(lambda match: " ".join(match[0].split()), text) + "\n"


def stage_bytes(path: Path, content: bytes) -> Path:
    """Write `content` beside `path` under a temporary name, and flush it to disk.

    Returns: the temporary file, for `publish`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(path.name), suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Rename a staged file to its final name; if that fails, delete it."""
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, where the file system supports that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def temporary_prefix(name: str) -> str:
    """How the temporary names of a file or folder begin: its name, this host and this process."""
    return f".{name[:100]}.{socket.gethostname()}-{os.getpid()}-"


def clear_dead_files(folder: Path, name: str = "") -> list[Path]:
    """Delete temporary files and folders that killed processes of this host left in a folder.

    Those of living processes and of other hosts stay, and so do all files with other names.

    Args:
        folder: where to look.
        name: delete only temporary forms of this name; by default of every name.

    Returns: the deleted paths.
    """
    deleted = []
    start = f".{name[:100]}." if name else "."
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.name.startswith(start):
            continue
        owner = _TEMPORARY.fullmatch(path.name)
        if owner is None or owner["host"] != socket.gethostname() or is_alive(int(owner["pid"])):
            continue
        if path.is_dir() and not path.is_symlink():
            _delete_folder(path)
        else:
            path.unlink(missing_ok=True)
        deleted.append(path)
    return deleted


def _delete_folder(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this host is running. A zombie, which has ended, counts as dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    except OverflowError:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")


def nothing_stale(folder: Path) -> Iterable[Path]:
    """The default of `staged_folder`: no file of an earlier run has to go."""
    return ()


def matching(*patterns: str) -> Callable[[Path], Iterable[Path]]:
    """For `staged_folder`: the files of a folder that match one of these glob patterns."""

    def found(folder: Path) -> Iterable[Path]:
        return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]

    return found


@contextlib.contextmanager
def staged_folder(
    out: Path,
    last: Sequence[str] = (),
    stale: Callable[[Path], Iterable[Path]] = nothing_stale,
) -> Iterator[Path]:
    """A temporary folder whose files get to `out` when all of them are written and flushed to disk.

    A new `out` appears whole, by one rename. In a folder that already holds files, those named by `last` are
    deleted first and renamed last: a folder without them holds no result.

    Args:
        out: the final folder; it may exist.
        last: names of the files without which nothing is loaded or read.
        stale: the files of an earlier result in `out`; those that are not written again are deleted.

    Raises: OSError that names `out` when writing fails, e.g. on a full disk; nothing is left then.
    """
    out = out.resolve()
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    beside = os.access(out.parent, os.W_OK) and out.parent.stat().st_dev == out.stat().st_dev
    home = out.parent if beside else out
    clear_dead_files(home)
    with named_errors(out):
        prefix = temporary_prefix(out.name)
        temporary = Path(tempfile.mkdtemp(dir=home, prefix=prefix, suffix=".tmp"))
    try:
        with named_errors(out):
            yield temporary
            for path in sorted(temporary.rglob("*")):
                _flush(path)
            if not (beside and _appear(temporary, out)):
                _move_files(temporary, out, last, stale)
            sync_folder(out.parent)
    except BaseException:
        _delete_folder(temporary)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    _delete_folder(temporary)


def _appear(temporary: Path, out: Path) -> bool:
    """Give the temporary folder the name `out`, which so far holds nothing but a lock.

    The lock's file is linked into the folder first, so that it is held all the time.

    Returns: whether that was possible. It is not when `out` holds files, is the working directory, or is on
        a file system without hard links.
    """
    held = [path.name for path in out.iterdir()]
    if out == Path.cwd() or any(name != LOCK for name in held):
        return False
    temporary.chmod(out.stat().st_mode & 0o777)
    try:
        for name in held:
            os.link(out / name, temporary / name)
            (out / name).unlink()
        os.rename(temporary, out)  # replaces an empty folder, and no other
    except OSError:
        _put_back(held, temporary, out)
        return False
    return True


def _put_back(names: Sequence[str], temporary: Path, out: Path) -> None:
    """Undo the links of `_appear`.

    Raises: HonesError when another command has taken the lock in the moment in which it had no name.
    """
    for name in names:
        if not (temporary / name).exists():
            continue
        with contextlib.suppress(FileExistsError):
            os.link(temporary / name, out / name)
        if not (temporary / name).samefile(out / name):
            raise HonesError(f"--out {out}: another command began to write here; nothing was written")
        (temporary / name).unlink()


def _move_files(
    temporary: Path, out: Path, last: Sequence[str], stale: Callable[[Path], Iterable[Path]]
) -> None:
    """Move files one by one into a folder that holds others; see `staged_folder`."""
    names = [path.relative_to(temporary) for path in sorted(temporary.rglob("*")) if path.is_file()]
    names.sort(key=lambda name: str(name) in last)
    for final in last:
        (out / final).unlink(missing_ok=True)
    for old in stale(out):
        if old.relative_to(out) not in names:
            old.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are in its folder
                old.parent.rmdir()
    folders = sorted({(out / name).parent for name in names})
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.replace(temporary / name, out / name)
    for folder in folders:
        sync_folder(folder)


def _flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Give an OSError that names no file, or the file that was copied, the name `path`.

    So an error of a full disk names what could not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or error.filename2 is not None):
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises: HonesError that names the file and the position of the mistake."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise HonesError(f"{path} does not exist") from None
    except RecursionError:
        raise HonesError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise HonesError(f"{path} is not valid JSON: {error}") from None


def is_regular(path: Path) -> bool:
    """Whether a path leads to a regular file. Paths that the system cannot hold lead to none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def exists(path: str | Path) -> bool:
    """Whether a path leads to a file or folder. Paths that the system cannot hold lead to none."""
    return os.path.exists(path)  # `Path.exists` raises for a name that is too long


def read_bounded(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes. Raises: HonesError that names the file."""
    try:
        if not path.is_file():
            raise HonesError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # a read of `most` bytes would reserve them all
            content = b"" if size > most else file.read(size + 1)
    except ValueError as error:  # a null byte in the path
        raise HonesError(f"{str(path)!r} is not a path: {error}") from None
    except OSError as error:
        raise HonesError(f"{path}: {error.strerror}") from None
    if max(size, len(content)) > most:
        raise HonesError(f"{path} is larger than {most:,} bytes, the most that is read of such a file")
    return content


def read_strict_json(path: Path, most: int) -> Any:
    """Read a JSON file from outside.

    Stricter than `read_json`: at most `most` bytes, no repeated keys, no NaN or infinity, no unpaired
    surrogates, and at most `limits.JSON_DEPTH` levels.

    Raises: HonesError that names the file and says what is wrong.
    """
    content = read_bounded(path, most)
    try:
        parsed = json.loads(
            content.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_not_a_number
        )
        check_plain(parsed)
    except RecursionError:
        raise HonesError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise HonesError(f"{path} is not valid JSON: {error}") from None
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:100]!r} is repeated")
    return made


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def check_plain(content: object) -> None:
    """Check that content is plain JSON that can be written and read back.

    Raises: ValueError for NaN, infinity, unpaired surrogates, other types, and too many levels.
    """
    level: list[object] = [content]
    for _ in range(limits.JSON_DEPTH + 1):
        deeper: list[object] = []
        for value in level:
            if isinstance(value, dict):
                deeper += value.keys()
                deeper += value.values()
            elif isinstance(value, list | tuple):
                deeper += value
            else:
                _check_leaf(value)
        if not deeper:
            return
        level = deeper
    raise ValueError(f"it is nested more than {limits.JSON_DEPTH} levels deep")


def _check_leaf(value: object) -> None:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("it holds an unpaired surrogate, which is not text") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("it holds a number that is not finite")
    elif value is not None and not isinstance(value, bool | int):
        raise ValueError(f"it holds a value of type {type(value).__name__}, which JSON does not have")


def check_folder(name: str, value: Any) -> None:
    """Refuse a path of a folder that does not exist; anything else may be a hub id."""
    text = str(value or "")
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1 or text.endswith("/")
    if is_path and not Path(text).expanduser().exists():
        raise HonesError(f"{name}={text}: no such folder")
