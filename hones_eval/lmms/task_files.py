"""Checks a user's task file before lmms-eval reads it: a mistake is one line with file, key and form.

lmms-eval itself ends with a traceback, takes a misspelt column for a constant text, or ignores a metric.
Built-in tasks are not checked, and neither is the code of a file's `!function`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lmms_eval.tasks
import yaml
from datasets import Dataset, Image, List, Value
from jinja2 import Environment, TemplateSyntaxError, meta
from lmms_eval import utils
from lmms_eval.api import metrics as _  # noqa: F401  registers them
from lmms_eval.api.registry import AGGREGATION_REGISTRY
from lmms_eval.api.task import ALL_OUTPUT_TYPES, TaskConfig, _resolve_hf_datasets_cache_dir
from transformers import GenerationConfig
from yaml import ScalarNode

from hones_eval.errors import TaskError, first_line
from hones_eval.lmms.answers.registry import own_settings

LOCAL = ("imagefolder", "csv", "json", "parquet", "arrow", "text")
"""Builders of `datasets` that read local files."""
METRICS = {
    "generate_until": ("exact_match", "anls", "bleu", "chrf", "ter"),
    "multiple_choice": ("acc", "acc_norm", "exact_match", "f1", "mcc"),
}
"""lmms-eval's metrics for answers and for choices, which its registry does not tell apart."""


class Form(NamedTuple):
    """The expected types of a key in a task file, and their description."""

    types: tuple[type, ...]
    text: str


FORMS = {
    "task": Form((str,), "a name, task: my_task"),
    "dataset_path": Form((str,), "imagefolder, csv, json, parquet or the id of a data set on the hub"),
    "dataset_kwargs": Form((dict,), "a mapping, such as {data_dir: /path/to/folder}"),
    "test_split": Form((str,), "the name of a split, such as train"),
    "validation_split": Form((str,), "the name of a split, such as train"),
    "doc_to_visual": Form((str, ScalarNode), "a column of images, or !function"),
    "doc_to_text": Form(
        (str, ScalarNode), 'a column, a template such as "{{question}} Answer:", or !function'
    ),
    "doc_to_target": Form(
        (str, int, ScalarNode), "a column, a template, the position of the right choice, or !function"
    ),
    "metric_list": Form((list,), "a list of mappings, such as - metric: exact_match"),
    "generation_kwargs": Form((dict,), "a mapping, such as {max_new_tokens: 16}"),
    "doc_to_choice": Form(
        (str, list, dict, ScalarNode), 'a column of lists, a list such as ["yes", "no"], or !function'
    ),
    "output_type": Form((str,), " or ".join(METRICS)),
}
REQUIRED = ("task", "dataset_path", "doc_to_text", "doc_to_target")
WRAPPER_SETTINGS = {"until", "image_aspect_ratio", "max_gen_toks"}
"""Settings in `generation_kwargs` that wrappers take in addition to those of transformers."""


def users_file(manager: Any, task: str) -> Path | None:
    """The YAML file of a task that is in neither lmms-eval nor this package; `manager` is lmms-eval's."""
    entry = manager.task_index.get(task, {})
    path = Path(str(entry.get("yaml_path"))).resolve()
    if entry.get("type") != "task" or any(path.is_relative_to(folder) for folder in _built_in()):
        return None
    return path


def _built_in() -> list[Path]:
    spec = find_spec("hones_eval.tasks")
    ours = list(spec.submodule_search_locations or []) if spec else []
    return [Path(folder).resolve() for folder in (*ours, *lmms_eval.tasks.__path__)]


def check_task_file(path: Path) -> None:
    """Check a task's YAML file and, where its data are local, the columns and images that it names.

    Raises: TaskError with the file, the key and the expected form.
    """
    config = read_task_file(path)
    _check_keys(path, config)
    _check_forms(path, config)
    output_type = config.get("output_type", "generate_until")
    if output_type not in ALL_OUTPUT_TYPES:
        text = FORMS["output_type"].text
        raise TaskError(
            f"{path}: output_type: {output_type!r} should be {text}{_hint(str(output_type), METRICS)}"
        )
    if output_type in METRICS:
        _check_metrics(path, config, METRICS[output_type])
    if output_type == "multiple_choice" and config.get("doc_to_choice") is None:
        raise TaskError(f"{path}: doc_to_choice: missing; it should be {FORMS['doc_to_choice'].text}")
    _check_generation(path, config.get("generation_kwargs") or {})
    if config["dataset_path"] in LOCAL and "process_docs" not in config:
        _check_columns(path, config, _split(path, config))


