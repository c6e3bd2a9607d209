"""Time and memory of a large board, on generated logs: `leaderboard_scale.py [RUNS] [EXAMPLES]`.

One baseline and RUNS - 1 steered runs of one task with a right/wrong and a graded metric, with manifests. The
goal is 60 s and 2 GB for 1,000 runs of 5,000 examples. Writing the logs is not counted.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hones_eval.leaderboard import make_board

TASK, BASE = "generated_vqa", "generated/llava"


def write_logs(folder: Path, runs: int, examples: int, changed: float = 0.1) -> int:
    """Write logs as lmms-eval does, quickly; returns their size in bytes.

    `changed` is the share of examples whose score a steered run draws anew.
    """
    place = folder / BASE.replace("/", "__")
    place.mkdir(parents=True)
    generator = np.random.default_rng(0)
    heads = [
        f'{{"doc_id": {k}, "target": "answer {k}", "token_counts": [null], "doc_hash": "{"7" * 64}", '
        f'"input": "What is shown in image {k} of this set, and where? Answer with a short phrase."'
        for k in range(examples)
    ]
    requests = {
        str(k): {"prompt_sha256": f"{k:064x}", "image_sha256": [f"{k + 1:064x}"]} for k in range(examples)
    }
    shown = json.dumps({TASK: requests})
    base = generator.choice([0.0, 0.3, 0.6, 0.9, 1.0], examples, p=[0.4, 0.05, 0.05, 0.1, 0.4])
    size = 0
    for run in range(runs):
        graded = np.where(generator.random(examples) < changed * (run > 0), generator.permutation(base), base)
        date = f"2026{1 + run // 86_400:04d}_{run % 86_400:06d}"
        lines = [
            f'{head}, "filtered_resps": "answer {value}", "exact_match": {float(value == 1)}, '
            f'"vqa": {value}}}\n'
            for head, value in zip(heads, graded.tolist(), strict=True)
        ]
        (place / f"{date}_samples_{TASK}.jsonl").write_text("".join(lines))
        (place / f"{date}_results.json").write_text(json.dumps(_results(run, graded, date)))
        manifest = json.dumps(_manifest(run, date))
        (place / f"hones_manifest_1_{date}_rank0.json").write_text(manifest[:-1] + f', "requests": {shown}}}')
        size += sum(map(len, lines)) + len(shown)
    return size


def _results(run: int, graded: np.ndarray, date: str) -> dict[str, object]:
    arguments = f"pretrained={BASE}" + (f",steering=steerings/{run}" if run else "")
    values = {"exact_match,none": float((graded == 1).mean()), "vqa,none": float(graded.mean())}
    return {
        "results": {TASK: {"alias": TASK} | values},
        "configs": {TASK: {"task": TASK, "test_split": "test"}},
        "higher_is_better": {TASK: {"exact_match": True, "vqa": True}},
        "n-samples": {TASK: {"original": len(graded), "effective": len(graded)}},
        "config": {
            "model": "hones_llava",
            "model_args": arguments,
            "limit": None,
            "offset": 0,
            "random_seed": 0,
        },
        "date": date,
    }


def _manifest(run: int, date: str) -> dict[str, object]:
    steering = {"path": f"steerings/{run}", "digest": f"{run:064x}", "strength": 1.0, "attach": "fold"}
    provenance = {
        "method": "hones",
        "settings": {"how": "fixed"},
        "examples": [{"task": TASK, "split": "train"}],
    }
    return {
        "format": "hones-eval run manifest",
        "format_version": 1,
        "base_model": {"id": BASE, "revision": None},
        "wrapper": "hones_llava",
        "base_wrapper": "llava_hf",
        "steering": steering | {"provenance": provenance} if run else None,
        "errors": [],
        "results": f"{date}_results.json",
        "rank": 0,
        "created": "2026-11-23T00:00:00+00:00",
    }


def main(runs: int = 1000, examples: int = 5000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = write_logs(Path(folder) / "logs", runs, examples)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        began, cpu = time.perf_counter(), os.times()
        board = make_board([Path(folder) / "logs"], Path(folder) / "board")
        seconds, after = time.perf_counter() - began, os.times()
        user, system = after.user - cpu.user, after.system - cpu.system
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        index = (Path(folder) / "board" / "index.html").stat().st_size / 1e6
        print(
            f"{runs:,} runs of {examples:,} examples, {size / 1e9:.2f} GB of logs: {len(board.rows):,} rows"
        )
        print(f"{seconds:.1f} s of wall time, {user:.1f} s user, {system:.1f} s system")
        print(f"{peak:.2f} GB at most ({before:.2f} GB before), index.html {index:.1f} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
