"""Texts and images that a document's requests show to a model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance
from PIL import Image

from hones_eval.errors import HonesError, TaskError, one_line

WITHOUT_IMAGE = "; it shows no image, and hones_hf answers such questions: --model hones_hf"
"""The way out for wrappers that fail on a question without an image."""


class Shown(NamedTuple):
    """The texts and images of one document."""

    texts: list[str]
    images: list[Image.Image]


def shown(requests: Sequence[Instance], load: Callable[[], Mapping[str, Any]], *, simple: bool) -> Shown:
    """The texts and images of a document.

    Args:
        requests: the document's: one, or one per choice.
        load: returns the document with its images.
        simple: whether the requests have lmms-eval's simple form, and not that of chats.

    Raises: TaskError naming task and document when they cannot be read, or are not images.
    """
    request = requests[0]
    where = f"{request.task_name}, doc_id {request.doc_id}"
    try:
        texts, media = _contents(requests, load(), simple)
    except HonesError as error:
        raise TaskError(f"{where}: {error}") from error
    except Exception as error:
        raise TaskError(
            f"{where}: its image or prompt cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from error
    return Shown(texts, [_image(medium, where) for medium in media])


def _contents(
    requests: Sequence[Instance], doc: Mapping[str, Any], simple: bool
) -> tuple[list[str], list[Any]]:
    request = requests[0]
    if request.request_type == "loglikelihood":
        choices = [str(choice.args[1]) for choice in requests]
        return [str(request.args[0]), *choices], list(request.args[2](doc) or [])
    if simple:
        return [str(request.args[0])], list(request.args[2](doc) or [])
    return _chat(request.args[1](doc))


def _chat(messages: list[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """Texts with their roles, and media, of a chat."""
    parts = [(message["role"], part) for message in messages for part in message["content"]]
    texts = [f"{role}: {part['text']}" for role, part in parts if part["type"] == "text"]
    media = [part for _, part in parts if part["type"] != "text"]
    return texts, [part["url"] if part["type"] == "image" else part for part in media]


def _image(medium: Any, where: str) -> Image.Image:
    if isinstance(medium, Image.Image):
        return medium
    if isinstance(medium, str) and Path(medium).suffix.lower() in Image.registered_extensions():
        try:
            return Image.open(medium)
        except OSError as error:
            raise TaskError(f"{where}: the image {medium} cannot be read: {one_line(error)}") from error
    kind = medium.get("type", "a dict") if isinstance(medium, dict) else type(medium).__name__
    raise TaskError(f"{where}: it shows {kind}; only tasks with images and text can be measured")
