"""Calls of lmms-eval's task functions without its retries, prints and side effects between calls."""

import argparse
import copy
import inspect
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any
from unittest import mock

from loguru import logger


def aggregate(function: Callable[..., Any], items: Sequence[Any]) -> Any:
    """Aggregate the entries of `process_results` for one metric.

    Aggregations that write a submission get a temporary folder. Sums that an aggregation keeps in its module,
    as OCRBench does, are restored, so that a second call does not include the first.
    """
    with _module_kept(function):
        if "args" not in inspect.signature(function).parameters:
            return function(list(items))
        with tempfile.TemporaryDirectory() as folder:
            return function(list(items), args=argparse.Namespace(output_path=folder))


@contextmanager
def _module_kept(function: Callable[..., Any]) -> Iterator[None]:
    """Restore the lists and dicts of its module that a function uses."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    scope = getattr(function, "__globals__", {})
    named = [scope[name] for name in names if type(scope.get(name)) in (dict, list)]
    before = copy.deepcopy(named)
    try:
        yield
    finally:
        for value, kept in zip(named, before, strict=True):
            value.clear()
            value.update(kept) if isinstance(value, dict) else value.extend(kept)


@contextmanager
def without_retries(method: str) -> Iterator[None]:
    """Call a method of lmms-eval's tasks once, instead of five times at intervals of two seconds."""
    from lmms_eval.api.task import ConfigurableTask

    plain = getattr(getattr(ConfigurableTask, method), "__wrapped__", None)
    if plain is None:
        yield
        return
    with mock.patch.object(ConfigurableTask, method, plain):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars, prints and throughput lines that lmms-eval writes for every request."""
    noisy = "lmms_eval.models.model_utils.gen_metrics"
    logger.disable(noisy)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.enable(noisy)
