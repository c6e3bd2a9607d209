"""What `hones_hf` makes of lmms-eval's requests: messages in transformers' words, settings of `generate`."""

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance
from PIL import Image
from transformers import GenerationConfig

from hones_eval.errors import HonesError

Messages = list[dict[str, Any]]

DEFAULT_NEW_TOKENS = 1024
"""As lmms-eval's wrappers have it, for tasks that set no `max_new_tokens`."""
OF_OTHERS = {"until", "image_aspect_ratio", "skip_special_tokens"}
"""Settings of tasks that `generate` has not: `until` is kept by the wrapper, others are meant for others."""


class Asked(NamedTuple):
    """A request, read: what is said and shown, how to generate, and where the answer belongs."""

    place: int
    messages: Messages
    settings: dict[str, Any]


def alike(requests: Sequence[Instance]) -> list[list[int]]:
    """Places of requests that may share a batch: those with the same generation settings."""
    groups: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        settings = next(part for part in request.args if isinstance(part, dict))
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(place)
    return list(groups.values())


def parts(content: Any) -> list[dict[str, Any]]:
    """A message's content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def medium(medium: Any) -> dict[str, Any]:
    """One of a document's visuals as a part of a message."""
    kind = medium.get("type", "video") if isinstance(medium, dict) else "image"
    if isinstance(medium, str) and Path(medium).suffix.lower() not in Image.registered_extensions():
        kind = "video"
    return {"type": kind, "url": medium}


def as_part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message in the words of transformers.

    Raises: HonesError for anything but text and pictures.
    """
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    shown = part.get("url")
    if isinstance(shown, str) and part["type"] == "image":
        shown = Image.open(shown)
    if part["type"] != "image" or not isinstance(shown, Image.Image):
        raise HonesError(
            f"it shows {part['type']} ({type(shown).__name__}); hones_hf takes pictures and text"
        )
    return {"type": "image", "image": shown.convert("RGB")}


def pictures(messages: Messages) -> list[Image.Image]:
    """All pictures of a conversation, in order."""
    return [part["image"] for one in messages for part in one["content"] if part["type"] == "image"]


def texts(messages: Messages) -> list[str]:
    """All that is said in a conversation, in order."""
    return [part["text"] for one in messages for part in one["content"] if part["type"] == "text"]


def until(settings: dict[str, Any]) -> list[str]:
    """The strings that end an answer."""
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def cut(text: str, until: Sequence[str]) -> str:
    """An answer before the first string that ends it; white space around it is no part of an answer."""
    text = text.strip()
    for end in until:
        text = text.split(end)[0] if end else text
    return text.strip()


def generation(given: dict[str, Any]) -> dict[str, Any]:
    """A task's generation settings as `generate` has them: greedy unless it asks for a temperature.

    Raises: HonesError for a setting that `generate` does not know.
    """
    known = set(GenerationConfig().to_dict())
    unknown = given.keys() - known - OF_OTHERS
    if unknown:
        near = get_close_matches(min(unknown), sorted(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise HonesError(f"generate of transformers has no setting {', '.join(sorted(unknown))}{hint}")
    settings = {name: value for name, value in given.items() if name in known}
    settings.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    if not settings.setdefault("do_sample", bool(given.get("temperature"))):
        settings |= {"temperature": None, "top_p": None, "top_k": None}
    return settings
