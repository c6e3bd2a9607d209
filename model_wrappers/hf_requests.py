"""Converts lmms-eval's requests for `hones_hf`: messages for transformers, settings for `generate`."""

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
"""The default of lmms-eval's wrappers, for tasks without `max_new_tokens`."""
NOT_OF_GENERATE = {"until", "image_aspect_ratio", "skip_special_tokens"}
"""Settings that `generate` does not have: `until` is applied here, the others are for other models."""


class Asked(NamedTuple):
    """A request: its number, its messages and its generation settings."""

    number: int
    messages: Messages
    settings: dict[str, Any]


def alike(requests: Sequence[Instance]) -> list[list[int]]:
    """Numbers of requests, grouped by generation settings: those of one group can share a batch."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        settings = next(part for part in request.args if isinstance(part, dict))
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(number)
    return list(groups.values())


def parts(content: Any) -> list[dict[str, Any]]:
    """A message's content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def visual_part(visual: Any) -> dict[str, Any]:
    """One of a document's visuals as a part of a message."""
    kind = visual.get("type", "video") if isinstance(visual, dict) else "image"
    if isinstance(visual, str) and Path(visual).suffix.lower() not in Image.registered_extensions():
        kind = "video"
    return {"type": kind, "url": visual}


def as_part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message in the form of transformers.

    Raises: HonesError for anything but text and images.
    """
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    shown = part.get("url")
    if isinstance(shown, str) and part["type"] == "image":
        shown = Image.open(shown)
    if part["type"] != "image" or not isinstance(shown, Image.Image):
        raise HonesError(f"it shows {part['type']} ({type(shown).__name__}); hones_hf takes images and text")
    return {"type": "image", "image": shown.convert("RGB")}


def images(messages: Messages) -> list[Image.Image]:
    """All images of a conversation, in order."""
    return [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]


def texts(messages: Messages) -> list[str]:
    """All texts of a conversation, in order."""
    return [part["text"] for turn in messages for part in turn["content"] if part["type"] == "text"]


def cut(text: str, until: Sequence[str]) -> str:
    """An answer up to the first string that ends it, without white space around it."""
    text = text.strip()
    for end in until:
        text = text.split(end)[0] if end else text
    return text.strip()


def generation(given: dict[str, Any]) -> dict[str, Any]:
    """A task's generation settings for `generate`: greedy unless the task asks for a temperature.

    Raises: HonesError for a setting that `generate` does not have.
    """
    known = set(GenerationConfig().to_dict())
    unknown = given.keys() - known - NOT_OF_GENERATE
    if unknown:
        near = get_close_matches(min(unknown), sorted(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise HonesError(f"`generate` of transformers has no setting {', '.join(sorted(unknown))}{hint}")
    settings = {name: value for name, value in given.items() if name in known}
    settings.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    if not settings.setdefault("do_sample", bool(given.get("temperature"))):
        settings |= {"temperature": None, "top_p": None, "top_k": None}
    return settings
