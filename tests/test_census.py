"""How many of the vision-language types that transformers knows are served, replayed exactly, or refused."""

import os
from pathlib import Path

import census
import pytest
from transformers import PreTrainedModel

from hones_eval.api.model_anatomy import report
from hones_eval.core.anatomy import Anatomy
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

"""


def replayed(model: PreTrainedModel, anatomy: Anatomy, name: str) -> str:
    replayer = Replayer(anatomy)
    replayer.record(census.inputs(name, anatomy.model), 1)
    return "exact" if replayer.inexact is None else f"full passes: {replayer.inexact}"


def row(name: str) -> tuple[str, str]:
    """A row of the page, and `served`, `exact` or `refused`. Any error but a refusal fails the test."""
    model = census.build(name)
    try:
        anatomy = Anatomy.of(model)
    except HonesError as error:
        reason = str(error)[:200].replace("|", "/")
        return f"| {name} | refused | | | {reason} |\n", "refused"
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
    return f"| {name} | served | {heads} | {neurons} | {exact.replace('|', '/')} |\n", kind


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
        table = "| type | result | heads | neurons | replay, or why refused |\n|---|---|---|---|---|\n"
        PAGE.write_text(HEAD + counts + table + "".join(text for text, _ in rows.values()))
