"""A report's folder appears whole or not at all, wherever the process that writes it is killed."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hones_eval.core import files
from hones_eval.core.files import LOCK, matching, staged_folder
from hones_eval.core.lock import only_writer
from hones_eval.errors import HonesError

NAMES = {"result.json", "table.csv", "parts/one.txt", "parts/two.txt"}
OPERATIONS = ("replace", "rename", "link", "unlink", "fsync", "mkdir", "rmdir")


def write(out: Path, text: str, names: set[str] = NAMES) -> None:
    """As a command does: with the lock, and files of a pattern that the result owns."""
    with (
        only_writer(out),
        staged_folder(out, last=("result.json",), stale=matching("parts/*.txt")) as folder,
    ):
        for name in sorted(names):
            files.write_text(folder / name, text)


def content(out: Path) -> dict[str, str]:
    found = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    found.pop(LOCK, None)
    return found


def killed(work: Callable[[], object], operation: int) -> bool:
    """Run in a child that dies just before its file operation of that number. Returns: whether it died."""
    child = os.fork()
    if child == 0:
        left = [operation]

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return function(*arguments, **named)

            return call

        for name in OPERATIONS:
            setattr(os, name, dying(getattr(os, name)))
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_new_folder_holds_nothing_or_everything(tmp_path: Path) -> None:
    whole = dict.fromkeys(NAMES, "new")
    seen = set()
    for operation in range(200):
        out = tmp_path / str(operation) / "out"
        died = killed(lambda: write(out, "new"), operation)  # noqa: B023
        found = content(out) if out.exists() else {}
        assert found in ({}, whole), f"killed at {operation}"
        seen.add(len(found))
        write(out, "again")
        assert content(out) == dict.fromkeys(NAMES, "again")
        left = [path.name for path in (*out.parent.iterdir(), *out.iterdir()) if path.name.startswith(".")]
        assert not left, f"killed at {operation}"
        if not died:
            break
    assert seen == {0, len(NAMES)}
    assert operation > 20, "too few operations were interrupted"


def test_a_folder_with_an_older_result_is_the_old_the_new_or_says_that_it_is_neither(tmp_path: Path) -> None:
    old = dict.fromkeys({*NAMES, "parts/three.txt"}, "old") | {"parts/notes.md": "mine"}
    new = dict.fromkeys(NAMES, "new") | {"parts/notes.md": "mine"}
    states = set()
    for operation in range(200):
        out = tmp_path / str(operation) / "out"
        for name, text in old.items():
            files.write_text(out / name, text)
        died = killed(lambda: write(out, "new"), operation)  # noqa: B023
        found = content(out)
        state = "old" if found == old else "new" if found == new else "neither"
        states.add(state)
        assert state != "neither" or "result.json" not in found, f"killed at {operation}"
        write(out, "new")
        assert content(out) == new, "parts/three.txt belongs to the older result, parts/notes.md does not"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        if not died:
            break
    assert states == {"old", "neither", "new"}


def test_every_file_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash of the machine a name must not lead to a file whose content is not on the disk."""
    events: list[tuple[str, int]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def flushed(handle: int) -> None:
        events.append(("flushed", os.fstat(handle).st_ino))
        fsync(handle)

    def named(function: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            place = Path(source)
            inside = [place] if place.is_file() else sorted(place.rglob("*"))
            events.extend(("named", path.stat().st_ino) for path in inside if path.name != LOCK)
            function(source, target)
            events.append(("done", Path(target).parent.stat().st_ino))

        return call

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named(replace))
    monkeypatch.setattr(os, "rename", named(rename))
    write(tmp_path / "out", "new")
    write(tmp_path / "out", "newer")
    flushes, names = set(), 0
    for event, inode in events:
        if event == "flushed":
            flushes.add(inode)
        if event == "named":
            names += 1
            assert inode in flushes, "a file got its name before it was flushed"
    assert names >= 3 * len(NAMES)
    last = max(place for place, (event, _) in enumerate(events) if event == "done")
    assert ("flushed", events[last][1]) in events[last:], "the folder's own list of names is flushed after it"


def test_lists_that_do_not_fit_on_a_line_cost_no_time() -> None:
    """It took a time that doubled with every digit before a text of two words: a trace never ended."""
    content = {
        "roles": ["x" * 200, *[0.12345678901234567] * 9, "other words"],
        "numbers": [[0.12345678901234567] * 50, [1e-9] * 50],
        "names": ["a", "b"],
        "empty": [],
        "quoted": ['"', "\\", "é", "]"],
    }

    def late(number: int, frame: object) -> None:
        raise TimeoutError("json_text takes too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        text = files.json_text(content)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert json.loads(text) == content
    assert '"names": [ "a", "b" ]' in text
    assert '"empty": []' in text
    assert text.count("\n") == 27


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell whose directory is replaced by another of that name would stand in a deleted one."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    before = out.stat().st_ino
    write(Path(), "new")
    assert content(out) == dict.fromkeys(NAMES, "new")
    assert out.stat().st_ino == before


@pytest.mark.parametrize("taken", [False, True])
def test_a_folder_that_cannot_be_replaced_is_filled_unless_another_command_took_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    out = tmp_path / "out"

    def fail(source: Path, target: Path) -> None:
        if taken:
            (target / LOCK).write_text("of another command")
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "rename", fail)
    if not taken:
        write(out, "new")
        assert content(out) == dict.fromkeys(NAMES, "new")
    else:
        with pytest.raises(HonesError, match="another command began to write here"):
            write(out, "new")
        assert not content(out)
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == []


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"

    def fail() -> None:
        with staged_folder(out) as folder:
            files.write_text(folder / "table.csv", "x")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert not list(tmp_path.iterdir())
