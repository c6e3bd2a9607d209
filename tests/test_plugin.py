"""The plug-in as lmms-eval finds it: the real command, in its own processes, on built-in tasks."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import benchmark_data
import pytest
import yaml
from hub import serving
from lmms_eval.cli import dispatch
from lmms_eval.models import MODEL_REGISTRY_V2, get_model_manifest
from lmms_eval.tasks import TaskManager
from lmms_runs import (
    answers,
    manifest,
    prompts,
    run_command,
    write_steering,
    write_task,
)
from PIL import Image

from hones_eval.core.steering import Steering
from hones_eval.model_wrappers import plugin, registry

BUILT_IN = ("vqav2_val", "pope", "refcoco_bbox_rec_val")


@pytest.fixture(scope="session")
def hub_url() -> Iterator[str]:
    with serving(benchmark_data.repositories()) as url:
        yield url


def evaluation(model: str, model_args: str, logs: str, **more: object) -> dict[str, object]:
    return {
        "model": model,
        "model_args": model_args,
        "tasks": ",".join(BUILT_IN),
        "limit": 3,
        "gen_kwargs": "max_new_tokens=6",
        "log_samples": True,
        "output_path": logs,
        **more,
    }


def run_all(folder: Path, hub_url: str, evaluations: list[dict[str, object]]) -> str:
    """Run several evaluations in one process of the command, and return its output."""
    (folder / "config.yaml").write_text(yaml.safe_dump(evaluations))
    done = run_command(["--config", "config.yaml"], folder, hub_url)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory, hub_url: str, llava_checkpoint: Path) -> Path:
    """Stock, baseline and steered runs; the steered one fills a cache."""
    folder = tmp_path_factory.mktemp("runs")
    write_steering(llava_checkpoint, folder / "steering", seed=1)
    ours = f"pretrained={llava_checkpoint}"
    steered = evaluation("hones_llava", f"{ours},steering=steering", "steered", use_cache="cache")
    stock = evaluation("llava_hf", f"{ours},device=cpu,device_map=cpu", "stock")
    run_all(folder, hub_url, [stock, evaluation("vseam_llava", ours, "baseline"), steered])
    return folder


@pytest.fixture(scope="session")
def second(first: Path, hub_url: str, llava_checkpoint: Path) -> Path:
    """The same steered run after the steering was edited in place, with the cache and without."""
    write_steering(llava_checkpoint, first / "steering", seed=2)
    ours = f"pretrained={llava_checkpoint},steering=steering"
    edited = evaluation("hones_llava", ours, "edited", use_cache="cache")
    fresh = evaluation("hones_llava", f"{ours},attach=fold", "fresh")
    run_all(first, hub_url, [edited, fresh])
    return first


@pytest.mark.parametrize("task", BUILT_IN)
def test_the_baseline_is_the_stock_model_and_the_steered_model_is_not(first: Path, task: str) -> None:
    stock = answers(first / "stock", task)
    assert len(stock) == 3
    assert answers(first / "baseline", task) == stock
    assert prompts(first / "baseline", task) == prompts(first / "stock", task)
    assert answers(first / "steered", task) != stock
    assert prompts(first / "steered", task) == prompts(first / "stock", task)


@pytest.mark.parametrize("task", BUILT_IN)
def test_a_steering_edited_in_place_gets_no_stale_answers(second: Path, task: str) -> None:
    assert answers(second / "edited", task) == answers(second / "fresh", task)
    assert answers(second / "edited", task) != answers(second / "steered", task)


def test_manifests_record_the_run(second: Path, llava_checkpoint: Path) -> None:
    baseline, steered, edited = (manifest(second / run) for run in ("baseline", "steered", "edited"))
    assert (baseline["wrapper"], baseline["base_wrapper"]) == ("vseam_llava", "llava_hf")
    weights = baseline["base_model"].pop("weights")
    assert weights.startswith("sha256-float32-")
    assert steered["base_model"]["weights"] == edited["base_model"]["weights"] == weights
    assert baseline["base_model"] == {"id": str(llava_checkpoint), "revision": None}
    assert baseline["steering"] is None
    assert baseline["requests"] == steered["requests"] == edited["requests"]
    assert sorted(baseline["requests"]) == sorted(BUILT_IN)
    assert edited["steering"]["digest"] == Steering.load(second / "steering").digest
    assert steered["steering"]["digest"] != edited["steering"]["digest"]
    assert edited["steering"]["provenance"]["settings"] == {"seed": 2}
    for name, run in (("baseline", baseline), ("steered", steered), ("edited", edited)):
        assert run["errors"] == []
        assert list((second / name).glob(f"*/{run['results']}"))


def test_manifests_hash_prompts_and_images(first: Path) -> None:
    shown = manifest(first / "baseline")["requests"]["pope"]
    for doc_id in range(3):
        pixels = Image.open(BytesIO(benchmark_data.shown(doc_id)["bytes"])).convert("RGB")
        expected = hashlib.sha256(f"{pixels.width}x{pixels.height}:".encode() + pixels.tobytes())
        assert shown[str(doc_id)]["image_sha256"] == [expected.hexdigest()]
    # The first question is about a star, the second and the third are about a cross.
    hashes = [shown[str(doc_id)]["prompt_sha256"] for doc_id in range(3)]
    assert hashes[0] != hashes[1] == hashes[2]


def test_a_swallowed_failure_ends_the_command(tmp_path: Path, llava_checkpoint: Path) -> None:
    """`llava_hf` answers with an empty string when `generate` raises; the command would then exit with 0."""
    tasks = write_task(tmp_path / "tasks")
    model = ["--model", "hones_llava", "--model_args", f"pretrained={llava_checkpoint}"]
    task = ["--tasks", "tiny_colours", "--include_path", str(tasks), "--gen_kwargs", "num_beams=0"]
    done = run_command([*model, *task, "--log_samples", "--output_path", "logs"], tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("hones-eval: llava_hf, task tiny_colours, doc 0: ZeroDivisionError:"), last
    assert "Traceback" not in done.stderr
    (error,) = manifest(tmp_path / "logs")["errors"]
    assert (error["task"], error["doc_id"]) == ("tiny_colours", 0)
    assert manifest(tmp_path / "logs")["results"] is None
    assert not list(tmp_path.glob("logs/*/*_results.json"))


def test_a_typo_in_model_args_ends_the_command(
    tmp_path: Path,
    llava_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """lmms-eval prints an assertion and exits with 0; steered models exit with 1 and a hint."""
    tasks = write_task(tmp_path / "tasks")
    model = ["--model", "hones_llava", "--model_args", f"pretrained={llava_checkpoint},strenght=2"]
    command = ["lmms-eval", *model, "--tasks", "tiny_colours", "--include_path", str(tasks)]
    monkeypatch.setattr(sys, "argv", command)
    try:
        with pytest.raises(SystemExit) as ended:
            dispatch.main()
    finally:
        sys.modules.pop(plugin.COMMAND, None)
    assert "llava_hf has no argument 'strenght': did you mean strength?" in str(ended.value.code)
    assert "\n" not in str(ended.value.code)


@pytest.fixture(scope="session")
def manager() -> TaskManager:
    return TaskManager(model_name="hones_qwen2_5_vl")


def test_our_tasks_are_found_without_a_flag(manager: TaskManager) -> None:
    (folder,) = plugin.own_task_folders()
    own = set(TaskManager(include_path=folder, include_defaults=False).all_tasks)
    assert own, f"no task in {folder}"
    paths = {name: str(entry["yaml_path"]) for name, entry in manager.task_index.items()}
    # Tags have no files.
    assert {name for name, path in paths.items() if folder in path} == {n for n in own if paths[n] != "-1"}
    assert own <= set(paths)


def test_an_unknown_task_ends_the_command(manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    assert manager.match_tasks(["pope", "no_such_task"]) == ["pope"]
    monkeypatch.setitem(sys.modules, plugin.COMMAND, sys)
    assert manager.match_tasks(["pope", "vqav2_v*"])
    with pytest.raises(SystemExit, match="there is no task no_such_task"):
        manager.match_tasks(["pope", "no_such_task"])
    manager.model_name = "llava_hf"
    assert manager.match_tasks(["pope", "no_such_task"]) == ["pope"]


def test_prompts_are_chosen_by_the_base(manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, base in (*registry.BASES.items(), ("llava_hf", "llava_hf"), ("qwen2_5_vl", "qwen2_5_vl")):
        manager.model_name = name
        assert manager.model_name == base
    monkeypatch.setattr(registry, "generic_base", "gemma3")
    for name in registry.GENERIC:
        manager.model_name = name
        assert manager.model_name == "gemma3"


def test_every_name_is_registered() -> None:
    for name in registry.own_names():
        loaded = get_model_manifest(name)
        assert loaded.simple_class_path
        for force_simple in (False, True):
            cls = MODEL_REGISTRY_V2.get_model_class(name, force_simple=force_simple)
            assert cls.__module__.startswith("hones_eval.model_wrappers.")


def test_installing_twice_changes_nothing() -> None:
    before = (TaskManager.__init__, TaskManager.initialize_tasks, TaskManager.match_tasks)
    plugin.install()
    assert (TaskManager.__init__, TaskManager.initialize_tasks, TaskManager.match_tasks) == before


@pytest.mark.parametrize("first", ["lmms_eval.models", "hones_eval.model_wrappers.plugin"])
def test_the_entry_point_costs_nothing(first: str) -> None:
    """Listing models imports no torch, whichever of the two packages is imported first."""
    script = f"""
import json, sys
import {first}
import lmms_eval.models
heavy = [name for name in ("torch", "transformers", "lmms_eval.tasks") if name in sys.modules]
print(json.dumps([heavy, "hones_llava" in lmms_eval.models.list_available_models()]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], True], done.stdout
