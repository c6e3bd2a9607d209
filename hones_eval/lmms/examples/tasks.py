"""Builds lmms-eval tasks and their requests by name; a task that cannot be measured is an error."""

import copy
import ssl
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import lmms_eval.models  # noqa: F401  before the tasks: it loads plug-ins, and ours registers its tasks
from lmms_eval import utils
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import get_aggregation
from lmms_eval.api.task import Task
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger

from hones_eval.errors import TaskError, one_line
from hones_eval.lmms.arguments import parsed_settings
from hones_eval.lmms.calls import quiet
from hones_eval.lmms.chat_text import with_context
from hones_eval.lmms.examples.judges import remote_judge
from hones_eval.lmms.failures import failing_at_once, failure
from hones_eval.lmms.task_files import broken_file, check_task_file, read_task_file, users_file


def build_task(
    name: str,
    lmm: lmms,
    *,
    model_name: str,
    include_path: str | Path | None,
    gen_kwargs: str | None,
    scored: bool = True,
) -> Task:
    """Build one lmms-eval task as `lmms-eval --model <model_name> --tasks <name>` would.

    Args:
        name: a task, or a group or tag with a single task.
        lmm: the model; it decides between lmms-eval's chat and simple form.
        model_name: the name after lmms-eval's `--model`, which chooses the task's prompts.
        include_path: a folder of further task YAML files.
        gen_kwargs: as lmms-eval's `--gen_kwargs`.
        scored: whether the task's metrics are needed; then a task that a remote model scores is refused.

    Raises: TaskError for an unknown task, a group of several, a task that asks for neither one answer nor
        choices, or one whose YAML or data set fails.
    """
    manager = _manager(model_name, include_path)
    name = _leaf(manager, name)
    chooses = _output_type(manager, name) == CHOICE
    if own_file := users_file(manager, name):
        check_task_file(own_file)
    config = _config(manager, name)
    if scored:
        _must_score_alone(config, name)
    _let_datasets_fingerprint()
    with failing_at_once(), quiet():
        try:
            # lmms-eval builds requests for log-likelihoods only in the simple form.
            form = "simple" if lmm.is_simple or chooses else "chat"
            task = get_task_dict([name], manager, form)[name]
        except Exception as error:
            raise failure(f"task {name} cannot be built", error) from error
    _adjust(task, None if chooses else gen_kwargs)
    lmm.task_dict[name] = task.dataset
    return task


def task_size(name: str, include_path: str | Path | None = None) -> int:
    """The number of documents in the split that a task is evaluated on; no model is needed.

    Raises: TaskError for an unknown task, or one whose YAML or data set fails.
    """
    manager = _manager("", include_path)
    name = _leaf(manager, name)
    if own_file := users_file(manager, name):
        check_task_file(own_file)
    with failing_at_once(), quiet():
        try:
            task = get_task_dict([name], manager, "simple")[name]
            return len(task.eval_docs_no_media)
        except Exception as error:
            raise failure(f"task {name} cannot be built", error) from error


def build_requests(task: Task, limit: int | None, offset: int) -> list[list[Instance]]:
    """The requests of at most `limit` documents from `offset` on: one per document, or one per choice.

    Raises: TaskError when there is no document, or its requests are not of one kind.
    """
    name = task.task_name
    if limit is not None and limit < 1:
        raise TaskError(f"task {name}: limit={limit} leaves no example")
    count = len(task.eval_docs_no_media)
    if offset < 0 or offset >= count:
        raise TaskError(f"task {name} has {count} examples; offset={offset} leaves none")
    if task.OUTPUT_TYPE == CHOICE and task.multiple_input:
        raise TaskError(f"task {name} offers several questions for one answer; {_WANTED}")
    logger.disable("lmms_eval.api.task")
    try:
        with quiet():
            task.build_all_requests(limit=limit, offset=offset, rank=0, world_size=1)
    except Exception as error:
        raise failure(f"task {name}: its requests cannot be built", error) from error
    finally:
        logger.enable("lmms_eval.api.task")
    by_document: dict[int, list[Instance]] = {}
    for request in task.instances:
        by_document.setdefault(request.doc_id, []).append(request)
    found = [[with_context(request) for request in requests] for requests in by_document.values()]
    if task.OUTPUT_TYPE == CHOICE:
        for requests in found:
            if len(requests) < 2:
                where = f"{name}, doc_id {requests[0].doc_id}"
                raise TaskError(f"{where}: it has one choice; a multiple-choice task needs at least two")
    else:
        other = next(
            (requests[0].request_type for requests in found if requests[0].request_type != ANSWER), None
        )
        if other or any(len(requests) > 1 for requests in found):
            raise TaskError(f"task {name} asks for {other or 'several answers per document'}; {_WANTED}")
    return found


ANSWER, CHOICE = "generate_until", "multiple_choice"
_WANTED = f"only tasks with one answer (output_type {ANSWER}) or choices ({CHOICE}) can be measured"


