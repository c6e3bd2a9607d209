"""Gives a chat the whole text of its request: description, system instruction and examples too.

lmms-eval builds a request's context from the task's `description`, `--system_instruction`, the few-shot
examples and the question, and logs it as the input. In the chat form of a task with images, it then sends the
question alone. Here the text of the chat is the context, as it is logged and as the simple form sends it.
"""

from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any

from lmms_eval.api.instance import Instance

from hones_eval.errors import HonesError

Messages = list[dict[str, Any]]


def with_context(request: Instance) -> Instance:
    """The request, or for a chat a copy whose messages contain the whole context."""
    arguments = request.args
    task = getattr(arguments[1], "__self__", None) if len(arguments) > 1 else None
    if request.request_type != "generate_until" or not hasattr(task, "doc_to_messages"):
        return request
    source = _WithContext(arguments[1], task, str(arguments[0]))
    whole = (arguments[0], source, *arguments[2:])
    return Instance(request.request_type, whole, request.idx, dict(request.metadata))


class _WithContext:
    """A replacement of a task's `doc_to_messages` that adds what comes before the question."""

    def __init__(self, source: Callable[..., Messages], task: Any, context: str) -> None:
        update_wrapper(self, source)  # some wrappers look at the signature
        self._source, self._task, self._context = source, task, context

    def __call__(self, doc: Mapping[str, Any], *args: Any, **kwargs: Any) -> Messages:
        """The messages of a document.

        Raises: HonesError when the task makes messages of its own, without its description.
        """
        messages = self._source(doc, *args, **kwargs)
        question = self._task.doc_to_text(doc)
        if not isinstance(question, str) or not self._context.endswith(question) or not question:
            return messages
        before = self._context[: -len(question)].strip()
        parts = [part for message in messages for part in _parts(message) if part["type"] == "text"]
        if not before or any(before in part["text"] for part in parts):
            return messages
        places = [part for part in parts if part["text"] == question]
        if callable(self._task.config.doc_to_messages) or not places:
            raise HonesError(
                f"the description, system instruction or examples {before[:60]!r} are not in the messages of "
                "the task's own doc_to_messages: leave them out, or use --force_simple"
            )
        for part in places:
            part["text"] = self._context
        return messages


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [] if isinstance(content, str) else content
