"""Steering compiled models: the compiled code applies the scales while they are attached, and never after."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import Family
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_runs import write_steering
from tiny_evaluations import evaluated, write_small
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel

from hones_eval.core import edits, hooks
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import attach_steering, attach_to_anatomy, steer
from hones_eval.core.hooks import editing, recording
from hones_eval.core.steering import Steering
from hones_eval.errors import EditError

# The eager backend runs the traced graph without code generation: the same tracing and guards, in less time.
BACKEND = "eager"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """A model of two layers, to compile quickly, which no other test shares."""
    torch.compiler.reset()
    # The shape checks of the tests are not part of the product, and take long to trace.
    monkeypatch.setattr(edits, "scale", inspect.unwrap(edits.scale))
    built = families.build("llava")
    language_model = built.model.model.language_model
    language_model.layers = language_model.layers[:2]
    language_model.config.num_hidden_layers = 2
    yield built
    torch.compiler.reset()


def inputs(family: Family) -> dict[str, Tensor]:
    return family.inputs("What color is it?", [])


@torch.no_grad()
def logits(family: Family) -> Tensor:
    return family.model(**inputs(family)).logits


def some_scales(family: Family) -> Steering:
    return Steering.by_hand(family.model, heads={(1, 1): 0.0}, neurons={(1, 3): 9.0, (1, 5): -9.0})


def compile_model(family: Family) -> None:
    family.model.compile(backend=BACKEND)


def compile_forward(family: Family) -> None:
    family.model.forward = torch.compile(family.model.forward, backend=BACKEND)


def compile_layers(family: Family) -> None:
    for layer in family.model.model.language_model.layers:
        layer.compile(backend=BACKEND)


@pytest.mark.parametrize("compile_part", [compile_forward, compile_layers])
def test_steering_acts_on_compiled_code_that_ran_before(
    family: Family, compile_part: Callable[[Family], None]
) -> None:
    steering = some_scales(family)
    plain = logits(family)
    with steer(family.model, steering):
        expected = logits(family)
    assert (expected - plain).abs().max() > 0.01
    compile_part(family)
    torch.testing.assert_close(logits(family), plain, **CLOSE)
    with steer(family.model, steering) as attached:
        for _ in range(2):
            torch.testing.assert_close(logits(family), expected, **CLOSE)
            attached.check_ran()
    torch.testing.assert_close(logits(family), plain, **CLOSE)
    with steer(family.model, steering, how="fold"):
        torch.testing.assert_close(logits(family), expected, **CLOSE)
    torch.testing.assert_close(logits(family), plain, **CLOSE)


def test_code_compiled_while_steered_is_compiled_once_and_unsteered_afterwards(family: Family) -> None:
    steering, plain = some_scales(family), logits(family)
    with steer(family.model, steering):
        compile_model(family)
        for _ in range(2):
            steered = logits(family)
        torch._dynamo.utils.counters.clear()
        for _ in range(2):
            assert torch.equal(logits(family), steered)
        assert torch._dynamo.utils.counters["frames"]["total"] == 0, "compiled again without need"
    assert (steered - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(family), plain, **CLOSE)


def test_torch_compile_of_the_model_is_steered(family: Family) -> None:
    steering, plain = some_scales(family), logits(family)
    with steer(family.model, steering):
        expected = logits(family)
    compiled = torch.compile(family.model, backend=BACKEND)
    with torch.no_grad():
        compiled(**inputs(family))
        with steer(compiled, steering):
            found = compiled(**inputs(family)).logits
        after = compiled(**inputs(family)).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(after, plain, **CLOSE)


def generated(family: Family, compiled: bool) -> Tensor:
    """Logits of 6 greedy steps with a static cache; every step after the first runs compiled code."""
    settings = {"cache_implementation": "static", "max_new_tokens": 6, "min_new_tokens": 6}
    if compiled:
        config = CompileConfig(backend=BACKEND, mode=None, dynamic=False)
        config._compile_all_devices = True  # as transformers does by itself on an accelerator
        settings["compile_config"] = config
    output = family.model.generate(
        **inputs(family),
        **settings,
        do_sample=False,
        disable_compile=not compiled,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits)


def test_decode_steps_that_generate_compiles_are_steered(family: Family) -> None:
    steering, plain = some_scales(family), generated(family, compiled=False)
    with steer(family.model, steering):
        expected = generated(family, compiled=False)
    assert (expected[1:] - plain[1:]).abs().max() > 0.01
    torch.testing.assert_close(generated(family, compiled=True), plain, **CLOSE)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "generate compiled no decode step"
    with steer(family.model, steering) as attached:
        torch.testing.assert_close(generated(family, compiled=True), expected, **CLOSE)
        attached.check_ran()
    torch.testing.assert_close(generated(family, compiled=True), plain, **CLOSE)


def test_edits_and_recordings_of_a_block_act_on_a_compiled_model_without_compiling(family: Family) -> None:
    anatomy = Anatomy.of(family.model)
    site = anatomy.heads_in[1]
    with editing([(site, torch.zeros_like)]):
        expected = logits(family)
    with recording([site]) as plain:
        logits(family)
    compile_model(family)
    before = logits(family)
    torch._dynamo.utils.counters.clear()
    with editing([(site, torch.zeros_like)]):
        torch.testing.assert_close(logits(family), expected, **CLOSE)
    with recording([site]) as recorded:
        logits(family)
    torch.testing.assert_close(recorded[site.name], plain[site.name], **CLOSE)
    torch.testing.assert_close(logits(family), before, **CLOSE)
    assert torch._dynamo.utils.counters["frames"]["total"] == 0


def test_the_anatomy_of_a_compiled_model_is_that_of_the_model(family: Family) -> None:
    """Also while compiled code takes no notice of hooks, as by PyTorch's default."""
    shape = Anatomy.of(family.model).shape
    compile_layers(family)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        logits(family)
        assert Anatomy.of(family.model).shape == shape


