"""The kinds of answers, in the order in which a task is offered to them.

A new kind is a module beside this one and an entry in `KINDS`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lmms_eval.api.instance import Instance

from hones_eval.lmms.answers.choices import ChoiceAnswers
from hones_eval.lmms.answers.kind import AnswerKind, NextTokenReader, RecordedTask, Recorder, settings_of
from hones_eval.lmms.answers.log_probability import LogProbabilityAnswers
from hones_eval.lmms.answers.margin import MarginAnswers
from hones_eval.lmms.answers.text import TextAnswers
from hones_eval.lmms.answers.tokens import tokenizer_of

KINDS: list[AnswerKind] = [LogProbabilityAnswers(), ChoiceAnswers(), MarginAnswers(), TextAnswers()]
"""Kinds of answers; the first whose `recorder` takes a task records it, so the general ones come last."""


@contextmanager
def registered(kind: AnswerKind) -> Iterator[None]:
    """Add a kind within the block, before the general ones."""
    KINDS.insert(0, kind)
    try:
        yield
    finally:
        KINDS.remove(kind)


def recorder_of(task: RecordedTask) -> tuple[AnswerKind, Recorder]:
    """The kind of answer that a task asks for, and the recorder of its questions."""
    offered = ((kind, kind.recorder(task)) for kind in KINDS)
    return next((kind, recorder) for kind, recorder in offered if recorder is not None)


def kind_with_metric(metric: str | None) -> AnswerKind | None:
    """The kind that brings a metric with it, if there is one."""
    return next((kind for kind in KINDS if metric is not None and kind.metric == metric), None)


def own_settings() -> frozenset[str]:
    """The generation settings that belong to kinds of answers, unknown to wrappers and `generate`."""
    return frozenset[str]().union(*(kind.settings for kind in KINDS))


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings without those that belong to a kind of answer."""
    return {name: value for name, value in settings.items() if name not in own_settings()}


def reader_of(request: Instance, wrapper: Any) -> NextTokenReader | None:
    """The reader of a request whose answer is read from logits; None where it is generated in words."""
    settings = settings_of(request)
    for kind in KINDS:
        if kind.settings & settings.keys():
            reader = kind.reader(settings, str(request.task_name), tokenizer_of(wrapper))
            if reader is not None:
                return reader
    return None
