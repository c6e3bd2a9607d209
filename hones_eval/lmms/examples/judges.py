"""Finds out which tasks are scored by a remote model."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType, ModuleType
from typing import Any

JUDGES = ("lmms_eval.llm_judge", "lmms_eval.verifiers.openai", "openai", "anthropic", "dashscope", "requests")


def remote_judge(metadata: Any, functions: Iterable[Any]) -> str | None:
    """The remote model or library that a task calls to score an answer; None when it scores locally.

    Args:
        metadata: that of the task's YAML.
        functions: `process_results` and the aggregations; their code is searched, and that of the functions
            that they call by name.
    """
    for part in metadata if isinstance(metadata, list) else [metadata]:
        if isinstance(part, dict) and part.get("gpt_eval_model_name"):
            return str(part["gpt_eval_model_name"])
    seen: set[int] = set()
    for function in functions:
        for name in _reached(function, seen):
            return name
    return None


def _reached(function: Any, seen: set[int]) -> Iterator[str]:
    """Judges that a function names, directly or through other functions of tasks."""
    if isinstance(function, partial):
        function = function.func
    code = getattr(function, "__code__", None)
    if code is None or id(code) in seen:
        return
    seen.add(id(code))
    scope: dict[str, Any] = getattr(function, "__globals__", {})
    for name in _names(code):
        value = scope.get(name)
        home = _home(value)
        if home.startswith(JUDGES):
            yield home if isinstance(value, ModuleType) else f"{home}.{name}"
        elif callable(value) and not isinstance(value, type) and _is_task_code(value):
            yield from _reached(value, seen)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _home(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    if callable(value) or isinstance(value, type):
        return getattr(value, "__module__", None) or ""
    return type(value).__module__


def _is_task_code(function: Callable[..., Any]) -> bool:
    """Whether a function belongs to a task: lmms-eval's own, or a `utils.py` next to a YAML file."""
    home = getattr(function, "__module__", None) or ""
    return home.startswith("lmms_eval.tasks") or "." not in home
