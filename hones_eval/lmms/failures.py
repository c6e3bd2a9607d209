"""One-line errors, with the way out, for tasks whose data, requests or scores fail.

lmms-eval itself fetches a data set up to five times, with pauses, and its error names no task.
"""

import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants, is_offline_mode
from lmms_eval.api.task import ConfigurableTask
from tenacity import RetryError

from hones_eval.errors import HonesError, TaskError, one_line
from hones_eval.lmms.calls import without_retries


@contextmanager
def failing_at_once() -> Iterator[None]:
    """Make tasks fetch their data once, and fail with a TaskError that names the task."""
    task = ConfigurableTask
    with without_retries("download"):
        patches: dict[str, Any] = {
            "download": _asking_first(task.download),
            "__init__": _named(task.__init__, " cannot be built"),
            "build_all_requests": _named(task.build_all_requests, ": its requests cannot be built"),
            "process_results": _named(task.process_results, ": an answer cannot be scored"),
        }
        with mock.patch.multiple(task, **patches):
            yield


def failure(what: str, error: BaseException, columns: Collection[str] | None = None) -> TaskError:
    """The TaskError for a failure: the cause behind lmms-eval's retries, and the way out.

    Args:
        what: the task, and what failed.
        error: as it was caught.
        columns: the data set's, where they are known.
    """
    if isinstance(error, RetryError):
        error = error.last_attempt.exception() or error
    if isinstance(error, HonesError):
        return TaskError(str(error))
    return TaskError(f"{what}: {type(error).__name__}: {one_line(error)}{_way_out(error, columns)}")


def _named(method: Callable[..., Any], fails: str) -> Callable[..., Any]:
    @wraps(method)
    def named(task: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(task, *args, **kwargs)
        except HonesError:
            raise
        except Exception as error:
            columns = getattr(task, "features", None)  # a list, once the task has its data
            raise failure(f"task {_name(task)}{fails}", error, columns) from error

    return named


def _asking_first(download: Callable[..., None]) -> Callable[..., None]:
    @wraps(download)
    def asking(task: Any, *args: Any, **kwargs: Any) -> None:
        _check_hub_answers(_name(task), str(task.DATASET_PATH))
        download(task, *args, **kwargs)

    return asking


def _name(task: Any) -> str:
    return str(getattr(task.config, "task", None))


def _check_hub_answers(name: str, source: str) -> None:
    """Refuse a hub that accepts a connection and never answers: `datasets` retries it for many minutes.

    A hub that refuses, or answers with an error, fails at once. It is left to `datasets`, which has a cache.
    """
    if "/" not in source or Path(source).exists() or is_offline_mode():  # csv, json, a folder
        return
    asked = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(asked, timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except OSError as error:  # a URLError is one too
        if isinstance(getattr(error, "reason", error), TimeoutError):
            raise TaskError(
                f"task {name}: {constants.ENDPOINT} did not answer within {constants.HF_HUB_ETAG_TIMEOUT} s; "
                f"try later, raise HF_HUB_ETAG_TIMEOUT, or set HF_HUB_OFFLINE=1 if {source} is in the cache"
            ) from error


def _way_out(error: BaseException, columns: Collection[str] | None) -> str:
    """The way out for a data set that cannot be fetched, or that lacks a column."""
    if "gated" in str(error):
        return "; then log in with `hf auth login`, or set HF_TOKEN to a token that has access"
    if isinstance(error, KeyError):
        if columns is None:
            return ", which may be a column or a split that its data set does not have"
        lacking = [key for key in error.args if key not in columns]
        return f", which is not a column of the data set ({', '.join(columns)})" if lacking else ""
    unreached = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("http")
    if unreached or type(error).__name__ in ("DatasetNotFoundError", "LocalEntryNotFoundError"):
        if is_offline_mode():
            return "; HF_HUB_OFFLINE is set, so it has to be in the cache: unset it to fetch it"
        return (
            f"; is {constants.ENDPOINT} reachable? Data that was downloaded before works without it: "
            "HF_HUB_OFFLINE=1"
        )
    if type(error).__name__ == "ArrowInvalid":
        return "; delete the file from the hub's cache ($HF_HOME/hub) to fetch it again"
    return ""
