"""`hones-eval edit-sites`: steerings by hand, checked against a model's configuration."""

import json
from pathlib import Path

import pytest
import torch

from hones_eval.__main__ import main
from hones_eval.core.steering import Steering


def test_sites_of_flags_and_of_a_table(
    model_args: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "sites.csv"
    table.write_text("kind,layer,site,scale,shift\nneuron,2,7,,0.5\nheads,1,2,0.5,\n\n")
    flags = ["--set", "head 3.1=0", "--set", "neuron 0.12=2", "--set=neuron 0.12+=-1.5"]
    flags += ["--csv", str(table), "--out", str(tmp_path / "out"), "--json"]
    assert main(["edit-sites", "--model_args", f"{model_args},dtype=float32", *flags]) == 0
    answer = json.loads(capfd.readouterr().out)
    steering = Steering.load(tmp_path / "out")
    heads, neurons = torch.ones_like(steering.head_scales), torch.ones_like(steering.neuron_scales)
    heads[3, 1], heads[1, 2], neurons[0, 12] = 0, 0.5, 2
    shifts = torch.zeros_like(neurons)
    shifts[0, 12], shifts[2, 7] = -1.5, 0.5
    assert torch.equal(steering.head_scales, heads)
    assert torch.equal(steering.neuron_scales, neurons)
    assert steering.neuron_shifts is not None
    assert torch.equal(steering.neuron_shifts, shifts)
    assert steering.head_shifts is None
    assert steering.provenance.base_model == model_args.removeprefix("pretrained=") == answer["base_model"]
    assert answer["sites"] == [
        ["head", 1, 2, 0.5, 0.0],
        ["head", 3, 1, 0.0, 0.0],
        ["neuron", 0, 12, 2.0, -1.5],
        ["neuron", 2, 7, 1.0, 0.5],
    ]


def test_a_table_of_to_pandas_gives_the_same_steering(model_args: str, tmp_path: Path) -> None:
    flags = ["edit-sites", "--model_args", model_args]
    assert main([*flags, "--set", '["head 3.1=0", "neuron 1.2=3"]', "--out", str(tmp_path / "a")]) == 0
    first = Steering.load(tmp_path / "a")
    first.to_pandas().to_csv(tmp_path / "sites.csv", index=False)
    assert main([*flags, "--csv", str(tmp_path / "sites.csv"), "--out", str(tmp_path / "b")]) == 0
    assert Steering.load(tmp_path / "b").digest == first.digest


BAD = {
    "no sites": ([], None, "no site is given: use --set"),
    "head": (["head 3.99=0"], None, "there is no head 3.99: this model has layers 0 to 3 with heads 0 to 3"),
    "layer": (["neuron 4.0=2"], None, "there is no neuron 4.0"),
    "kind": (["expert 3.5=0"], None, "'expert' is no kind of site: use head or neuron"),
    "form": (["head 3.5"], None, "'head 3.5' should have the form"),
    "number": (["head 3.1=much"], None, "'much' should be a number"),
    "nan": (["head 3.1=nan"], None, "'nan' should be a number"),
    "large": (["head 3.1=1e9"], None, "should be a number of at most 10000"),
    "twice": (["head 3.1=0", "head 3.1=2"], None, "head 3.1 is given twice"),
    "noop": (["head 3.1=1"], None, "this steering would change nothing"),
    "head shift": (["head 3.1+=1"], None, "the shift of a head is a vector"),
    "columns": ([], "layer,site,scale\n1,2,0\n", "has no column kind"),
    "cells": ([], "kind,layer,site,scale\nhead,1,2\n", "line 2 has 3 cells, and the first line 4"),
    "row": ([], "kind,layer,site,scale\nhead,x,2,0\n", "line 2: layer 'x' and site '2' should be whole"),
    "no scale": ([], "kind,layer,site,scale\nhead,1,2,\n", "line 2 has no scale"),
}


@pytest.mark.parametrize(("sites", "table", "says"), BAD.values(), ids=BAD)
def test_sites_that_cannot_be_set_are_refused_in_one_line(
    sites: list[str],
    table: str | None,
    says: str,
    model_args: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = [part for site in sites for part in ("--set", site)]
    if table is not None:
        (tmp_path / "sites.csv").write_text(table)
        flags += ["--csv", str(tmp_path / "sites.csv")]
    assert main(["edit-sites", "--model_args", model_args, *flags, "--out", str(tmp_path / "out")]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hones-eval:")]
    assert says in line
    assert not (tmp_path / "out" / "steering.json").exists()


def test_a_model_that_is_not_named_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--set", "head 0.0=0", "--out", str(tmp_path / "out")]
    assert main(["edit-sites", "--model_args", "dtype=float32", *flags]) == 1
    assert "should name the model, as in pretrained=org/name" in capfd.readouterr().err
