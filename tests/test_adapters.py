"""Adapters: models with a LoRA are measured, steered, folded and exported as plain PEFT computes them."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import families
import lmms_eval.models  # noqa: F401  registers the wrappers
import pytest
import torch
from hub import commit_of, serving
from lmms_eval.models import MODEL_REGISTRY_V2 as REGISTRY
from lmms_runs import environment
from own_answers import write_tasks
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from hones_eval.__main__ import main
from hones_eval.core.adapters import adapter_of, has_adapter, load_adapter
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance, read_json
from hones_eval.core.attach import steer
from hones_eval.core.export import export_checkpoint, export_ia3
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError, UnsupportedModelError
from hones_eval.lmms.models import inner_model, load_lmm

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
ON_CPU = "device=cpu,device_map=cpu"
TARGETS = r".*language_model.*(q_proj|o_proj|down_proj)"


def load(checkpoint: Path | str) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def adapter(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with random weights on attention and FFN, written by PEFT."""
    torch.manual_seed(0)
    adapted = get_peft_model(
        load(llava_checkpoint), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    )
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    inputs = families.build("llava").inputs("what is this?", [Image.new("RGB", (30, 30), "red")])
    return model(**inputs).logits


def scaled_by_peft_and_hooks(checkpoint: Path, adapter: Path) -> Tensor:
    """Reference: plain PEFT, with separate hooks that scale one head and two neurons."""
    model = PeftModel.from_pretrained(load(checkpoint), adapter).eval()
    layers = model.base_model.model.model.language_model.layers

    def scale(features: slice, factor: float) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0].clone()
            x[..., features] *= factor
            return (x,)

        return hook

    layers[1].self_attn.o_proj.register_forward_pre_hook(scale(slice(32, 48), 0.0))  # head 2 of width 16
    layers[0].mlp.down_proj.register_forward_pre_hook(scale(slice(5, 6), 9.0))
    layers[2].mlp.down_proj.register_forward_pre_hook(scale(slice(7, 8), -9.0))
    return logits(model)


def the_steering(model: nn.Module) -> Steering:
    return Steering.by_hand(model, heads={(1, 2): 0.0}, neurons={(0, 5): 9.0, (2, 7): -9.0})


@pytest.fixture(scope="module")
def expected(llava_checkpoint: Path, adapter: Path) -> tuple[Tensor, Tensor]:
    """Logits of plain PEFT, without and with the steering."""
    plain = logits(PeftModel.from_pretrained(load(llava_checkpoint), adapter).eval())
    steered = scaled_by_peft_and_hooks(llava_checkpoint, adapter)
    assert (plain - logits(load(llava_checkpoint))).abs().max() > 0.05
    assert (steered - plain).abs().max() > 0.05
    return plain, steered


def test_a_loaded_adapter_computes_and_is_steered_as_in_plain_peft(
    llava_checkpoint: Path, adapter: Path, expected: tuple[Tensor, Tensor]
) -> None:
    plain, steered = expected
    loaded = load_adapter(load(llava_checkpoint), str(adapter))
    torch.testing.assert_close(logits(loaded), plain, **CLOSE)
    with steer(loaded, the_steering(loaded)):
        torch.testing.assert_close(logits(loaded), steered, **CLOSE)
    with pytest.raises(HonesError, match=r"adapted\), so folded scales would not act .*use attach=hook"):
        steer(loaded, the_steering(loaded), how="fold").__enter__()
    merged = load_adapter(load(llava_checkpoint), str(adapter), merge=True)
    assert not has_adapter(merged)
    assert adapter_of(merged) == adapter_of(loaded)
    for how in ("hook", "fold"):
        with steer(merged, the_steering(merged), how=how):
            torch.testing.assert_close(logits(merged), steered, **CLOSE)
        torch.testing.assert_close(logits(merged), plain, **CLOSE)


