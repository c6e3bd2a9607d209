"""`hones-eval push`."""

from pathlib import Path

from hones_eval.commands.answer import Answer


def push(
    folder: Path,
    repository: str,
    public: bool = False,
    board: Path | None = None,
    licence: str | None = None,
) -> Answer:
    """Upload a steering to the Hugging Face hub, with a model card made from its provenance.

    Args:
        folder: a folder that scale or edit-sites wrote.
        repository: the hub repository, ORG/NAME; it is created when it does not exist.
        public: let everybody read a repository that is created; it is private otherwise.
        board: a folder that leaderboard wrote; its rows with this steering go into the card.
        licence: as the hub names licences, such as apache-2.0.

    Example:
        hones-eval push runs/vqa/steering me/llava-vqa-steering --board board --licence apache-2.0
    """
    from hones_eval.api.sharing import push as upload

    commit = upload(folder, repository, public=public, board=board, licence=licence)
    return Answer(
        [f"uploaded {folder} to {repository}, commit {commit}", f"use it: steering={repository}@{commit}"],
        {"repository": repository, "commit": commit},
    )
