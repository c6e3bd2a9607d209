"""Small things to run lmms-eval on: data sets, a task, a steering, the real command, and its answers."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from PIL import ImageDraw
from transformers import AutoModelForImageTextToText

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.steering import Steering

COLOURS = ["red", "green", "blue", "yellow"]
COMMAND = Path(sys.executable).with_name("lmms-eval")
LMMS_EVAL, HONES_EVAL = "lmms_eval.cli.dispatch", "hones_eval.__main__"
"""Where the two commands have their `main`."""

TASK_YAML = """\
task: tiny_colours
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
  until: ["Question"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
lmms_eval_specific_kwargs:
  default: {{post_prompt: " Answer briefly."}}
  qwen2_5_vl: {{post_prompt: " One word for Qwen."}}
  llava_hf: {{post_prompt: " One word for LLaVA."}}
"""

TASK_UTILS = """\
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs):
    return doc["question"] + lmms_eval_specific_kwargs["post_prompt"]
"""


def picture(index: int) -> dict[str, Any]:
    """A PNG of a coloured shape, no two alike."""
    drawn = Pictures.new("RGB", (64 + 8 * index, 56), "white")
    box = (6 + 5 * index, 8, 36 + 5 * index, 44)
    draw = ImageDraw.Draw(drawn)
    (draw.ellipse if index % 2 else draw.rectangle)(box, fill=COLOURS[index % 4])
    file = io.BytesIO()
    drawn.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def parquet(rows: Sequence[Mapping[str, Any]], **features: Any) -> bytes:
    file = io.BytesIO()
    Dataset.from_list(list(rows), features=Features(features)).to_parquet(file)
    return file.getvalue()


def write_task(folder: Path, count: int = 4) -> Path:
    """Write the task ``tiny_colours`` with its images; it has prompts of its own for two base models."""
    rows = [
        {"image": picture(i), "question": f"What colour is shape {i}?", "answer": COLOURS[i % 4]}
        for i in range(count)
    ]
    text = Value("string")
    folder.mkdir(parents=True)
    (folder / "test.parquet").write_bytes(parquet(rows, image=Image(), question=text, answer=text))
    (folder / "tiny.yaml").write_text(TASK_YAML.format(data=folder / "test.parquet"))
    (folder / "utils.py").write_text(TASK_UTILS)
    return folder


def write_steering(checkpoint: Path, folder: Path, seed: int, *, spread: float = 1.0) -> Steering:
    """Save a steering for a checkpoint, its scales drawn from 1 to ``1 + spread``; 0 scales nothing."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    shape = Anatomy.of(model).shape
    generator = torch.Generator().manual_seed(seed)
    steering = Steering(
        head_scales=1 + spread * torch.rand(shape.layers, shape.heads, generator=generator),
        neuron_scales=1 + spread * torch.rand(shape.layers, shape.neurons, generator=generator),
        provenance=Provenance(str(checkpoint), None, shape, "drawn", {"seed": seed}, []),
    )
    steering.save(folder)
    return steering


def run_command(
    arguments: Sequence[str], cwd: Path, hub_url: str = "http://127.0.0.1:9"
) -> subprocess.CompletedProcess[str]:
    """Run the installed ``lmms-eval`` as a user does, with a hub on the loopback and caches under ``cwd``."""
    env = environment(cwd, hub_url)
    return subprocess.run(
        [str(COMMAND), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def environment(home: Path, hub_url: str) -> dict[str, str]:
    """The variables of a process that asks a hub on the loopback, as nobody, and keeps its caches apart."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LMMS_"))}
    env |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home / "hf_home"), "HF_TOKEN": "hf_nobody"}
    return env | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Ended(NamedTuple):
    """A command's exit status, and what it wrote to stderr and to stdout."""

    status: int
    stderr: str
    stdout: str = ""


SEVERAL = """
import importlib, json, sys
main = importlib.import_module(sys.argv[1]).main
for sys.argv[1:] in json.loads(sys.argv[2]):
    try:
        status = main() or 0
    except SystemExit as ended:
        status = ended.code
        if isinstance(status, str):  # as Python does
            print(status, file=sys.stderr)
            status = 1
    for stream in (sys.stdout, sys.stderr):
        print(f"\\nended with {status}", file=stream, flush=True)
"""


def run_each(
    door: str, commands: Sequence[Sequence[str]], cwd: Path, hub_url: str, **variables: str
) -> list[Ended]:
    """Run several commands in one process, which imports once; `door` is `LMMS_EVAL` or `HONES_EVAL`."""
    program = [sys.executable, "-c", SEVERAL, door, json.dumps(commands)]
    env = environment(cwd, hub_url) | variables
    done = subprocess.run(program, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    errors, printed = (
        re.split(r"^ended with (.*)\n", text, flags=re.MULTILINE) for text in (done.stderr, done.stdout)
    )
    several = zip(errors[1::2], errors[::2], printed[::2], strict=False)
    return [Ended(int(status), stderr, stdout) for status, stderr, stdout in several]


def answers(logs: Path, task: str) -> dict[int, str]:
    """What a run answered, by document, from its samples file."""
    (file,) = logs.glob(f"*/*_samples_{task}.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


def prompts(logs: Path, task: str) -> dict[int, str]:
    (file,) = logs.glob(f"*/*_samples_{task}.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return {sample["doc_id"]: sample["input"] for sample in samples}


def manifest(logs: Path) -> dict[str, Any]:
    (file,) = logs.glob("*/hones_manifest_*_rank0.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content
