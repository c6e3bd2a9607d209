"""Resumable progress of a pass over examples: a killed run continues from its last checkpoint."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hones_eval.core.artifact import write_bytes
from hones_eval.errors import HonesError

SECONDS = 20.0


class _Stop:
    """Whether a pass with a checkpoint is running, and whether it was asked to stop."""

    running = False
    requested = False
    stopped = False


def stop_after_example() -> bool:
    """Ask the running pass to save its progress after the current example, and then to stop.

    Returns: False when no such pass is running or it was asked before; then the caller has to stop by itself.
    """
    if _Stop.requested or not _Stop.running:
        return False
    _Stop.requested = True
    return True


def stopped_on_request() -> bool:
    """Whether the last pass of this process saved its progress and stopped because it was asked to."""
    return _Stop.stopped


class Progress(NamedTuple):
    """The first `done` examples of a rank's share: their sums, and their records by example."""

    done: int
    sums: dict[str, Tensor]
    records: dict[int, Any]


@dataclass
class Partial:
    """The folder with the checkpoints of one run: one file per pass and rank, each written whole.

    `fingerprint` identifies the model, the examples and the settings: a checkpoint of others is refused.
    A checkpoint is written after an example when the last one is `SECONDS` old, because the sums of neurons
    can be large.
    """

    folder: Path
    fingerprint: str
    resume: bool
    _written: float = 0.0

    def load(self, name: str, rank: int, ranks: int) -> Progress | None:
        """The progress of a pass that a killed run left; None without one, or when `resume` is off.

        Raises: HonesError when it was made with another model, examples or settings, or cannot be read.
        """
        self._written = time.monotonic()
        _Stop.running, _Stop.requested, _Stop.stopped = True, False, False
        path = self._path(name, rank, ranks)
        return self._read(path) if self.resume and path.is_file() else None

    def load_others(self, name: str, rank: int, ranks: int) -> dict[str, Progress]:
        """The progress of a pass that a killed run with another number of processes left, by file name.

        Raises: HonesError as `load` does.
        """
        if not self.resume or not self.folder.is_dir():
            return {}
        own = re.compile(re.escape(_stem(name)) + r"-\d+-of-(\d+)\.safetensors")
        found = {path: own.fullmatch(path.name) for path in sorted(self.folder.iterdir())}
        return {path.name: self._read(path) for path, of in found.items() if of and int(of[1]) != ranks}

    def _read(self, path: Path) -> Progress:
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                sums = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise HonesError(f"{path} cannot be read ({error}): run without --resume") from None
        if about["fingerprint"] != self.fingerprint:
            raise HonesError(
                f"{path} was measured with another model, other examples, settings or versions: "
                "repeat the earlier command, or run without --resume"
            )
        return Progress(about["done"], sums, {int(index): one for index, one in about["records"].items()})

    def save(self, name: str, rank: int, ranks: int, progress: Progress, last: bool) -> None:
        """Write a checkpoint if the last one is old enough, and always after a rank's last example.

        Raises: KeyboardInterrupt, after writing, when `stop_after_example` was called.
        """
        if last:
            _Stop.running = False
        if not last and not _Stop.requested and time.monotonic() - self._written < SECONDS:
            return
        about = {"fingerprint": self.fingerprint, "done": progress.done, "records": progress.records}
        tensors = {key: value.detach().cpu().contiguous() for key, value in progress.sums.items()}
        write_bytes(self._path(name, rank, ranks), save(tensors, metadata=_metadata(about)))
        self._written = time.monotonic()
        if _Stop.requested:
            _Stop.running, _Stop.requested, _Stop.stopped = False, False, True
            raise KeyboardInterrupt

    def clear(self) -> None:
        """Remove the folder after a successful run. Files that do not belong to it stay."""
        # A kill in the middle of a write leaves the file under its temporary name, which starts with a dot.
        for pattern in ("*.safetensors", ".*.safetensors.*"):
            for path in sorted(self.folder.glob(pattern)):
                path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, name: str, rank: int, ranks: int) -> Path:
        return self.folder / f"{_stem(name)}-{rank}-of-{ranks}.safetensors"


def _stem(name: str) -> str:
    return name.replace("/", "_")


def _metadata(about: Mapping[str, Any]) -> dict[str, str]:
    return {"about": json.dumps(about)}
