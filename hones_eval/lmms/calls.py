"""Calls into lmms-eval's tasks as it makes them itself, but without retries, and as often as one likes."""

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
    """Give what an aggregation makes of `process_results`' entries for one metric.

    Aggregations that write a submission get a folder that is gone afterwards. What one adds up in its
    module, as OCRBench does, is put back, so that a second call does not count the first.
    """
    with _module_kept(function):
        if "args" not in inspect.signature(function).parameters:
            return function(list(items))
        with tempfile.TemporaryDirectory() as folder:
            return function(list(items), args=argparse.Namespace(output_path=folder))


@contextmanager
def _module_kept(function: Callable[..., Any]) -> Iterator[None]:
    """Put the lists and dicts back that a function names in its module."""
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
    """One try of a method of lmms-eval's tasks instead of five, two seconds apart: it fails for good."""
    from lmms_eval.api.task import ConfigurableTask

    plain = getattr(getattr(ConfigurableTask, method), "__wrapped__", None)
    if plain is None:
        yield
        return
    with mock.patch.object(ConfigurableTask, method, plain):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Neither bars nor prints nor throughput lines of lmms-eval inside: they come with every request."""
    noisy = "lmms_eval.models.model_utils.gen_metrics"
    logger.disable(noisy)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.enable(noisy)