def read_task_file(path: Path) -> dict[str, Any]:
    """The content of a task file and the files it includes; `!function` values stay YAML nodes."""
    try:
        return dict(utils.load_yaml_config(str(path), mode="simple"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else str(path)
        raise TaskError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or first_line(error)}"
        ) from None
    except FileNotFoundError as error:
        raise TaskError(
            f"{path}: include: there is no file {error.filename}, also not next to this one"
        ) from None
    except Exception as error:
        raise TaskError(
            f"{path} is not an lmms-eval task: {type(error).__name__}: {first_line(error)}"
        ) from error


def broken_file(folder: Path) -> TaskError | None:
    """The error of the first file of a folder that lmms-eval cannot read; lmms-eval's may name none."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            read_task_file(path)
        except TaskError as error:
            return error
    return None


def _check_keys(path: Path, config: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(TaskConfig)]
    for key in config:
        if key not in known:
            raise TaskError(f"{path}: {key}: unknown to lmms-eval{_hint(str(key), known)}")
    missing = next((key for key in REQUIRED if config.get(key) is None), None)
    if missing:
        raise TaskError(f"{path}: {missing}: missing; it should be {FORMS[missing].text}")
    if not (config.get("test_split") or config.get("validation_split")):
        raise TaskError(f"{path}: test_split: missing; it should be {FORMS['test_split'].text}")


def _check_forms(path: Path, config: Mapping[str, Any]) -> None:
    for key, form in FORMS.items():
        value = config.get(key)
        if value is not None and not isinstance(value, form.types):
            raise TaskError(f"{path}: {key}: {value!r} should be {form.text}")


def _check_metrics(path: Path, config: Mapping[str, Any], known: Sequence[str]) -> None:
    for number, entry in enumerate(config.get("metric_list") or []):
        key = f"metric_list[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str | ScalarNode):
            raise TaskError(f"{path}: {key}: {entry!r} should be a mapping with a metric, metric: {known[0]}")
        name, own = entry["metric"], config.get("process_results") is not None
        if isinstance(name, str) and not own and name not in known:
            raise TaskError(
                f"{path}: {key}.metric: {name!r} should be one of {', '.join(known)}"
                f"{_hint(name, known)}; others need process_results: !function"
            )
        aggregation = entry.get("aggregation")
        if aggregation is None and own:
            raise TaskError(f"{path}: {key}.aggregation: missing; it should be mean, or !function")
        given = aggregation is not None and not isinstance(aggregation, ScalarNode)
        if given and aggregation not in AGGREGATION_REGISTRY:
            raise TaskError(
                f"{path}: {key}.aggregation: {aggregation!r} should be mean, median, or !function"
            )
        higher = entry.get("higher_is_better", True)
        if not isinstance(higher, bool):
            raise TaskError(f"{path}: {key}.higher_is_better: {higher!r} should be true or false")


def _check_generation(path: Path, settings: Mapping[str, Any]) -> None:
    known = [*GenerationConfig().to_dict(), *WRAPPER_SETTINGS, *own_settings()]
    for key in settings:
        if key not in known and _hint(str(key), known):  # a wrapper may take others
            raise TaskError(f"{path}: generation_kwargs.{key}: no such setting{_hint(str(key), known)}")
    for key in ("max_new_tokens", "num_beams"):
        if key in settings and type(settings[key]) is not int:
            raise TaskError(f"{path}: generation_kwargs.{key}: {settings[key]!r} should be a whole number")


def _split(path: Path, config: Mapping[str, Any]) -> Dataset:
    """The split that is evaluated; reading it also puts it into the cache that lmms-eval uses."""
    settings = dict(config.get("dataset_kwargs") or {})
    folder = settings.get("data_dir")
    if folder is not None and not Path(folder).is_dir():
        raise TaskError(
            f"{path}: dataset_kwargs.data_dir: {folder} should be a folder, absolute or as seen from "
            f"{Path.cwd()}"
        )
    settings.setdefault("cache_dir", _resolve_hf_datasets_cache_dir())
    try:
        found = datasets.load_dataset(config["dataset_path"], config.get("dataset_name"), **settings)
    except Exception as error:
        reason = error.__cause__ or error
        raise TaskError(
            f"{path}: dataset_kwargs: {config['dataset_path']} cannot read {config.get('dataset_kwargs')}: "
            f"{type(reason).__name__}: {first_line(reason)}{_table_hint(reason)}"
        ) from error
    key = "test_split" if config.get("test_split") else "validation_split"
    if config[key] not in found:
        raise TaskError(f"{path}: {key}: {config[key]!r} should be one of the splits: {', '.join(found)}")
    return found[config[key]]


def _table_hint(reason: BaseException) -> str:
    """The way out for typical mistakes of a table saved as CSV by a spreadsheet."""
    if isinstance(reason, UnicodeDecodeError):
        return "; save the table as UTF-8"
    if "file_name" in str(reason):
        return "; the table's first line names the columns, with commas between them"
    return ""


def _check_columns(path: Path, config: Mapping[str, Any], rows: Dataset) -> None:
    has = f"the columns are {', '.join(rows.column_names)}"
    used = set[str]()
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        value = config.get(key)
        if not isinstance(value, str):
            continue
        named = _named(path, key, value, rows)
        missing = next((column for column in named if column not in rows.column_names), None)
        if missing:
            hint = _hint(missing, rows.column_names)
            raise TaskError(f"{path}: {key}: {missing!r} should be a column{hint}; {has}")
        used |= named
    for column in sorted(used):
        empty = [number for number, value in enumerate(rows[column]) if value in (None, "")]
        if empty:
            raise TaskError(
                f"{path}: column {column}: {len(empty)} of {len(rows)} rows have no value, the first is row "
                f"{empty[0]} from 0 (in a CSV file NA, None and null are read as none: write JSON lines)"
            )
    _check_answers(path, config, rows)
    _check_choices(path, config, rows)
    _check_images(path, config.get("doc_to_visual"), rows, has)


OF_ONE_REFERENCE = ("bleu", "chrf", "ter")
"""lmms-eval's metrics that fail on an example with several gold answers."""