def _manager(model_name: str, include_path: str | Path | None) -> TaskManager:
    if include_path is None:
        return _own_tasks(model_name)
    folder = Path(include_path)
    if not folder.is_dir():
        raise TaskError(f"include_path {folder} is not a folder; it should contain lmms-eval task YAML files")
    try:
        theirs = TaskManager(include_path=str(folder), include_defaults=False, model_name=model_name)
    except Exception as error:
        blamed = broken_file(folder)
        raise blamed or TaskError(
            f"lmms-eval cannot read the tasks of {folder}: {one_line(error)}"
        ) from error
    manager = copy.copy(_own_tasks(model_name))
    manager._task_index = {**theirs.task_index, **manager.task_index}  # a built-in task of the same name wins
    manager._all_tasks = sorted(manager.task_index)
    return manager


def _own_tasks(model_name: str) -> TaskManager:
    """The task manager of lmms-eval's and this package's tasks, with the prompts for one model."""
    manager = copy.copy(_index())
    manager.model_name = model_name
    return manager


@lru_cache(maxsize=1)
def _index() -> TaskManager:
    """The task manager, made once: reading two thousand YAML files takes seconds."""
    return TaskManager()


def _leaf(manager: TaskManager, name: str) -> str:
    """The task with a name, or the only task of a group or tag."""
    if name not in manager.task_index:
        near = get_close_matches(name, manager.all_tasks, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lmms-eval --tasks list` shows all"
        raise TaskError(f"lmms-eval has no task named {name!r}: {hint}")
    leaves = sorted(set(_leaves(manager, name)))
    if len(leaves) == 1:
        return leaves[0]
    shown = ", ".join(leaves[:8]) + (f" and {len(leaves) - 8} more" if len(leaves) > 8 else "")
    raise TaskError(f"{name} is a group of several tasks; choose one of: {shown}")


def _leaves(manager: TaskManager, name: str) -> Iterator[str]:
    entry = manager.task_index.get(name, {"type": "task"})
    if entry["type"] in ("task", "python_task"):
        yield name
        return
    members = entry["task"] if entry["type"] == "tag" else read_task_file(Path(entry["yaml_path"]))["task"]
    for member in members:
        inner = member if isinstance(member, str) else member.get("task", member.get("group"))
        if isinstance(inner, str) and inner != name:
            yield from _leaves(manager, inner)


def _output_type(manager: TaskManager, name: str) -> str:
    """The task's output type. Raises: TaskError for one that cannot be measured, before data are fetched."""
    entry = manager.task_index[name]
    output_type = str(read_task_file(Path(entry["yaml_path"])).get("output_type", ANSWER))
    if output_type not in (ANSWER, CHOICE):
        raise TaskError(f"task {name} has output_type {output_type}; {_WANTED}")
    return output_type


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = utils.load_yaml_config(manager.task_index[name]["yaml_path"], mode="full")
    except Exception as error:
        if type(error).__module__.startswith("openai"):  # some tasks make a client when they are imported
            raise TaskError(_judged(name, "openai")) from error
        raise failure(f"task {name} cannot be built", error) from error
    return config


def _must_score_alone(config: dict[str, Any], name: str) -> None:
    """Refuse a task that a remote model scores, before its data set is fetched."""
    named = [entry.get("aggregation") for entry in config.get("metric_list") or []]
    aggregations = [get_aggregation(name) if isinstance(name, str) else name for name in named]
    judge = remote_judge(config.get("metadata"), [config.get("process_results"), *aggregations])
    if judge:
        raise TaskError(_judged(name, judge))


def judge_of(task: Task) -> str | None:
    """The remote model that scores a task's answers; None where there is none."""
    return remote_judge(task.config.metadata, [task.config.process_results, *task.aggregation().values()])


def _judged(name: str, judge: str) -> str:
    return (
        f"task {name} is scored by a remote model ({judge}), which cannot measure heads; measure "
        "how likely a gold answer is instead: --metric log_probability --target COLUMN"
    )


def _adjust(task: Task, gen_kwargs: str | None) -> None:
    """Set what `lmms_eval.evaluator.simple_evaluate` sets on every task before it builds requests."""
    if gen_kwargs:
        task.set_config("generation_kwargs", parsed_settings(gen_kwargs), update=True)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed=1234)


def _let_datasets_fingerprint() -> None:
    """Let `datasets` hash functions that hold a network connection, as lmms-eval's evaluator does."""
    if not hasattr(ssl.SSLContext, "_orig_reduce"):
        context: Any = ssl.SSLContext
        context._orig_reduce = True  # lmms-eval's own mark
        context.__reduce__ = lambda self: (ssl.SSLContext, (self.protocol,))


def document(task: Task, doc_id: int) -> dict[str, Any]:
    """A copy of a document without its images, as lmms-eval scores it; some scorers modify it."""
    found: Mapping[str, Any] = task.eval_docs_no_media[doc_id]
    return copy.deepcopy(dict(found))
