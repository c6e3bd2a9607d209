"""Flags that name several tasks."""

from collections.abc import Mapping, Sequence

from hones_eval.errors import HonesError


def names_in(given: str, flag: str) -> list[str]:
    """The tasks of a flag that takes several, a,b,c. Raises: HonesError when one is empty or named twice."""
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise HonesError(f"--{flag} {given!r}: a name is empty; give tasks as a,b,c")
    if len(set(names)) < len(names):
        raise HonesError(f"--{flag} {given}: a task is named twice")
    return names


def limits_of(
    names: Sequence[str], limit: int | None, limits: Mapping[str, int] | None, flag: str
) -> dict[str, int | None]:
    """The limit of every task: its own, or that of all. Raises: HonesError for a task that is not run."""
    own = limits or {}
    unknown = [name for name in own if name not in names]
    if unknown:
        raise HonesError(f"--{flag} names {unknown[0]}, which is not one of --tasks {','.join(names)}")
    return {name: own.get(name, limit) for name in names}
