"""A steered model receives its base's prompts, where a task has own prompts for the base's name.

Unmodified tasks of lmms-eval through its real command: mmmu_val has an entry for qwen3_vl, in chat and in
simple mode. The prompts of `default` differ.
"""

from pathlib import Path

import benchmark_data
import families
import pytest
import yaml
from hub import serving
from lmms_runs import answers, manifest, prompts, run_command, write_steering

MODES = ("simple", "chat")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock, baseline and steered runs in both modes, from one process of the command."""
    folder = tmp_path_factory.mktemp("parity")
    checkpoint = families.save_checkpoint("qwen3_vl", folder / "qwen3_vl")
    write_steering(checkpoint, folder / "steering", seed=1, spread=3.0)
    ours = f"base=qwen3_vl,pretrained={checkpoint},device=cpu,device_map=cpu"
    runs = [
        {
            "model": model,
            "model_args": model_args,
            "tasks": "mmmu_val",
            "force_simple": mode == "simple",
            "gen_kwargs": "max_new_tokens=6",
            "log_samples": True,
            "output_path": f"{name}-{mode}",
        }
        for mode in MODES
        for name, model, model_args in (
            ("stock", "qwen3_vl", f"pretrained={checkpoint},device=cpu,device_map=cpu"),
            ("baseline", "hones", ours),
            ("steered", "hones_qwen3_vl", f"{ours},steering=steering".removeprefix("base=qwen3_vl,")),
        )
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump(runs))
    repositories = {"lmms-lab-encoder/MMMU": benchmark_data.repositories()["lmms-lab-encoder/MMMU"]}
    with serving(repositories) as url:
        done = run_command(["--config", "config.yaml"], folder, url)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_the_prompts_are_the_bases_own(mode: str, logs: Path) -> None:
    stock, baseline, steered = (logs / f"{name}-{mode}" for name in ("stock", "baseline", "steered"))
    assert "Answer with the option letter only." in prompts(stock, "mmmu_val")[0]
    assert prompts(stock, "mmmu_val") == prompts(baseline, "mmmu_val") == prompts(steered, "mmmu_val")
    # The manifest also hashes messages and images, and the answers are the same.
    assert manifest(baseline)["requests"] == manifest(steered)["requests"]
    assert answers(stock, "mmmu_val") == answers(baseline, "mmmu_val")
    assert answers(steered, "mmmu_val") != answers(baseline, "mmmu_val")
