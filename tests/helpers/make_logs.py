"""Output folders as lmms-eval 0.7.3 writes them, made quickly; a test holds them to real ones."""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hones_eval.core.images import image_hash

DOC_HASH = "74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b"
COLOURS = ("red", "green", "blue", "yellow")
ResultOf = Callable[[str, str], Any]


def exact(answer: str, gold: str) -> float:
    return float(answer == gold)


def item(answer: str, gold: str) -> dict[str, Any]:
    """A corpus metric's entry, as lmms-eval's pope has it."""
    return {"score": float(answer == gold), "prediction": answer, "ground_truth": gold}


@dataclass(frozen=True)
class Questions:
    """A task's examples."""

    task: str
    texts: Sequence[str]
    golds: Sequence[str]
    images: Sequence[Image.Image] = ()

    @classmethod
    def drawn(
        cls, task: str = "shapes", count: int = 40, *, per_image: int = 1, seed: int = 0
    ) -> "Questions":
        """Yes/no questions about drawn shapes, `per_image` of them on each image."""
        generator = np.random.default_rng(seed)
        colours = [COLOURS[int(k)] for k in generator.integers(0, 4, -(-count // per_image))]
        asked = [COLOURS[int(k)] for k in generator.integers(0, 4, count)]
        images = [shape(colour, k) for k, colour in enumerate(colours)]
        shown = [k // per_image for k in range(count)]
        return cls(
            task,
            [f"Is the shape in image {shown[k]} {asked[k]}?" for k in range(count)],
            ["yes" if colours[shown[k]] == asked[k] else "no" for k in range(count)],
            [images[k] for k in shown],
        )

    def answers(self, right: float, seed: int) -> list[str]:
        """Answers of which about the share `right` are right."""
        drawn = np.random.default_rng(seed).random(len(self.golds)) < right
        return [
            gold if ok else "no" if gold == "yes" else "yes"
            for gold, ok in zip(self.golds, drawn, strict=True)
        ]


def shape(colour: str, k: int) -> Image.Image:
    image = Image.new("RGB", (96, 72), (245, 245, 240))
    draw = ImageDraw.Draw(image)
    (draw.ellipse if k % 2 else draw.rectangle)(
        (20 + k % 17, 12, 64 + k % 17, 56), fill=colour, outline="black"
    )
    draw.point((k % 96, k // 96), fill=(k % 256, 7, 9))  # no two alike
    return image


@dataclass(frozen=True)
class Steered:
    """What a manifest says of a steering."""

    path: str = "steerings/one"
    digest: str = "d1" * 32
    strength: float = 1.0
    attach: str = "fold"
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_run(
    folder: Path,
    questions: Questions,
    answers: Sequence[Any],
    *,
    steered: Steered | None = None,
    base: str = "tiny/llava",
    model: str = "hones_llava",
    date: str = "20260102_030405",
    metrics: Mapping[str, ResultOf] | None = None,
    reported: Mapping[str, Any] | None = None,
    aggregation: str = "mean",
    higher_is_better: bool = True,
    seeds: Sequence[int] = (0, 1234, 1234, 1234),
    limit: int | float | None = None,
    size: int | None = None,
    config: Mapping[str, Any] | None = None,
    manifest: bool = True,
    errors: Sequence[Mapping[str, Any]] = (),
    more_args: str = "",
    media: bool = False,
    weights: str | None = None,
) -> Path:
    """Write results, samples and manifest of one task; returns the results file.

    With `media`, the samples hold the images, as lmms-eval writes those that come as bytes.
    `metrics` maps a metric to what `process_results` gives for an answer; `reported` overrides the aggregated
    values, which are means of the numbers (or of the items' `score`).
    """
    metrics = metrics or {"exact_match": exact}
    place = folder / base.replace("/", "__")
    place.mkdir(parents=True, exist_ok=True)
    rows = [
        _sample(
            k,
            questions,
            answer,
            {name: result(answer, questions.golds[k]) for name, result in metrics.items()},
        )
        for k, answer in enumerate(answers)
    ]
    for row, image in zip(rows, questions.images if media else (), strict=False):
        row["input_media"] = [data_uri(image)]
    with (place / f"{date}_samples_{questions.task}.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    values = {name: _mean([row[name] for row in rows]) for name in metrics} | dict(reported or {})
    arguments = f"pretrained={base}" + (f",steering={steered.path}" if steered else "") + more_args
    if steered and steered.strength != 1:
        arguments += f",strength={steered.strength}"
    results = place / f"{date}_results.json"
    content = {
        "results": {questions.task: {"alias": questions.task} | _reported(values)},
        "group_subtasks": {questions.task: []},
        "configs": {questions.task: _task_config(questions.task, list(metrics), aggregation)},
        "versions": {questions.task: 0.0},
        "n-shot": {questions.task: 0},
        "higher_is_better": {questions.task: dict.fromkeys(metrics, higher_is_better)},
        "n-samples": {questions.task: {"original": size or len(questions.golds), "effective": len(answers)}},
        "config": _config(model, arguments, limit, seeds) | dict(config or {}),
        "date": date,
        "usage": {},
        "model_name": base,
    }
    results.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    if manifest:
        _write_manifest(place, questions, len(rows), steered, base, model, date, errors, weights)
    return results


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _sample(k: int, questions: Questions, answer: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "doc_id": k,
        "target": questions.golds[k],
        "filtered_resps": answer,
        "token_counts": [None],
        "doc_hash": DOC_HASH,
        **values,
        "input": questions.texts[k],
    }


def _mean(values: Sequence[Any]) -> float:
    numbers = [value["score"] if isinstance(value, Mapping) else value for value in values]
    return sum(numbers) / len(numbers) if all(isinstance(one, int | float) for one in numbers) else 0.5


def _reported(values: Mapping[str, Any]) -> dict[str, Any]:
    listed: dict[str, Any] = {}
    for name, value in values.items():
        listed |= {f"{name},none": value, f"{name}_stderr,none": 0.01, f"{name}_stderr_clt,none": 0.01}
    return listed


def _task_config(task: str, metrics: Sequence[str], aggregation: str) -> dict[str, Any]:
    return {
        "task": task,
        "dataset_path": "parquet",
        "test_split": "test",
        "doc_to_visual": "<function visual at 0x7fd44c92bd80>",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": one, "aggregation": aggregation, "higher_is_better": True} for one in metrics
        ],
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": 8, "until": ["\n"]},
        "repeats": 1,
        "score_key": "score",
    }


def _config(model: str, arguments: str, limit: int | float | None, seeds: Sequence[int]) -> dict[str, Any]:
    names = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    return {
        "model": model,
        "model_args": arguments,
        "batch_size": 1,
        "device": None,
        "use_cache": None,
        "limit": limit,
        "offset": 0,
        "gen_kwargs": "",
        **dict(zip(names, seeds, strict=True)),
        "resolved_cli_args": {"timezone": "Asia/Singapore", "log_samples": True},
    }


def _write_manifest(
    place: Path,
    questions: Questions,
    count: int,
    steered: Steered | None,
    base: str,
    model: str,
    date: str,
    errors: Sequence[Mapping[str, Any]],
    weights: str | None,
) -> None:
    hashes = _hashes(tuple(questions.images[:count]))
    requests = {
        str(k): {
            "prompt_sha256": hashlib.sha256(questions.texts[k].encode()).hexdigest(),
            "image_sha256": [hashes[k]] if hashes else [],
        }
        for k in range(count)
    }
    created = datetime.strptime(date + "+0800", "%Y%m%d_%H%M%S%z") + timedelta(seconds=5)
    content = {
        "format": "hones-eval run manifest",
        "format_version": 1,
        "package_version": "0.1.0",
        "lmms_eval_version": "0.7.3",
        "torch_version": "2.14.1",
        "transformers_version": "5.23.0",
        "base_model": {"id": base, "revision": None, "weights": weights},
        "wrapper": model,
        "base_wrapper": "llava_hf",
        "steering": None
        if steered is None
        else {
            "path": steered.path,
            "digest": steered.digest,
            "strength": steered.strength,
            "attach": steered.attach,
            "provenance": dict(steered.provenance),
        },
        "requests": {questions.task: requests},
        "errors": list(errors),
        "results": f"{date}_results.json",
        "rank": 0,
        "created": created.isoformat(),
    }
    (place / f"hones_manifest_77_{date}_{questions.task}_rank0.json").write_text(json.dumps(content))


_HASHES: dict[int, tuple[Image.Image, str]] = {}  # with the image, so that its id is not given again


def _hashes(images: Sequence[Image.Image]) -> list[str]:
    for image in images:
        if id(image) not in _HASHES:
            _HASHES[id(image)] = (image, image_hash(image))
    return [_HASHES[id(image)][1] for image in images]


def provenance(
    task: str, *, how: str = "fixed", images: Sequence[str] = (), ids: Sequence[int] = ()
) -> dict[str, Any]:
    """A steering's provenance, chosen on `task`."""
    examples = {"task": task, "split": "discovery", "count": 100, "offset": 0, "hash": "e" * 64}
    return {
        "base_model": "tiny/llava",
        "revision": None,
        "method": "hones",
        "settings": {"how": how, "factor": 2.0},
        "examples": [examples | {"doc_ids": list(ids), "image_hashes": list(images)}],
        "seed": 0,
    }


def save_steering(folder: Path, layers: int = 12, heads: int = 8, neurons: int = 64, seed: int = 0) -> str:
    """Save a steering of a few heads and neurons; returns its digest."""
    import torch

    from hones_eval.core.artifact import ModelShape, Provenance
    from hones_eval.core.steering import Steering

    generator = torch.Generator().manual_seed(seed)
    head_scales = torch.ones(layers, heads)
    for place in torch.randperm(layers * heads, generator=generator)[:9].tolist():
        head_scales.view(-1)[place] = [1.6, 0.4, 2.0][place % 3]
    neuron_scales = torch.ones(layers, neurons)
    late = torch.rand(layers, neurons, generator=generator) * torch.linspace(0.2, 1, layers)[:, None]
    neuron_scales[late > 0.8] = 2.0
    shape = ModelShape(layers, heads, 16, heads * 16, neurons, 500)
    steering = Steering(head_scales, neuron_scales, Provenance("tiny/llava", None, shape, "hones", {}, []))
    steering.save(folder)
    return steering.digest
