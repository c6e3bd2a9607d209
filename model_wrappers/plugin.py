"""Patches of lmms-eval, each applied once, right after the module in question is imported.

lmms-eval has no entry point for tasks, chooses prompts by the name after `--model`, keys its answer cache on
the text of `--model_args`, and exits with status 0 when a run fails. A model class cannot change any of that,
so a few methods are wrapped. Runs of other models are unchanged, except that caption metrics start fewer Java
programs.
"""

import sys
import traceback
from collections.abc import Sequence
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from hones_eval.errors import HonesError

from . import registry
from .after_import import after_import
from .caption_tools import share_caption_tools
from .registry import base_name, is_ours

COMMAND = "lmms_eval.__main__"


def install() -> None:
    """Patch the modules that are imported, and the others when they are. Safe to call twice."""
    after_import("lmms_eval.tasks", _patch_tasks)
    after_import("lmms_eval.caching.response_cache", _patch_cache)
    after_import("lmms_eval.loggers.evaluation_tracker", _patch_tracker)
    # lmms_eval.evaluator itself may be importing this; then the first task manager patches it.
    if "lmms_eval.evaluator" not in sys.modules:
        after_import("lmms_eval.evaluator", _patch_settings)
    after_import("pycocoevalcap.eval", share_caption_tools)


def own_task_folders() -> list[str]:
    """The folders of this package's tasks, in a checkout or installed."""
    spec = find_spec("hones_eval.tasks")
    return list(spec.submodule_search_locations or []) if spec else []