def test_write_directions_include_the_adapter(llava_checkpoint: Path, adapter: Path) -> None:
    loaded = Anatomy.of(load_adapter(load(llava_checkpoint), str(adapter)))
    merged = Anatomy.of(load_adapter(load(llava_checkpoint), str(adapter), merge=True))
    base = Anatomy.of(load(llava_checkpoint))
    for layer in range(4):
        torch.testing.assert_close(loaded.down_weight(layer), merged.down_weight(layer), **CLOSE)
        assert (loaded.down_weight(layer) - base.down_weight(layer)).abs().max() > 0.01
        assert torch.equal(loaded.down_weight(layer), loaded.down_weight(layer))


@pytest.mark.parametrize("attach", ["hook", "fold"])
def test_a_wrapper_with_peft_is_plain_peft_steered(
    attach: str, llava_checkpoint: Path, adapter: Path, expected: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    the_steering(load_adapter(load(llava_checkpoint), str(adapter))).save(tmp_path / "steering")
    wrapper = REGISTRY.get_model_class("hones_llava")(
        pretrained=str(llava_checkpoint),
        peft=str(adapter),
        steering=str(tmp_path / "steering"),
        attach=attach,
        device="cpu",
        device_map="cpu",
        dtype="float32",
    )
    torch.testing.assert_close(logits(inner_model(wrapper)), expected[1], **CLOSE)
    assert wrapper.record._content("hones_llava", None)["base_model"]["adapter"]["id"] == str(adapter)
    wrapper.clean()


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("llava_hf", "pretrained={base},peft={adapter}"),
        ("hones_llava", "pretrained={base},peft={adapter}"),
        ("hones_hf", "pretrained={base},peft={adapter}"),
        ("llava_hf", "pretrained={adapter}"),
        ("hones_llava", "pretrained={adapter}"),
        ("hones", "base=llava_hf,pretrained={base},peft={adapter}"),
    ],
)
def test_every_wrapper_loads_the_adapter_and_names_it(
    model: str, arguments: str, llava_checkpoint: Path, adapter: Path, expected: tuple[Tensor, Tensor]
) -> None:
    given = arguments.format(base=llava_checkpoint, adapter=adapter) + ",dtype=float32"
    lmm = load_lmm(model, given)
    assert inner_model(lmm).name_or_path == str(llava_checkpoint)
    torch.testing.assert_close(logits(inner_model(lmm)), expected[0], **CLOSE)
    found = adapter_of(inner_model(lmm))
    assert found is not None
    assert found.id == str(adapter)


