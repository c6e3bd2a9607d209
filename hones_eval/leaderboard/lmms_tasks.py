"""Aggregation functions and example images of lmms-eval tasks.

lmms-eval (and torch) is imported only when one of these is needed. Nothing is downloaded.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL.Image import Image

from hones_eval.errors import HonesError
from hones_eval.lmms.calls import aggregate, without_retries

# Errors from loading a task whose data set is missing or has changed.
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    ImportError,
    TypeError,
    AttributeError,
    AssertionError,
)


def find_aggregation(task: str, metric: str, include_path: Path | None) -> Callable[[list[Any]], float] | str:
    """The aggregation function of a task's metric, or the reason why it is not available."""
    try:
        from lmms_eval.api.registry import get_aggregation
        from lmms_eval.utils import load_yaml_config

        manager = _manager_of(task, include_path)
        if manager is None:
            return f"lmms-eval knows no task {task} (is it in a folder to include?)"
        path = manager.task_index[task].get("yaml_path")
        if not isinstance(path, str | Path):
            return f"the task {task} has no YAML file of its own"
        config = load_yaml_config(path, mode="full")
    except ImportError as error:
        return f"the task {task} cannot be imported to compute {metric} again ({error})"
    for listed in config.get("metric_list") or []:
        if listed.get("metric") == metric:
            found = listed.get("aggregation")
            found = get_aggregation(found) if isinstance(found, str) else found
            return _quiet(found) if callable(found) else f"the task {task} names no aggregation for {metric}"
    return f"the task {task} lists no metric {metric}"


def _quiet(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], float]:
    def metric(items: list[Any]) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                value = float(aggregate(function, items))
            except (ArithmeticError, HonesError, *LOAD_ERRORS):
                return math.nan  # undefined on these items
        return value

    return metric


class TaskImages:
    """Images of a task's examples, from its data set, if that is on this machine."""

    def __init__(self, include_path: Path | None = None) -> None:
        """`include_path` is a folder of further tasks."""
        self._include_path = include_path
        self._tasks: dict[str, tuple[Any, Any] | None] = {}

    def first(self, task: str, doc_id: int) -> Image | None:
        """The first image of an example, or None if there is none or it cannot be loaded."""
        if task not in self._tasks:
            self._tasks[task] = self._load(task)
        loaded = self._tasks[task]
        if loaded is None:
            return None
        try:
            visuals = loaded[0].doc_to_visual(loaded[1][doc_id])
        except LOAD_ERRORS:
            return None
        return next((visual for visual in visuals or [] if isinstance(visual, Image)), None)

    def _load(self, name: str) -> tuple[Any, Any] | None:
        try:
            with _offline(), without_retries("download"):
                manager = _manager_of(name, self._include_path)
                task = None if manager is None else manager.load_task_or_group([name], "simple").get(name)
                return None if task is None else (task, task.eval_docs)
        except _load_errors():
            return None


def _load_errors() -> tuple[type[BaseException], ...]:
    from datasets.exceptions import DatasetsError

    return (*LOAD_ERRORS, DatasetsError)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Disable downloads and log messages while a task is loaded."""
    import datasets.config
    import huggingface_hub.constants
    from loguru import logger

    places = [(datasets.config, "HF_HUB_OFFLINE"), (datasets.config, "HF_DATASETS_OFFLINE")]
    places.append((huggingface_hub.constants, "HF_HUB_OFFLINE"))
    kept = [getattr(module, name) for module, name in places]
    logger.disable("lmms_eval")
    try:
        for module, name in places:
            setattr(module, name, True)
        yield
    finally:
        logger.enable("lmms_eval")
        for (module, name), value in zip(places, kept, strict=True):
            setattr(module, name, value)


def _manager_of(task: str, include_path: Path | None) -> Any:
    """The task manager that knows the task (of the included folder or of lmms-eval), or None."""
    for folder in [None] if include_path is None else [str(include_path), None]:
        manager = _manager(folder)
        index: Mapping[str, Any] = manager.task_index
        if task in index:
            return manager
    return None


@lru_cache(maxsize=4)  # lmms-eval's own task files are thousands and take seconds
def _manager(folder: str | None) -> Any:
    import lmms_eval.models  # noqa: F401  (its entry points make our own tasks known)
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=folder is None)
