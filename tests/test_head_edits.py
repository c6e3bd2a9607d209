"""Head edits: registered functions compared with plain loops, through `rank --edit`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_answers
import plain
import pytest
import torch
from torch import Tensor

from hones_eval.__main__ import main
from hones_eval.core import head_edits
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.head_edits import HEAD_EDITS, HeadEdit, check_position_free, head_edit
from hones_eval.core.ranking import Ranking
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples, inner_model, load_lmm
from hones_eval.methods.head_replacement import HeadReplacement

LIMIT = 3


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def lmm(own: own_answers.Prepared) -> Any:
    return load_lmm(own_answers.MODEL, own.model_args)


@pytest.fixture(scope="module")
def examples(own: own_answers.Prepared, lmm: Any) -> TaskExamples:
    return TaskExamples(lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, limit=LIMIT)


@torch.no_grad()
def last_head_outputs(model: Any, example: Example) -> list[Tensor]:
    """The inputs of `o_proj` [features] at the last prompt token, per layer."""
    kept: list[Tensor] = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1].clone()))
        for layer in plain.layers(model)
    ]
    model(**example.inputs)
    for handle in handles:
        handle.remove()
    return kept


@torch.no_grad()
def log_probability(
    model: Any, example: Example, layer: int, replace: Callable[[Tensor], Tensor] | None
) -> float:
    """Of the gold answer, with the input of one `o_proj` replaced at every position."""
    module = plain.layers(model)[layer].self_attn.o_proj
    handle = None
    if replace is not None:
        handle = module.register_forward_pre_hook(lambda _, args: (replace(args[0]),))
    item = plain.Item(example.inputs, {}, example.target_ids)
    try:
        return plain.log_probability(model, item)
    finally:
        if handle is not None:
            handle.remove()


def expected_drops(name: str, model: Any, examples: TaskExamples, donors: list[Example]) -> Tensor:
    """Mean drop of the gold answer's log-probability [L, H], one head and one example at a time."""
    heads, depth = plain.head_count(model), len(plain.layers(model))
    drops = torch.zeros(depth, heads, dtype=torch.float64)
    for i in range(len(examples)):
        example = examples[i]
        values = last_head_outputs(model, donors[i])
        width = len(values[0]) // heads
        for layer in range(depth):
            base = log_probability(model, example, layer, None)
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)

                def replace(x: Tensor, part: slice = part, value: Tensor = values[layer]) -> Tensor:
                    edited = x.clone()
                    edited[..., part] = 0 if name == "zero" else value[part]
                    return edited

                drops[layer, head] += base - log_probability(model, example, layer, replace)
    return drops / len(examples)


@pytest.mark.parametrize("name", ["zero", "resample"])
def test_rank_with_an_edit_equals_a_plain_loop(
    name: str, own: own_answers.Prepared, lmm: Any, examples: TaskExamples, tmp_path: Path
) -> None:
    given = own.command("rank", "--method", "hones", "--edit", name, "--limit", LIMIT, "--heads", 4)
    assert main([*given, "--out", str(tmp_path)]) == 0
    ranking = Ranking.load(tmp_path)
    assert ranking.provenance.settings["edit"] == name
    replacement = HeadReplacement(name, Anatomy.of(inner_model(lmm)), examples)
    donors = [replacement.donor(examples[i]) for i in range(LIMIT)]
    assert all(donor.image_hashes != examples[i].image_hashes for i, donor in enumerate(donors))
    expected = expected_drops(name, inner_model(lmm), examples, donors)
    assert ranking.head_log_probability is not None
    worst = (ranking.head_log_probability.double() - expected).abs().max()
    assert worst <= 1e-4 * expected.abs().max() > 0


def test_mean_replacement_is_the_default_and_is_not_recorded(own: own_answers.Prepared) -> None:
    ranking = Ranking.load(own.rankings / "hones")
    assert "edit" not in ranking.provenance.settings


@pytest.mark.parametrize("name", ["zero", "resample"])
def test_vseam_with_an_edit_differs_from_mean_replacement(
    name: str, own: own_answers.Prepared, tmp_path: Path
) -> None:
    for edit in ("mean", name):
        given = own.command("rank", "--method", "vseam", "--edit", edit, "--limit", LIMIT, "--heads", 4)
        assert main([*given, "--out", str(tmp_path / edit)]) == 0
    one, two = (Ranking.load(tmp_path / edit).head_scores for edit in ("mean", name))
    assert one is not None
    assert two is not None
    assert (one - two).abs().max() > 0


def test_resampling_does_not_depend_on_the_number_of_processes(
    own: own_answers.Prepared, tmp_path: Path
) -> None:
    for devices in ("1", "2"):
        given = own.command("rank", "--method", "vseam", "--edit", "resample", "--limit", LIMIT, "--heads", 4)
        flags = [*map(str, given), "--out", str(tmp_path / devices), "--devices", devices]
        command = [sys.executable, "-m", "hones_eval", *flags]  # with two devices it starts itself again
        assert subprocess.run(command, timeout=300, check=False).returncode == 0
    one, two = (Ranking.load(tmp_path / devices).head_scores for devices in ("1", "2"))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_an_edit_is_one_function_and_one_row(
    own: own_answers.Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new edit, half of each head, is reachable as soon as it is registered."""
    monkeypatch.setitem(HEAD_EDITS, "half", HeadEdit("half of its output", lambda x, other: x / 2))
    head_edit.cache_clear()
    from hones_eval import api

    model = api.load(own_answers.MODEL, own.model_args)
    ranking = api.rank(model, "own_a", method="vseam", include_path=own.tasks, limit=2, heads=2, edit="half")
    assert ranking.provenance.settings["edit"] == "half"
    assert ranking.head_scores is not None
    assert ranking.head_scores.abs().max() > 0


@pytest.mark.parametrize(
    ("replacement", "says"),
    [
        (lambda x, other: x.mean(1, keepdim=True).expand_as(x), "is not position-free"),
        (lambda x, other: x.roll(1, 1), "is not position-free"),
        (lambda x, other: x * torch.arange(x.shape[1])[:, None, None], "is not position-free"),
        (lambda x, other: x[..., :1], "keep the shape"),
    ],
)
def test_edits_that_replay_cannot_reproduce_are_refused(
    replacement: Callable[[Tensor, Tensor | None], Tensor], says: str
) -> None:
    with pytest.raises(HonesError, match=says):
        check_position_free("mine", HeadEdit("something", replacement))


def test_every_registered_edit_is_position_free() -> None:
    for name, edit in HEAD_EDITS.items():
        check_position_free(name, edit)
        assert name in head_edits.described()


def test_bad_requests_are_one_line(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = own.command("rank", "--method", "hones", "--edit", "resample", "--limit", 1, "--heads", 4)
    assert main([*given, "--out", str(tmp_path)]) == 1
    assert "--edit resample takes values from another example" in own_answers.complaint(
        capsys.readouterr().err
    )
    with pytest.raises(HonesError, match="--edit halve is not known: choose one of mean, zero, resample"):
        head_edit("halve")
