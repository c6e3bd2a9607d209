"""`hones-eval pull`."""

from pathlib import Path

from hones_eval.commands.answer import Answer


def pull(repository: str, out: Path, revision: str | None = None) -> Answer:
    """Download a steering from the Hugging Face hub, and check it.

    Args:
        repository: the hub repository, ORG/NAME or ORG/NAME@REVISION.
        out: the folder to write it to.
        revision: a branch, tag or commit.

    Example:
        hones-eval pull me/llava-vqa-steering runs/vqa-steering
    """
    from hones_eval.api.sharing import pull as download

    steering = download(repository, out=out, revision=revision)
    hub = steering.provenance.settings["hub"]
    return Answer(
        [f"wrote {out}: {steering!r}", f"from {hub['repository']}, commit {hub['commit']}"],
        {"out": str(out), **hub},
    )
