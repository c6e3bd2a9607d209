"""Steering compiled models: the compiled code applies the scales while they are attached, and never after."""

import inspect
from collections.abc import Callable, Iterator

import families
import pytest
import torch
from families import Family
from torch import Tensor
from transformers import CompileConfig

from hones_eval.core import edits
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import attach_to_anatomy, steer
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
    shape = Anatomy.of(family.model).shape
    compile_layers(family)
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
