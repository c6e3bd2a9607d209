"""Comparisons of rankings: groups, overlaps compared with chance, cross-masking, and the written files."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import own_answers
import pytest
import torch

from hones_eval.__main__ import main
from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError, MisfitError
from hones_eval.jobs.compare import Comparison, chance_of_sharing, group_name, groups, load_named, overlaps
from hones_eval.jobs.compare_levels import levels_of, sharing
from hones_eval.reports.comparison import short_names


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def three(own: own_answers.Prepared) -> dict[str, Ranking]:
    """One real ranking, and two whose selections are known to share some neurons with it."""
    real = Ranking.load(own.rankings / "hones")
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(real.neuron_scores.shape, generator=generator) * real.neuron_scores.max()
    near = dataclasses.replace(real, neuron_scores=real.neuron_scores + 0.3 * noise)
    far = dataclasses.replace(real, neuron_scores=real.neuron_scores + noise)
    return {"real": real, "near": near, "far": far}


def test_groups_are_disjoint_and_cover_the_banks() -> None:
    a, b, c = ([Neuron(0, i) for i in members] for members in ([1, 2, 3, 4], [2, 3, 5], [3, 4, 6]))
    found = {
        names: {neuron.neuron for neuron in bank} for names, bank in groups({"a": a, "b": b, "c": c}).items()
    }
    assert found == {
        ("a",): {1},
        ("b",): {5},
        ("c",): {6},
        ("a", "b"): {2},
        ("a", "c"): {4},
        ("b", "c"): set(),
        ("a", "b", "c"): {3},
    }


def test_chance_of_sharing_matches_an_enumeration_of_all_draws() -> None:
    """Enumerate all pairs of banks with one of four sites in one layer, and two of five in another."""
    widths = (4, 5)
    layers = [list(itertools.combinations(range(widths[i]), size)) for i, size in enumerate((1, 2))]
    banks = [{(0, i) for i in one} | {(1, i) for i in two} for one in layers[0] for two in layers[1]]
    counts = np.bincount([len(a & b) for a in banks for b in banks], minlength=4)
    found = chance_of_sharing([1, 2], [1, 2], widths)
    assert found.tolist() == pytest.approx((counts / counts.sum()).tolist())


def test_sites_that_a_layer_lacks_cannot_be_shared() -> None:
    """Two rankings select all that there is: they agree by chance, although one layer has only two heads."""
    shape = ModelShape(layers=2, heads=4, head_width=2, hidden=8, neurons=3, vocabulary=9, layer_heads=[2, 4])
    source = Provenance("base", None, shape, "hones", {}, [ExampleSet("task", "test", 1, 0, "hash")])
    scores = torch.ones(2, 4).masked_fill(~shape.head_mask(), 0)
    rankings = {name: Ranking(source, head_scores=scores) for name in "ab"}
    (found,) = Comparison(rankings, heads=6).overlaps()["heads"]
    assert (found.jaccard, found.chance, found.chance_by_layer) == pytest.approx((1, 1, 1))
    assert found.p_by_layer == pytest.approx(1)


def test_overlaps_distinguish_crowding_in_a_layer_from_agreement() -> None:
    width = 50
    a = [Head(3, i) for i in range(20)]
    b = [Head(3, i) for i in range(12, 32)]
    (found,) = overlaps({"a": a, "b": b}, [width] * 4)
    assert (found.shared, found.jaccard) == (8, 8 / 32)
    draws = torch.stack(
        [torch.randperm(width, generator=torch.Generator().manual_seed(i))[:20] for i in range(4000)]
    )
    shared = (draws < 20).sum(1).double()
    assert found.chance_by_layer == pytest.approx(float((shared / (40 - shared)).mean()), abs=0.005)
    assert found.p_by_layer == pytest.approx(float((shared >= 8).double().mean()), abs=0.03)
    assert found.chance < 0.25 * found.chance_by_layer
    assert overlaps({"a": a, "b": []}, [width] * 4)[0].jaccard == 0


def test_sharing_within_levels_matches_an_enumeration_of_all_permutations() -> None:
    """Six banks of heads: three of one level are nearly equal, and one is empty."""
    banks = {
        "a +": [Head(0, 0), Head(0, 1), Head(1, 0)],
        "b +": [Head(0, 0), Head(0, 1), Head(1, 1)],
        "c +": [Head(0, 0), Head(0, 1), Head(1, 2)],
        "d +": [Head(1, 5), Head(0, 1), Head(1, 6)],
        "e +": [Head(1, 5), Head(0, 2), Head(1, 7)],
        "f +": [],
        "a -": [Head(0, 0)],
    }
    levels = dict(zip("abcdef", ["one", "one", "one", "two", "two", "two"], strict=True))
    found = {row.levels: row for row in sharing({"heads": overlaps(banks, [8, 8])}, levels)}
    sets = {name[0]: set(bank) for name, bank in banks.items() if name[1:] == " +" and bank}
    jaccard = {
        pair: len(sets[pair[0]] & sets[pair[1]]) / len(sets[pair[0]] | sets[pair[1]])
        for pair in itertools.combinations(sets, 2)
    }

    def mean(level: dict[str, str], within: bool) -> float:
        return float(np.mean([j for (x, y), j in jaccard.items() if (level[x] == level[y]) is within]))

    assert {name: row.pairs for name, row in found.items()} == {
        "within one": 3, "within two": 1, "one and two": 6, "within a level": 4, "across levels": 6,
    }  # fmt: skip
    assert {row.sites for row in found.values()} == {"heads +"}
    assert found["within a level"].jaccard == pytest.approx(mean(levels, True))
    assert found["across levels"].jaccard == pytest.approx(mean(levels, False))
    assert found["within two"].jaccard == pytest.approx(jaccard["d", "e"])
    deals = [dict(zip("abcde", deal, strict=True)) for deal in itertools.permutations("ooott")]
    gaps = [mean(deal, True) - mean(deal, False) for deal in deals]
    own = mean(levels, True) - mean(levels, False)
    assert found["within a level"].p == pytest.approx(np.mean(np.array(gaps) >= own - 1e-9))
    with pytest.raises(HonesError, match="names 1 levels for 2 rankings"):
        levels_of(["x", "y"], ["one"])
    with pytest.raises(HonesError, match="two levels or more, and two rankings of one"):
        levels_of(["x", "y"], ["one", "two"])


def test_a_group_is_a_ranking_that_selects_the_group(three: dict[str, Ranking]) -> None:
    comparison = Comparison(three, neurons=0.1)
    banks = comparison.neuron_banks()
    seen = []
    for names, bank in comparison.groups().items():
        if not bank:
            with pytest.raises(HonesError, match="no neuron is shared by exactly"):
                comparison.group_ranking(names, bank)
            continue
        selected = comparison.group_ranking(names, bank).neurons()
        assert set(selected) == set(bank)
        inside = set.intersection(*(set(banks[name]) for name in names))
        assert set(bank) == inside - {n for name in banks if name not in names for n in banks[name]}
        seen += selected
    assert sorted(seen) == sorted({neuron for bank in banks.values() for neuron in bank})


def test_rankings_that_cannot_be_compared_are_rejected(three: dict[str, Ranking]) -> None:
    real = three["real"]
    with pytest.raises(HonesError, match="at least two rankings, not 1"):
        Comparison({"real": real})
    shape = dataclasses.replace(real.provenance.shape, heads=5)
    other = Ranking(dataclasses.replace(real.provenance, shape=shape), neuron_scores=real.neuron_scores)
    with pytest.raises(
        MisfitError, match=r"other: the ranking for .* does not fit the model of real \(heads: 5"
    ):
        Comparison({"real": real, "other": other})


@pytest.fixture(scope="module")
def folders(own: own_answers.Prepared, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = [own.rankings / "hones", own.rankings / "vseam"]
    for method in ("dvp", "write_norm"):
        made.append(tmp_path_factory.mktemp("more") / method)
        chosen = ["--limit", 4, "--neurons", 0.05, "--out", made[-1]]
        assert main(own.command("rank", "--method", method, *chosen, task="own_b")) == 0
    return made


def test_the_command_writes_tables_figures_and_groups_for_other_commands(
    folders: list[Path], own: own_answers.Prepared, tmp_path: Path
) -> None:
    chosen = ["--limit", 4, "--offset", 4, "--heads", 4, "--out", tmp_path]
    assert main(own.command("compare", *folders, *chosen, task="own_a,own_b")) == 0
    report = json.loads((tmp_path / "compare.json").read_text())
    names = ["own_a hones", "own_a vseam", "own_b dvp", "own_b write_norm"]
    assert list(report["rankings"]) == names
    assert list(report["neurons_by_layer"]) == [names[0], *names[2:]]
    assert list(report["heads_by_layer"]) == [names[0], f"{names[1]} +", f"{names[1]} -"]
    for figure in ("neurons_by_layer", "groups", "neuron_overlaps", "head_overlaps", "heads", "cross_task"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "cross_task.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["masked"], row["measured"]) for row in rows] == [
        (name, task) for task in ("own_a", "own_b") for name in report["neurons_by_layer"]
    ]
    assert "## Cross task" in (tmp_path / "compare.md").read_text()
    _agrees_with_verify(rows[0], own, tmp_path)
    group = next(path for path in sorted((tmp_path / "groups").iterdir()) if "+" not in path.name)
    flags = ["--ranking", group, "--offset", 8, "--limit", 3, "--trials", 2, "--out", tmp_path / "verified"]
    assert main(own.command("verify", *flags)) == 0
    scaled = ["--how", "fixed", "--out", tmp_path / "scaled"]
    assert main(["scale", "--ranking", str(group), *map(str, scaled)]) == 0
    ranking, steering = Ranking.load(group), Steering.load(tmp_path / "scaled")
    assert int((steering.neuron_scales != 1).sum()) == len(ranking.neurons())
    assert {one.task for one in ranking.provenance.examples} == {"own_a", "own_b"}


def _agrees_with_verify(row: dict[str, Any], own: own_answers.Prepared, folder: Path) -> None:
    flags = ["--limit", 4, "--offset", 4, "--trials", 2, "--out", folder / "alone"]
    assert main(own.command("verify", "--ranking", own.rankings / "hones", *flags)) == 0
    alone = json.loads((folder / "alone" / "verify.json").read_text())
    assert float(row["baseline"]) == alone["baseline"]["metric"]
    assert float(row["metric"]) == alone["banks"]["selected"]["metric"]
    assert float(row["random_drop"]) == alone["banks"]["random 1"]["metric_drop"]["value"]


def test_the_command_compares_levels_and_draws_both_signs(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for task, limit in (("own_a", 4), ("own_a", 8), ("own_b", 8)):
        folders.append(str(tmp_path / f"{task}_{limit}"))
        assert (
            main(
                own.command(
                    "rank",
                    "--method",
                    "vseam",
                    "--limit",
                    limit,
                    "--heads",
                    4,
                    "--out",
                    folders[-1],
                    task=task,
                )
            )
            == 0
        )
    out = tmp_path / "out"
    assert main(["compare", *folders, "--heads", "5", "--levels", "one,one,two", "--out", str(out)]) == 0
    report = json.loads((out / "compare.json").read_text())
    by_names = {(one["first"], one["second"]): one["jaccard"] for one in report["head_overlaps"]}
    names = list(report["rankings"])
    for sign in "+-":
        rows = {one["levels"]: one for one in report["levels"] if one["sites"] == f"heads {sign}"}
        first, second, other = (f"{name} {sign}" for name in names)
        assert rows["within one"]["jaccard"] == pytest.approx(by_names[first, second])
        across = np.mean([by_names[first, other], by_names[second, other]])
        assert rows["across levels"]["jaccard"] == pytest.approx(across)
    assert "heads + within a level, 1 pairs: mean Jaccard" in capsys.readouterr().out
    assert "## Levels" in (out / "compare.md").read_text()
    for figure in ("heads", "heads_positive", "heads_negative"):
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", *folders, "--levels", "one,two", "--out", str(tmp_path / "not")]) == 1
    assert "names 2 levels for 3 rankings" in own_answers.complaint(capsys.readouterr().err)


def test_bad_names_and_flags_are_one_line_errors(
    folders: list[Path], own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(folder) for folder in folders[::2]]
    for given, complaint in (
        ([pair[0], pair[0]], "given twice"),
        ([*pair, "--tasks", "own_a"], "needs --model and --tasks"),
    ):
        assert main(["compare", *given, "--out", str(tmp_path)]) == 1
        assert complaint in own_answers.complaint(capsys.readouterr().err)
    given = own.command("compare", *pair, "--limit", 6, "--out", tmp_path)
    for limits, complaint in (
        ([], "4 of the 6 images of own_a"),
        (["--limits", '{"own_a": 5}'], "4 of the 5 images of own_a"),
        (["--limits", '{"own_b": 5}'], "--limits names own_b, which is not one of --tasks own_a"),
        (["--tasks", "own_a,own_b,own_a"], "--tasks own_a,own_b,own_a: a task is named twice"),
    ):
        assert main([*given, *limits]) == 1
        assert complaint in own_answers.complaint(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
    assert list(load_named(folders[::2])) == ["own_a", "own_b"]
    assert group_name(("a", "b")) == "a+b"


def test_short_names_drop_shared_words_and_stay_different() -> None:
    cases = {
        ("s_vqa_a_disc", "s_vqa_b_disc", "s_ocr_disc"): ["vqa_a", "vqa_b", "ocr"],
        ("own_a hones", "own_b dvp"): ["a hones", "b dvp"],
        ("t", "t_x"): ["t", "t_x"],
        ("a_x_a", "a_a"): ["x_a", "a"],
        ("one",): ["one"],
    }
    for names, expected in cases.items():
        assert list(short_names(names).values()) == expected