def _patch_tasks(module: ModuleType) -> None:
    manager = module.TaskManager
    if _is_patched(manager):
        return
    build, index, match = manager.__init__, manager.initialize_tasks, manager.match_tasks
    load, load_one = manager.load_task_or_group, manager._load_individual_task_or_group
    own_tasks = own_task_folders()

    @wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "lmms_eval.evaluator" in sys.modules:
            _patch_settings(sys.modules["lmms_eval.evaluator"])
        if COMMAND in sys.modules:
            _patch_evaluate(sys.modules["lmms_eval.evaluator"])
        build(self, *args, **kwargs)

    @wraps(index)
    def initialize_tasks(self: Any, include_path: Any = None, include_defaults: bool = True) -> Any:
        given = [include_path] if isinstance(include_path, str) else list(include_path or [])
        try:
            return index(self, [*given, *own_tasks] if include_defaults else given, include_defaults)
        except Exception:
            if COMMAND in sys.modules and is_ours(self.__dict__.get("model_name")):
                from hones_eval.lmms.task_files import broken_file

                for error in filter(None, (broken_file(Path(folder)) for folder in given)):
                    raise _ending(error) from error
            raise

    @wraps(match)
    def match_tasks(self: Any, task_list: Sequence[str]) -> Any:
        found = match(self, task_list)
        unknown = [n for n in task_list if n not in found and "*" not in n and not Path(n).is_file()]
        if unknown and COMMAND in sys.modules and is_ours(self.__dict__.get("model_name")):
            raise _ending(HonesError(f"there is no task {', '.join(unknown)}: --tasks list shows all"))
        return found

    @wraps(load)
    def load_task_or_group(self: Any, task_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        if COMMAND in sys.modules and is_ours(self.__dict__.get("model_name")):
            from hones_eval.lmms.task_files import check_task_file, users_file

            names = [task_list] if isinstance(task_list, str) else task_list or []
            for path in filter(None, (users_file(self, name) for name in names if isinstance(name, str))):
                check_task_file(path)
        return load(self, task_list, *args, **kwargs)

    @wraps(load_one)
    def load_one_in_its_form(
        self: Any, config: Any = None, task_type: str = "simple", *args: Any, **kwargs: Any
    ) -> Any:
        ours = is_ours(self.__dict__.get("model_name"))
        if task_type == "chat" and ours and _offers_choices(self, config):
            task_type = "simple"
        return load_one(self, config, task_type, *args, **kwargs)

    manager._load_individual_task_or_group = load_one_in_its_form
    manager.load_task_or_group = load_task_or_group
    manager.__init__ = __init__
    manager.initialize_tasks = initialize_tasks
    manager.match_tasks = match_tasks
    manager.model_name = property(
        lambda self: base_name(self.__dict__.get("model_name")),
        lambda self, name: self.__dict__.update(model_name=name),
    )


def _offers_choices(manager: Any, config: Any) -> bool:
    """Whether a task asks for log-likelihoods, whose requests lmms-eval only builds in the simple form."""
    from hones_eval.lmms.task_files import read_task_file

    name = config.get("task") if isinstance(config, dict) else config
    entry = manager.task_index.get(name) if isinstance(name, str) else None
    if not entry or entry["type"] != "task":
        return False
    return read_task_file(Path(entry["yaml_path"])).get("output_type") in ("multiple_choice", "loglikelihood")


def _patch_cache(module: ModuleType) -> None:
    cache = module.ResponseCache
    if _is_patched(cache):
        return
    execute = cache.execute

    @wraps(execute)
    def keyed(self: Any, lm: Any, reqtype: str, requests: list[Any]) -> Any:
        if not is_ours(lm):
            return execute(self, lm, reqtype, requests)
        lm.record.add(requests, lm.task_dict)
        stock = self._model_fingerprint_hash
        if lm.fingerprint:
            self._model_fingerprint_hash = f"{stock}-{lm.fingerprint}"
        try:
            if reqtype != "loglikelihood":
                return execute(self, lm, reqtype, requests)
            from .likelihoods import as_results

            return as_results(execute(self, _Pairs(lm), reqtype, requests))
        finally:
            self._model_fingerprint_hash = stock

    cache.execute = keyed


class _Pairs:
    """A steered model whose log-likelihoods are plain pairs, as lmms-eval's cache takes them."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        return [result.text for result in self._lm.loglikelihood(requests)]


def _patch_tracker(module: ModuleType) -> None:
    tracker = module.EvaluationTracker
    if _is_patched(tracker):
        return
    save = tracker.save_results_aggregated

    @wraps(save)
    def save_with_manifest(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        name = self.general_config_tracker.model_source
        if not is_ours(name) or not self.output_path:
            return
        folder = _results_folder(self)
        results = f"{getattr(self, 'date_id', None)}_results.json"
        if not (folder / results).is_file():
            raise _ending(
                HonesError(f"lmms-eval could not write its results into {folder}: its log says why")
            )
        try:
            if registry.latest_record is not None:
                registry.latest_record.write(folder, _name(name), results)
        except Exception as error:
            raise _ending(error) from error

    tracker.save_results_aggregated = save_with_manifest


def _patch_settings(module: ModuleType) -> None:
    """Parse `--gen_kwargs` with lists, and remember them: steered models check that they reach the model."""
    evaluate, parse = module.simple_evaluate, module.simple_parse_args_string
    if "_parses_settings" in vars(module):
        return

    @wraps(evaluate)
    def with_settings(*args: Any, **kwargs: Any) -> Any:
        if not is_ours(kwargs.get("model", args[0] if args else None)):
            return evaluate(*args, **kwargs)
        from .settings import wanted_settings

        given = kwargs.get("gen_kwargs")
        registry.wanted_settings = wanted_settings(given)

        def parsed(text: str) -> Any:
            return registry.wanted_settings if text == given else parse(text)

        try:
            with mock.patch.object(module, "simple_parse_args_string", parsed):
                return evaluate(*args, **kwargs)
        finally:
            registry.wanted_settings = {}

    module._parses_settings = True  # type: ignore[attr-defined]
    module.simple_evaluate = with_settings  # type: ignore[attr-defined]


def _patch_evaluate(module: ModuleType) -> None:
    """Patch the evaluation under the command, which would print a traceback and exit with status 0."""
    if _is_patched(module):
        return
    evaluate = module.simple_evaluate

    @wraps(evaluate)
    def loud(*args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model", args[0] if args else None)
        if not is_ours(model):
            return evaluate(*args, **kwargs)
        from hones_eval.lmms.failures import failing_at_once

        tracker = kwargs.get("evaluation_tracker")
        try:
            if kwargs.get("tasks") == []:  # a folder here has the name of the task
                raise HonesError(
                    "no task was found: lmms-eval read YAML files from a folder with the name after --tasks"
                )
            with failing_at_once():
                results = evaluate(*args, **kwargs)
        except Exception as error:
            _write_manifest(tracker, model, error)
            raise _ending(error, debug=kwargs.get("verbosity") == "DEBUG") from error
        if results is None:  # only the first rank returns results; it writes its manifest with them
            _write_manifest(tracker, model)
        return results

    module.simple_evaluate = loud  # type: ignore[attr-defined]


def _write_manifest(tracker: Any, model: Any, error: Exception | None = None) -> None:
    """Write the manifest of a failed run, or of a rank that saves no results."""
    # Only set once this run's model and tasks are loaded; until then the latest record may be another run's.
    source = getattr(getattr(tracker, "general_config_tracker", None), "model_source", None)
    if registry.latest_record is not None and source and tracker.output_path:
        if error is not None and not registry.latest_record.errors:
            registry.latest_record.add_error(None, error)
        registry.latest_record.write(_results_folder(tracker), _name(model))


def _results_folder(tracker: Any) -> Path:
    return Path(tracker.output_path) / str(tracker.general_config_tracker.model_name_sanitized)


def _ending(error: Exception, *, debug: bool = False) -> BaseException:
    """The exception to raise: under the command one line and exit status 1, elsewhere the error itself."""
    if COMMAND not in sys.modules:
        return error
    from hones_eval.runs.processes import is_about_others, left_alone

    if is_about_others(error):
        error = left_alone(error)
    _close_progress_bars()
    if debug or not isinstance(error, HonesError):
        traceback.print_exception(error)
    message = " ".join(str(error).split())
    kind = "" if isinstance(error, HonesError) else f"{type(error).__name__}: "
    hint = "" if debug else " (--verbosity DEBUG for the traceback)"
    return SystemExit(f"hones-eval: {kind}{message}{hint}")


def _close_progress_bars() -> None:
    """Close progress bars, so that the message has a line of its own, the last of stderr."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()


def _name(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__


def _is_patched(target: Any) -> bool:
    """Whether this was called before with the same class or module."""
    if "_patched_by_hones_eval" in vars(target):
        return True
    target._patched_by_hones_eval = True
    return False
