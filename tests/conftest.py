"""Shared fixtures: tiny models of every family, checkpoints of three families, the real photographs."""

import importlib.util
import os

# Before torch, transformers or tokenizers read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHAPE_CHECKED = ["hones_eval.core.edits", "hones_eval.core.readouts"]
if importlib.util.find_spec("jaxtyping") and importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    install_import_hook(SHAPE_CHECKED, "beartype.beartype")

from collections.abc import Callable, Iterator  # noqa: E402
from functools import lru_cache  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import families  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build_family() -> Callable[[str], families.Family]:
    """Build a family once a session. Whoever changes its weights puts them back."""
    return lru_cache(maxsize=None)(families.build)


@pytest.fixture(scope="session", params=families.NAMES)
def family(request: pytest.FixtureRequest, build_family: Callable[[str], families.Family]) -> families.Family:
    return build_family(request.param)


@pytest.fixture(scope="session")
def llava_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_checkpoint("llava", tmp_path_factory.mktemp("checkpoints") / "llava")


@pytest.fixture(scope="session")
def model_args(llava_checkpoint: Path) -> str:
    return f"pretrained={llava_checkpoint}"


@pytest.fixture(scope="module")
def models_loaded_once() -> Iterator[None]:
    """Every command of a file loads the same checkpoints: keep what the real loader gave."""
    from hones_eval.api import model as loading
    from hones_eval.lmms.examples import load_lmm

    loaded: dict[tuple[Any, ...], Any] = {}

    def load(model: str, arguments: str, **more: Any) -> Any:
        key = (model, arguments, *more.items())
        if key not in loaded:
            loaded[key] = load_lmm(model, arguments, **more)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_lmm", load)
        yield


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("checkpoints") / "qwen2_5_vl")


@pytest.fixture(scope="session")
def instructblip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_checkpoint("instructblip", tmp_path_factory.mktemp("checkpoints") / "instructblip")


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photographs with annotations: ``images/``, ``coco10.json``, ``vseam_pairs.json``."""
    given = os.environ.get("HONES_EVAL_TEST_DATA")
    if not given:
        pytest.skip(
            "set HONES_EVAL_TEST_DATA to the folder that holds real/images to run this on photographs"
        )
    folder = Path(given) / "real"
    if not (folder / "coco10.json").is_file():
        pytest.fail(
            f"HONES_EVAL_TEST_DATA={given} holds no real/coco10.json; point it at the test data's folder"
        )
    return folder


# Files whose tests start programs, run lmms-eval from its command line, or repeat whole runs.
# A single slow test elsewhere carries `@pytest.mark.slow` itself.
SLOW_FILES = {
    *("test_api", "test_benchmarks", "test_caption_tools", "test_choices", "test_conformance", "test_demo"),
    *("test_editing_folders", "test_editing_models", "test_editing_run", "test_editing_tasks"),
    *("test_examples", "test_export", "test_family_wrappers", "test_hub_faults", "test_leaderboard_real"),
    *("test_decoding", "test_leaderboard_pages", "test_loops"),
    *("test_learning", "test_own_task", "test_packaging", "test_plugin", "test_processes", "test_resume"),
    *("test_retrieval_margin", "test_retrieval_study", "test_savings", "test_scaling", "test_spike_in"),
    *("test_study", "test_tasks_elsewhere", "test_toy_tasks", "test_tracing", "test_verify"),
    *("test_vseam_tasks", "test_wrapper_weights", "test_wrappers"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files, which `make test-fast` leaves out."""
    for item in items:
        if item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what a test recorded as its summary, also when it ran in a worker."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(str(value))
