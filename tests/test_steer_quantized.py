"""Steering layers that do not multiply by a plain weight: hooks act, and folding is refused by experiment."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import Family
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import steer
from hones_eval.core.export import export_checkpoint
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError

Change = Callable[[nn.Module], Any]
CHANGES: dict[str, Change] = {}


def kind(change: Change) -> Change:
    """Register a way to change a model whose down projections then hide their weights."""
    CHANGES[change.__name__] = change
    return change


def down_projections(model: nn.Module) -> list[tuple[nn.Module, nn.Linear]]:
    return [(layer.mlp, layer.mlp.down_proj) for layer in model.model.language_model.layers]


@kind
def quanto_int8(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="needs the extra [quantized]: optimum-quanto")
    quanto.quantize(model.model.language_model, weights=quanto.qint8)
    quanto.freeze(model.model.language_model)


@kind
def torchao_int8(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs the extra [quantized]: torchao")
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())


@kind
def torchao_int8_activations(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs the extra [quantized]: torchao")
    quantization.quantize_(model.model.language_model, quantization.Int8DynamicActivationInt8WeightConfig())


def bitsandbytes_layers(model: nn.Module, make: Callable[[Any, nn.Linear], nn.Module]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra [quantized]: bitsandbytes")
    for mlp, linear in down_projections(model):
        layer = make(bitsandbytes.nn, linear)
        layer.load_state_dict({"weight": linear.weight.data})
        mlp.down_proj = layer.to("cpu")


@kind
def bitsandbytes_int8(model: nn.Module) -> None:
    bitsandbytes_layers(
        model,
        lambda kinds, linear: kinds.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        ),
    )


@kind
def bitsandbytes_int4(model: nn.Module) -> None:
    bitsandbytes_layers(
        model,
        lambda kinds, linear: kinds.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32
        ),
    )


@kind
def weight_norm(model: nn.Module) -> None:
    for _, linear in down_projections(model):
        nn.utils.parametrizations.weight_norm(linear)


@kind
def weight_norm_by_hook(model: nn.Module) -> None:
    for _, linear in down_projections(model):
        nn.utils.weight_norm(linear)


class LowRank(nn.Module):
    """A LoRA as a parametrization: the weight plus a product of two thin matrices."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(weight.shape[0], 2))
        self.b = nn.Parameter(torch.randn(2, weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.1 * self.a @ self.b


@kind
def lora_by_parametrization(model: nn.Module) -> None:
    for _, linear in down_projections(model):
        nn.utils.parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))


@kind
def lora_of_peft(model: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    get_peft_model(model, LoraConfig(target_modules=r".*layers.*down_proj", init_lora_weights=False))


@torch.no_grad()
def logits(family: Family) -> Tensor:
    return family.model(**family.inputs("What color is it?", [Image.new("RGB", (64, 48), "red")])).logits


def plainly_scaled(family: Family, neurons: dict[tuple[int, int], float]) -> Tensor:
    """Reference: logits with neurons scaled by separate hooks on the down projections as they are now."""
    handles = []
    for i, (_, module) in enumerate(down_projections(family.model)):

        def hook(module: nn.Module, args: tuple[Tensor], layer: int = i) -> tuple[Tensor]:
            x = args[0].clone()
            for (where, neuron), scale in neurons.items():
                if where == layer:
                    x[..., neuron] *= scale
            return (x,)

        handles.append(module.register_forward_pre_hook(hook))
    scaled = logits(family)
    for handle in handles:
        handle.remove()
    return scaled


def check(family: Family, folder: Path) -> None:
    """A hook acts as plain hooks do, and folding and exporting are refused and change nothing."""
    neurons = {(0, 3): 9.0, (2, 5): -9.0}
    steering = Steering.by_hand(family.model, neurons=neurons)
    plain, expected = logits(family), plainly_scaled(family, neurons)
    assert (expected - plain).abs().max() > 0.05
    with steer(family.model, steering):
        torch.testing.assert_close(logits(family), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(HonesError, match=r"layers\.0\.mlp\.down_proj .*use attach=hook"):
        steer(family.model, steering, how="fold").__enter__()
    with pytest.raises(HonesError, match=r"cannot be exported|export of it would lose the adapter"):
        export_checkpoint(family.model, steering, folder / "out")
    assert not (folder / "out").exists()
    torch.testing.assert_close(logits(family), plain, atol=0, rtol=0)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_hooks_act_and_folding_and_exporting_are_refused(name: str, tmp_path: Path) -> None:
    family = families.build("llava")
    shape = Anatomy.of(family.model).shape
    CHANGES[name](family.model)
    assert Anatomy.of(family.model).shape == shape
    check(family, tmp_path)


def torchao_config() -> Any:
    return TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())


# The configurations of `from_pretrained(..., quantization_config=...)`, with the library that each needs.
CONFIGS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "quanto int8": ("optimum.quanto", "optimum-quanto", lambda: QuantoConfig(weights="int8")),
    "torchao int8": ("torchao.quantization", "torchao", torchao_config),
    "bitsandbytes int8": ("bitsandbytes", "bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_models_that_are_quantized_while_they_are_loaded(
    name: str, llava_checkpoint: Path, tmp_path: Path
) -> None:
    module, library, config = CONFIGS[name]
    pytest.importorskip(module, reason=f"needs the extra [quantized]: {library}")
    model = AutoModelForImageTextToText.from_pretrained(
        llava_checkpoint, quantization_config=config(), device_map="cpu", dtype=torch.float32
    ).eval()
    family = dataclasses.replace(families.build("llava"), model=model)
    assert type(down_projections(model)[0][1]) is not nn.Linear or not is_plain(model), "not quantized"
    check(family, tmp_path)


def is_plain(model: nn.Module) -> bool:
    """Whether the first down projection has a plain floating-point weight."""
    weight = down_projections(model)[0][1].weight
    return type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.is_floating_point()