def test_rank_records_the_adapter_and_export_merges_it(
    llava_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    """From rank to an exported checkpoint, which plain transformers loads as steered PEFT."""
    tasks = write_tasks(tmp_path / "tasks", "llava_hf", f"pretrained={llava_checkpoint}", 2)
    out = tmp_path / "out"
    shared = ["--model", "llava_hf", "--tasks", "own_a", "--include_path", str(tasks), "--limit", "2"]
    shared += ["--method", "hones", "--metric", "log_probability", "--heads", "4", "--neurons", "0.05"]
    rank = ["rank", "--model_args", f"pretrained={llava_checkpoint},peft={adapter}", *shared]
    assert main([*rank, "--out", str(out / "ranking")]) == 0
    header = read_json(out / "ranking" / "ranking.json")
    assert (header["base_model"], header["adapter"]) == (str(llava_checkpoint), str(adapter))
    scale = ["scale", "--ranking", str(out / "ranking"), "--how", "fixed", "--factor", "3"]
    assert main([*scale, "--out", str(out / "steering")]) == 0
    steering = Steering.load(out / "steering")
    assert steering.provenance.adapter == str(adapter)
    export = ["export", "--steering", str(out / "steering"), "--out", str(out / "exported")]
    assert main([*export, "--to", "checkpoint"]) == 0
    peft_model = PeftModel.from_pretrained(load(llava_checkpoint), adapter).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a PeftModel in memory does not say where its adapter is from
        with steer(peft_model, steering):
            steered = logits(peft_model)
    assert (steered - logits(peft_model)).abs().max() > 0.01
    assert not (out / "exported" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(load(out / "exported")), steered, **CLOSE)


def test_export_to_ia3_on_top_of_an_adapter_is_refused(
    llava_checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    the_steering(load_adapter(load(llava_checkpoint), str(adapter))).save(tmp_path / "steering")
    export = ["export", "--steering", str(tmp_path / "steering"), "--to", "ia3"]
    assert main([*export, "--out", str(tmp_path / "out")]) == 1
    assert "cannot be loaded on top of the adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exporting_a_live_adapted_model_is_refused_and_leaves_the_adapter(
    llava_checkpoint: Path, adapter: Path, expected: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    by_transformers = load(llava_checkpoint)
    by_transformers.load_adapter(str(adapter))
    for model in (by_transformers, load_adapter(load(llava_checkpoint), str(adapter))):
        for export in (export_checkpoint, export_ia3):
            with pytest.raises(HonesError, match="would lose the adapter or the steering: merge it first"):
                export(model, the_steering(model), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        torch.testing.assert_close(logits(model), expected[0], **CLOSE)


def test_wrapped_models_are_steered_by_their_inner_model(
    llava_checkpoint: Path, adapter: Path, expected: tuple[Tensor, Tensor]
) -> None:
    adapted = PeftModel.from_pretrained(load(llava_checkpoint), adapter).eval()
    for wrapped in (adapted, nn.DataParallel(adapted)):
        with steer(wrapped, the_steering(wrapped)):
            torch.testing.assert_close(logits(wrapped), expected[1], **CLOSE)
        torch.testing.assert_close(logits(wrapped), expected[0], **CLOSE)


def test_adapters_that_learn_prompts_are_refused(llava_checkpoint: Path, tmp_path: Path) -> None:
    prompts = get_peft_model(
        load(llava_checkpoint),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=64, num_layers=4),
    )
    with pytest.raises(UnsupportedModelError, match="adapter 'default' is PROMPT_TUNING"):
        Anatomy.of(prompts)
    prompts.save_pretrained(tmp_path / "prompts")
    with pytest.raises(HonesError, match="is PROMPT_TUNING, which adds learned tokens"):
        load_adapter(load(llava_checkpoint), str(tmp_path / "prompts"))


def test_a_module_without_a_hugging_face_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear is not .* and holds none: give the model"):
        Anatomy.of(nn.Linear(2, 2))


def test_adapters_that_are_missing_or_do_not_fit_are_one_line(
    llava_checkpoint: Path, qwen_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    incomplete = shutil.copytree(adapter, tmp_path / "incomplete")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), incomplete / "adapter_model.safetensors")
    wider = shutil.copytree(adapter, tmp_path / "wider")
    config = json.loads((wider / "adapter_config.json").read_text())
    (wider / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    for source, message in (
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (llava_checkpoint, "no PEFT adapter there"),
        (incomplete, "does not fit LlavaForConditionalGeneration: Found missing adapter keys"),
        (wider, "does not fit LlavaForConditionalGeneration: Error"),
    ):
        with pytest.raises(HonesError, match=message) as caught:
            load_adapter(load(llava_checkpoint), str(source))
        assert "\n" not in str(caught.value)
    with pytest.raises(HonesError, match="has an adapter already"):
        load_adapter(load_adapter(load(llava_checkpoint), str(adapter)), str(adapter))
    with pytest.warns(UserWarning, match=r"was made for .*llava and is loaded onto .*qwen2_5_vl"):
        load_adapter(load(qwen_checkpoint), str(adapter))
    with pytest.raises(HonesError, match="does not fit Gemma3ForConditionalGeneration"):
        load_adapter(families.build("gemma3").model, str(adapter))
    short = load(llava_checkpoint)
    short.model.language_model.layers = short.model.language_model.layers[:2]
    with pytest.raises(HonesError, match="12 of its 24 tensors have no place in LlavaForConditional"):
        load_adapter(short, str(adapter))


def test_a_steering_for_another_model_of_the_same_shape_warns_and_names_both(
    llava_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    model = load(llava_checkpoint)
    steering = the_steering(model)
    made_elsewhere = Provenance("org/other", None, Anatomy.of(model).shape, "by hand", {}, [])
    other = Steering(steering.head_scales, steering.neuron_scales, made_elsewhere)
    with (
        pytest.warns(UserWarning, match=f"was made for org/other, but the model is {llava_checkpoint}"),
        steer(model, other),
    ):
        logits(model)
    adapted = load_adapter(load(llava_checkpoint), str(adapter))
    with (
        pytest.warns(UserWarning, match=f"made for {llava_checkpoint}, but .* with the adapter {adapter}"),
        steer(adapted, steering),
    ):
        logits(adapted)
    copied = shutil.copytree(llava_checkpoint, tmp_path / llava_checkpoint.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (model, load(copied)):
            with steer(same, steering):
                logits(same)


def test_an_adapter_folder_in_place_of_the_model_is_ranked_and_exported_with_its_base(
    llava_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    """`pretrained=ADAPTER` for `rank`, and `--pretrained ADAPTER` for `export`."""
    tasks = write_tasks(tmp_path / "tasks", "llava_hf", f"pretrained={llava_checkpoint}", 2)
    out = tmp_path / "out"
    rank = ["rank", "--method", "write_norm", "--model", "llava_hf", "--model_args", f"pretrained={adapter}"]
    rank += ["--tasks", "own_a", "--include_path", str(tasks), "--limit", "1", "--neurons", "0.05"]
    assert main([*rank, "--out", str(out / "ranking")]) == 0
    header = read_json(out / "ranking" / "ranking.json")
    assert (header["base_model"], header["adapter"]) == (str(llava_checkpoint), str(adapter))
    scale = ["scale", "--ranking", str(out / "ranking"), "--how", "fixed", "--factor", "3"]
    assert main([*scale, "--out", str(out / "steering")]) == 0
    steering = Steering.load(out / "steering")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a PeftModel in memory does not say where its adapter is from
        peft_model = PeftModel.from_pretrained(load(llava_checkpoint), adapter).eval()
        with steer(peft_model, steering):
            expected = logits(peft_model)
    for name, more in (("by the steering", []), ("by name", ["--pretrained", str(adapter)])):
        export = ["export", "--steering", str(out / "steering"), "--to", "checkpoint", *more]
        assert main([*export, "--out", str(out / name)]) == 0
        torch.testing.assert_close(logits(load(out / name)), expected, **CLOSE)
        assert not (out / name / "adapter_config.json").exists()


HUB_CHILD = """
import json, sys
import torch
from hones_eval.core.adapters import adapter_of
from hones_eval.core.steering import Steering
from hones_eval.lmms.models import inner_model, load_lmm

base, adapter = sys.argv[1:]
found = {}
for given in (adapter, adapter + "@" + sys.stdin.read()):
    model = inner_model(load_lmm("llava_hf", f"pretrained={base},peft={given},dtype=float32,device=cpu"))
    loaded, made = adapter_of(model), Steering.by_hand(model, neurons={(0, 1): 2.0}).provenance
    weight = model.get_parameter("model.language_model.layers.0.mlp.down_proj.lora_B.default.weight")
    found[given] = {
        "adapter": [loaded.id, loaded.revision],
        "made": [made.base_model, made.adapter, made.adapter_revision],
        "sum": float(weight.double().sum()),
    }
print(json.dumps(found))
"""


def test_an_adapter_of_the_hub_is_loaded_by_id_and_revision(
    llava_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    commit, key = (
        commit_of(files),
        "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_B.weight",
    )
    with serving({"org/lora": files}) as url:
        env = environment(tmp_path, url)
        command = [sys.executable, "-c", HUB_CHILD, str(llava_checkpoint), "org/lora"]
        done = subprocess.run(command, env=env, input=commit, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = float(load_file(adapter / "adapter_model.safetensors")[key].double().sum())
    assert list(found) == ["org/lora", f"org/lora@{commit}"]
    for one in found.values():
        assert one["adapter"] == ["org/lora", commit]
        assert one["made"] == [str(llava_checkpoint), "org/lora", commit]
        assert one["sum"] == pytest.approx(expected)