def test_a_block_in_which_no_hook_ran_is_an_error(family: Family) -> None:
    anatomy = Anatomy.of(family.model)
    with pytest.raises(EditError, match="2 of 2 edits never ran"), steer(family.model, some_scales(family)):
        pass
    attached = attach_to_anatomy(anatomy, some_scales(family))
    logits(family)
    attached.check_ran()
    attached.check_ever_ran()
    attached.detach()


# The next tests switch the guards of hooks off, so that code compiled before bypasses the hooks, as it did
# before `guard_hooks`. Every such pass has to raise.


def compiled_model(family: Family) -> tuple[nn.Module, Callable[[], object]]:
    compiled = torch.compile(family.model, backend=BACKEND)
    return compiled, lambda: compiled(**inputs(family))


def compiled_in_place(family: Family) -> tuple[nn.Module, Callable[[], object]]:
    compile_model(family)
    return family.model, lambda: logits(family)


def compiled_forward(family: Family) -> tuple[nn.Module, Callable[[], object]]:
    compile_forward(family)
    return family.model, lambda: logits(family)


def compiled_layers(family: Family) -> tuple[nn.Module, Callable[[], object]]:
    compile_layers(family)
    return family.model, lambda: logits(family)


def compiled_decode_steps(family: Family) -> tuple[nn.Module, Callable[[], object]]:
    return family.model, lambda: generated(family, compiled=True)


WAYS = [compiled_model, compiled_in_place, compiled_forward, compiled_layers, compiled_decode_steps]


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_pass_that_bypasses_the_hooks_is_an_error(
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[Family], tuple[nn.Module, Callable[[], object]]],
) -> None:
    model, call = way(family)
    monkeypatch.setattr(hooks, "guard_hooks", lambda: None)
    with torch.no_grad(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        call()
        attached = attach_steering(model, some_scales(family))
        with pytest.raises(EditError, match="2 of 2 edits did not run in a forward pass, the first at"):
            call()
        attached.detach()
        call()  # nothing is checked any longer


def test_checks_of_passes_leave_nothing_behind_whatever_the_order(family: Family) -> None:
    compile_model(family)
    parts = [part for part in family.model.modules() if isinstance(part, PreTrainedModel)]
    before = [dict(vars(part)) for part in parts]
    first, second = (attach_steering(family.model, some_scales(family)) for _ in range(2))
    first.detach()
    third = attach_steering(family.model, some_scales(family))
    second.detach()
    third.detach()
    for part, attributes in zip(parts, before, strict=True):
        for name in ("_compiled_call_impl", "get_compiled_call"):
            assert vars(part).get(name) is attributes.get(name)
        assert not part._forward_pre_hooks
        assert not part._forward_hooks


def test_a_steering_that_changes_no_activation_is_told(family: Family) -> None:
    steering = Steering.by_hand(family.model, neurons={(1, 3): 9.0})
    gate = family.model.model.language_model.layers[1].mlp.up_proj
    with torch.no_grad():
        gate.weight[3] = 0  # the neuron's activation is always 0
    with pytest.warns(UserWarning, match="changed no activation"), steer(family.model, steering):
        logits(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(family.model, some_scales(family)):
            logits(family)


@pytest.mark.parametrize("how", ["in place", "torch.compile"])
def test_a_compiled_model_inside_of_a_wrapper_is_steered(
    llava_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As wrappers with a switch such as `torch_compile=True` have it: compiled before the steering acts."""
    monkeypatch.setattr(edits, "scale", inspect.unwrap(edits.scale))
    stock = MODEL_REGISTRY_V2.get_model_class("llava_hf")
    build = stock.__init__

    def compiling(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if how == "in place":
            self._model.compile(backend=BACKEND)
        else:
            self._model = torch.compile(self._model, backend=BACKEND)

    write_steering(llava_checkpoint, tmp_path / "steering", 1)
    tasks = write_small(tmp_path / "tasks", count=1, generation={"max_new_tokens": 2})
    arguments = f"pretrained={llava_checkpoint},dtype=float32,device=cpu,device_map=cpu"
    steered = f"{arguments},steering={tmp_path / 'steering'}"
    expected = [evaluated("hones_llava", given, tasks, tmp_path / "out") for given in (arguments, steered)]
    assert expected[0].answers != expected[1].answers
    monkeypatch.setattr(stock, "__init__", compiling)
    torch.compiler.reset()
    for given, uncompiled in zip((arguments, steered), expected, strict=True):
        assert evaluated("hones_llava", given, tasks, tmp_path / "out").answers == uncompiled.answers
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch.compiler.reset()
