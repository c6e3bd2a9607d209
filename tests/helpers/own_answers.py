"""Tasks whose gold answers a small random model gives itself, so that it has something to lose.

Every fourth gold answer is another one, so that some answers are wrong.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset, Image, Value
from lmms_runs import parquet, picture

from hones_eval.__main__ import main
from hones_eval.core.ranking import Ranking
from hones_eval.engine.prompts import own_tokens
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm

YAML = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def gold(doc):
    return doc["answer"]
"""
QUESTIONS = {"own_a": "What colour is shape {}?", "own_b": "How many {} are there in the picture?"}
MODEL = "llava_hf"
WRONG = "green plate"


class Prepared(NamedTuple):
    """The tasks, and rankings of ``own_a`` by HONES and V-SEAM from its first four examples."""

    tasks: Path
    rankings: Path
    model_args: str

    def command(self, name: str, *others: Any, task: str = "own_a") -> list[str]:
        """Arguments of a command on one of the tasks."""
        shared = ["--model", MODEL, "--model_args", self.model_args, "--include_path", self.tasks]
        return [name, *map(str, [*shared, "--tasks", task, *others])]


@lru_cache
def prepared(folder: Path, model_args: str) -> Prepared:
    """Twelve examples of each task and two rankings, made once for all test files."""
    own = Prepared(folder / "own_tasks", folder / "own_rankings", model_args)
    write_tasks(own.tasks, MODEL, model_args, 12)
    for method in ("hones", "vseam"):
        chosen = ["--limit", 4, "--heads", 4, "--neurons", 0.05, "--out", own.rankings / method]
        assert main(own.command("rank", "--method", method, *chosen)) == 0
    return own


def complaint(stderr: str) -> str:
    """The one line by which a command says why it failed."""
    (line,) = [one for one in stderr.splitlines() if one.startswith("hones-eval:")]
    return line


def write_tasks(folder: Path, model: str, model_args: str, count: int) -> Path:
    """Write the tasks ``own_a`` and ``own_b``, about the same ``count`` pictures, into ``folder``."""
    folder.mkdir(parents=True)
    (folder / "utils.py").write_text(UTILS)
    lmm = load_lmm(model, model_args)
    for name in QUESTIONS:
        _write(folder, name, ["unknown"] * count)
        examples = TaskExamples(lmm, name, model_name=model, include_path=folder)
        answers = [_answer(lmm, examples, i) for i in range(count)]
        assert len(set(answers)) > 1
        assert all(answers)
        _write(folder, name, [WRONG if i % 4 == 3 else answer for i, answer in enumerate(answers)])
    return folder


def _write(folder: Path, name: str, golds: list[str]) -> None:
    # A new file each time: `datasets` keeps what it has read by name and time.
    data = folder / f"{name}_{'first' if golds[0] == 'unknown' else 'second'}.parquet"
    question = QUESTIONS[name]
    rows = [
        {"image": picture(i), "question": question.format(i), "answer": gold} for i, gold in enumerate(golds)
    ]
    data.write_bytes(parquet(rows, image=Image(), question=Value("string"), answer=Value("string")))
    (folder / f"{name}.yaml").write_text(YAML.format(name=name, data=data))


def _answer(lmm: Any, examples: TaskExamples, index: int) -> str:
    example = examples[index]
    output = inner_model(lmm).generate(**example.inputs, **example.settings)
    return examples.decode(index, output[0, own_tokens(example.inputs).shape[1] :].tolist()).strip()


def write_splits(
    tasks: Path, folder: Path, parts: Mapping[str, tuple[int, int]], without_answer: Sequence[int] = ()
) -> None:
    """Cut both tasks into tasks of their own, called by the task's name and a suffix.

    Where answers are left out, a function gives them: a file's empty column is refused before that.
    """
    target = "!function utils.gold" if without_answer else "answer"
    folder.mkdir(parents=True)
    (folder / "utils.py").write_text(UTILS)
    for name in QUESTIONS:
        rows = Dataset.from_parquet(str(tasks / f"{name}_second.parquet"))
        golds = ["" if i in without_answer else gold for i, gold in enumerate(rows["answer"])]
        rows = rows.remove_columns("answer").add_column("answer", golds)
        for suffix, (start, end) in parts.items():
            data = folder / f"{name}{suffix}.parquet"
            rows.select(range(start, end)).to_parquet(data)
            text = YAML.format(name=f"{name}{suffix}", data=data)
            (folder / f"{name}{suffix}.yaml").write_text(text.replace("target: answer", f"target: {target}"))


def assert_same_ranking(one: Ranking, two: Ranking) -> None:
    """Equal rankings, numbers up to the order of additions."""
    _assert_same(one.report, two.report)
    assert two.provenance == one.provenance
    for name in ("head_scores", "head_log_probability", "neuron_scores"):
        mine, theirs = getattr(two, name), getattr(one, name)
        assert mine.abs().max() > 0
        # Sums are float64: only the last bit of the stored float32 may round another way.
        torch.testing.assert_close(mine, theirs, rtol=1.2e-7, atol=1e-9)
    assert two.heads(6) == one.heads(6)
    assert two.neurons() == one.neurons()


def _assert_same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            _assert_same(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            _assert_same(first, second)
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-6)
    else:
        assert one == two
