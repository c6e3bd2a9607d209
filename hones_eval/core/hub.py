"""Steerings on the Hugging Face hub: uploaded with a model card, downloaded at a pinned commit."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hones_eval.errors import HonesError, first_line

FILES = ("steering.json", "steering.safetensors")
CARD = "README.md"


class Downloaded(NamedTuple):
    """A downloaded repository: its id, the commit, and the folder with its files."""

    repo_id: str
    commit: str
    folder: Path


def upload(repo_id: str, files: dict[str, bytes], *, private: bool) -> str:
    """Commit files to a model repository, which is created when it does not exist.

    Returns: the new commit.
    Raises: HonesError when the hub refuses it or cannot be reached.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        info = api.create_commit(repo_id, operations, commit_message="Add a steering")
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise HonesError(
            f"{repo_id} could not be written on the hub ({first_line(error)}): is there a token with write "
            "access (hf auth login), and is the hub reachable?"
        ) from None
    return str(info.oid)


def split_revision(name: str) -> tuple[str, str | None]:
    """The name and the revision of `org/name@revision`; None for a name without one."""
    repository, at, revision = name.rpartition("@")
    return (repository, revision) if at else (name, None)


def download(repo_id: str, revision: str | None) -> Downloaded:
    """Download a steering. `org/name@revision` names a branch, tag or commit too.

    Raises: HonesError when there is no such repository, or it holds no steering.
    """
    given = repo_id
    if revision is None:
        repo_id, revision = split_revision(repo_id)
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*FILES, CARD]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise HonesError(
            f"no steering at {given!r}: there is no such folder, and the hub has none ({reason})"
        ) from None
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise HonesError(f"{given} on the hub is no steering: it has no {missing[0]}")
    return Downloaded(repo_id, folder.name, folder)
