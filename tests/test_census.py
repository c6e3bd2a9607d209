"""How many of the vision-language types that transformers knows are served, replayed exactly, or refused."""

import copy
import os
from pathlib import Path

import census
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.api.model_anatomy import report
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.attach import steer
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError

PAGE = Path(__file__).parent.parent / "docs" / "census.md"
FLOOR_SERVED, FLOOR_EXACT = 97, 96
HEAD = """# Census of vision-language types

What `tests/test_census.py` finds for a small random model of every image-text-to-text type of transformers
(`HONES_EVAL_CENSUS=1 HONES_EVAL_REWRITE_DOCS=1` rewrites this page). An image, of noise, is shown only to
models that cannot run without one. The families of [families.md](families.md) are tested with images, through
lmms-eval.

- **heads**, **neurons**: per layer; several numbers where layers differ. Neurons of experts are counted. A
  decoder layer with [cross-attention](cross_attention.md) beside self-attention counts as two layers, one of
  them without neurons.
- **replay**: whether replayed edits have the logits of hooked forward passes.
- **fold**: whether scales of every site, folded into the weights, give the logits of hooks (to 1e-4 of the
  largest).
- **bfloat16**: the largest difference of hooked logits in bfloat16 from those in float32, as a share of the
  largest logit. Random models round worse than trained ones.

"""


def replayed(model: PreTrainedModel, anatomy: Anatomy, name: str) -> str:
    replayer = Replayer(anatomy)
    replayer.record(census.inputs(name, anatomy.model), 1)
    return "exact" if replayer.inexact is None else f"full passes: {replayer.inexact}"


def random_steering(anatomy: Anatomy) -> Steering:
    """Scales between 0.5 and 1.5 at every site."""
    shape = anatomy.shape
    generator = torch.Generator().manual_seed(0)
    heads, neurons = (
        torch.where(there, torch.rand(there.shape, generator=generator) + 0.5, 1.0)
        for there in (shape.head_mask(), shape.neuron_mask())
    )
    source = Provenance(type(anatomy.model).__name__, None, shape, "by hand", {}, [])
    return Steering(heads, neurons, source)


@torch.no_grad()
def logits(model: PreTrainedModel, given: dict[str, Tensor]) -> Tensor:
    return model(**given).logits.float()


def folded_and_rounded(model: PreTrainedModel, anatomy: Anatomy, name: str) -> tuple[str, str]:
    """Whether folding equals hooking, and how far bfloat16 is from float32."""
    given, steering = census.inputs(name, model), random_steering(anatomy)
    plain = logits(model, given)
    with steer(model, steering):
        hooked = logits(model, given)
    largest = float(hooked.abs().max())
    assert float((hooked - plain).abs().max()) > 1e-3 * largest, f"{name}: steering changes nothing"
    try:
        with steer(model, steering, "fold"):
            difference = float((logits(model, given) - hooked).abs().max()) / largest
        fold = "exact" if difference < 1e-4 else f"differs by {difference:.1g}"
    except HonesError as error:
        fold = f"refused: {str(error)[:80]}"
    half = copy.deepcopy(model).to(torch.bfloat16)
    rounded = {key: v.bfloat16() if v.is_floating_point() else v for key, v in given.items()}
    try:
        with steer(half, steering):
            share = float((logits(half, rounded) - hooked).abs().max()) / largest
    except HonesError as error:  # the model itself does not run in this type
        return fold, f"refused: {str(error)[:160]}"
    return fold, f"{share:.1%}"


def row(name: str) -> tuple[str, str]:
    """A row of the page, and `served`, `exact` or `refused`. Any error but a refusal fails the test."""
    model = census.build(name)
    try:
        anatomy = Anatomy.of(model)
    except HonesError as error:
        reason = str(error)[:200].replace("|", "/")
        return f"| {name} | refused | | | {reason} | | |\n", "refused"
    shape = anatomy.shape
    layers = range(shape.layers)
    found = report(model.config, name)
    assert found.unsupported is None, name
    assert found.heads == [shape.heads_of(i) for i in layers], name
    assert found.neurons == [shape.neurons_of(i) for i in layers], name
    exact = replayed(model, anatomy, name)
    heads, neurons = (
        ", ".join(str(n) for n in dict.fromkeys(numbers)) for numbers in (found.heads, found.neurons)
    )
    kind = "exact" if exact == "exact" else "served"
    fold, rounding = folded_and_rounded(anatomy.model, anatomy, name)
    found_out = (exact, fold, rounding)
    cells = " | ".join(text.replace("|", "/") for text in found_out)
    return f"| {name} | served | {heads} | {neurons} | {cells} |\n", kind


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("HONES_EVAL_CENSUS") != "1",
    reason="HONES_EVAL_CENSUS=1 runs it: it builds 98 models, in about five minutes on a quiet core",
)
def test_most_types_are_served_and_none_crashes() -> None:
    rows = {name: row(name) for name in census.names()}
    kinds = [kind for _, kind in rows.values()]
    served, exact = len(kinds) - kinds.count("refused"), kinds.count("exact")
    assert served >= FLOOR_SERVED
    assert exact >= FLOOR_EXACT
    if os.environ.get("HONES_EVAL_REWRITE_DOCS") == "1":
        counts = f"Of {len(kinds)} types {served} are served, {exact} of them with exact replay.\n\n"
        table = "| type | result | heads | neurons | replay, or why refused | fold | bfloat16 |\n"
        table += "|---|---|---|---|---|---|---|\n"
        PAGE.write_text(HEAD + counts + table + "".join(text for text, _ in rows.values()))
