"""The identity of a model by its weights."""

import pytest
import torch
from torch import nn

from hones_eval.core import weights
from hones_eval.core.digests import weights_differ
from hones_eval.core.weights import weights_digest


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(300, 500), nn.BatchNorm1d(500), nn.Linear(500, 3))
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return made.to(dtype)


@pytest.fixture(params=["sha256", "sampled"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sampled":
        monkeypatch.setattr(weights, "FULL_BYTES", 0)
        monkeypatch.setattr(weights, "BLOCK", 64)
    return str(request.param)


def test_every_changed_element_changes_the_digest(form: str) -> None:
    made = model()
    before = weights_digest(made)
    assert before.startswith(f"{form}-float32-")
    assert weights_digest(model()) == before
    for name, tensor in made.state_dict().items():
        flat = tensor.view(-1)
        for place in {0, len(flat) // 2, len(flat) // 3, len(flat) - 1}:
            old = flat[place].clone()
            flat[place] += 1
            assert weights_digest(made) != before, (name, place)
            flat[place] = old
    assert weights_digest(made) == before


def test_the_digest_is_of_the_tensors_alone(form: str) -> None:
    made = model()
    compiled = torch.compile(made)
    assert weights_digest(compiled) == weights_digest(made)
    assert weights_digest(made.eval()) == weights_digest(made.train())


def test_another_type_is_another_form_that_cannot_be_compared(form: str) -> None:
    single, half = weights_digest(model()), weights_digest(model(torch.bfloat16))
    assert half.startswith(f"{form}-bfloat16-")
    assert single != half
    assert not weights_differ(single, half)
    assert not weights_differ(single, None)
    assert weights_differ(single, single[:-1] + "x")
    assert not weights_differ(single, single)


def test_tensors_that_are_not_loaded_are_said_to_be_missing() -> None:
    made = model()
    made[2].to("meta")
    assert weights_digest(made).startswith("partial-float32-")
