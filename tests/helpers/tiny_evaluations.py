"""Evaluations of a small task by lmms-eval in this process, with a task file that a test may change."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Image, Value
from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager
from lmms_runs import COLOURS, parquet, picture

from hones_eval.model_wrappers import registry

TASK = """\
task: small
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {generation}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
{more}
"""
UTILS = """\
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]
"""


class Evaluated(NamedTuple):
    """The samples by document, and the content of the run manifest."""

    samples: dict[int, Any]
    manifest: dict[str, Any]

    @property
    def answers(self) -> list[str]:
        return [self.samples[doc_id]["filtered_resps"][0] for doc_id in sorted(self.samples)]


def write_small(
    folder: Path,
    *,
    generation: Mapping[str, Any] | None = None,
    more: str = "",
    count: int = 3,
    utils: str = UTILS,
) -> Path:
    """Write the task `small` with settings of generation and more lines of YAML."""
    text = Value("string")
    rows = [
        {"image": picture(i), "question": f"What colour is shape {i}?", "answer": COLOURS[i % 4]}
        for i in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.parquet").write_bytes(parquet(rows, image=Image(), question=text, answer=text))
    settings = json.dumps({"max_new_tokens": 4, **(generation or {})})
    (folder / "small.yaml").write_text(
        TASK.format(data=folder / "test.parquet", generation=settings, more=more)
    )
    (folder / "utils.py").write_text(utils)
    return folder


def evaluated(model: str, model_args: str, folder: Path, out: Path, **settings: Any) -> Evaluated:
    """Evaluate `small` as lmms-eval does."""
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name=model)
    results = evaluator.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=["small"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        **settings,
    )
    assert registry.latest_record is not None
    manifest = json.loads(registry.latest_record.write(out, model, "results.json").read_text())
    return Evaluated({sample["doc_id"]: sample for sample in results["samples"]["small"]}, manifest)