def _check_answers(path: Path, config: Mapping[str, Any], rows: Dataset) -> None:
    """Refuse gold answers that lmms-eval's metrics of texts count as wrong, or fail on."""
    target = config["doc_to_target"]
    chooses = config.get("output_type", "generate_until") != "generate_until"
    if chooses or config.get("process_results") is not None or target not in rows.column_names:
        return
    feature = rows.features[target]
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float")):
        raise TaskError(
            f"{path}: doc_to_target: column {target!r} contains numbers, which never equal an answer in "
            f'words; use a template: doc_to_target: "{{{{{target}}}}}"'
        )
    metrics = [entry.get("metric") for entry in config.get("metric_list") or []]
    several = next((metric for metric in metrics if metric in OF_ONE_REFERENCE), None)
    if several and isinstance(feature, List):
        raise TaskError(
            f"{path}: doc_to_target: column {target!r} contains lists, and {several} takes one gold answer "
            "per example; name a column of texts, or score with process_results: !function"
        )


def _check_choices(path: Path, config: Mapping[str, Any], rows: Dataset) -> None:
    """Refuse choices that are not at least two texts per example."""
    named = config.get("doc_to_choice")
    if isinstance(named, list):
        examples = [named]
    elif named in rows.column_names:
        examples = list(rows[named])
    else:
        return
    for number, choices in enumerate(examples):
        texts = isinstance(choices, list) and all(isinstance(text, str) and text.strip() for text in choices)
        if not texts or len(choices) < 2:
            where = "" if isinstance(named, list) else f" in row {number} from 0"
            raise TaskError(
                f"{path}: doc_to_choice: {choices!r}{where} should be a list of at least two texts, none of "
                "them empty; write numbers in quotes"
            )


def _named(path: Path, key: str, value: str, rows: Dataset) -> set[str]:
    """The columns that a text names: itself where it is one word, otherwise those in its template."""
    if value in rows.column_names or value.isidentifier():
        return {value}
    try:
        return meta.find_undeclared_variables(Environment().parse(value))
    except TemplateSyntaxError as error:
        raise TaskError(f"{path}: {key}: {value!r} is not a Jinja template: {error}") from None


def _check_images(path: Path, column: Any, rows: Dataset, has: str) -> None:
    if not isinstance(column, str):
        return
    if column not in rows.column_names:
        hint = _hint(column, rows.column_names)
        raise TaskError(f"{path}: doc_to_visual: {column!r} should be a column of images{hint}; {has}")
    if not isinstance(rows.features[column], Image):
        raise TaskError(
            f"{path}: doc_to_visual: column {column!r} should contain images, which dataset_path: "
            "imagefolder makes from a column file_name"
        )
    images = enumerate(rows.cast_column(column, Image(decode=False))[column])
    missing = [(row, image and image["path"]) for row, image in images if not _exists(image)]
    if missing:
        row, name = missing[0]
        raise TaskError(
            f"{path}: doc_to_visual: {len(missing)} of {len(rows)} images are missing, the first is "
            f"{name} of row {row} from 0; file_name should be relative to the table that names it"
        )


def _exists(image: dict[str, Any] | None) -> bool:
    return image is not None and (bool(image["bytes"]) or Path(image["path"]).is_file())


def _hint(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
