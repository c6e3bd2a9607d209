"""The Python API: the documented examples run, and give what the commands write."""

import doctest
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import hones_eval as he
from hones_eval.__main__ import main
from hones_eval.api.ranking import default_heads
from hones_eval.core.artifact import ModelShape
from hones_eval.errors import HonesError
from hones_eval.toy import checkpoint_path

ROOT = Path(__file__).parent.parent
DISCOVERY = "scenes_vqa_relation_discovery"
MODEL_ARGS = f"pretrained={checkpoint_path()}"


@pytest.fixture(scope="module")
def model() -> he.Model:
    return he.load("hones_llava", MODEL_ARGS)


@pytest.fixture(scope="module")
def ranking(model: he.Model) -> he.Ranking:
    return he.rank(model, DISCOVERY, limit=3, heads=4)


@pytest.mark.usefixtures("models_loaded_once")
@pytest.mark.parametrize("name", ["model", "ranking", "scaling", "verification"])
def test_docstring_examples_run(name: str) -> None:
    found = doctest.testmod(import_module(f"hones_eval.api.{name}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.usefixtures("models_loaded_once")
def test_the_page_about_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["by_hand"].head_scales[3, 5] == 0
    assert names["by_hand"].neuron_scales[4, 123] == 2
    assert names["chosen"].provenance.settings["how"] == "grid"
    assert (tmp_path / "steering" / "steering.json").is_file()


@pytest.mark.usefixtures("models_loaded_once")
def test_the_command_writes_what_the_function_returns(ranking: he.Ranking, tmp_path: Path) -> None:
    flags = ["--model", "hones_llava", "--model_args", MODEL_ARGS, "--tasks", DISCOVERY, "--limit", "3"]
    out = tmp_path / "ranking"
    assert main(["rank", "--method", "hones", *flags, "--heads", "4", "--out", str(out)]) == 0
    written = he.Ranking.load(out)
    assert written.digest == ranking.digest
    assert written.provenance == ranking.provenance
    steering = he.scale(ranking, how="fixed", factor=1.5)
    given = ["--ranking", str(out), "--how", "fixed", "--factor", "1.5", "--out", str(tmp_path / "s")]
    assert main(["scale", *given]) == 0
    assert he.Steering.load(tmp_path / "s").digest == steering.digest


def test_a_loaded_model_gives_the_ranking_of_its_wrapper(model: he.Model) -> None:
    """The prompts of `he.load(model, processor)` are those of `--model hones_hf`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    live = AutoModelForImageTextToText.from_pretrained(checkpoint_path())
    generate = live.generate
    loaded = he.load(live, AutoProcessor.from_pretrained(checkpoint_path()))
    found = he.rank(loaded, DISCOVERY, limit=3, heads=4)
    named = he.rank(he.load("hones_hf", MODEL_ARGS), DISCOVERY, limit=3, heads=4)
    assert found.digest == named.digest
    assert live.generate == generate
    assert loaded.model is live
    with pytest.raises(HonesError, match="give the processor of the loaded model too"):
        he.load(live)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "honse"}, "there is no method 'honse': choose one of hones, vseam, "),
        ({"heads": 1000}, "heads 1000: cannot choose 1000 of 48 heads (6 layers of 8): ask for 1 to 48"),
        (
            {"method": "vseam", "race": 0.1},
            "budget, metric_only, race and screen only apply to method hones, not to vseam",
        ),
    ],
)
def test_errors_name_arguments_as_python_does(model: he.Model, given: dict[str, Any], says: str) -> None:
    with pytest.raises(HonesError) as caught:
        he.rank(model, DISCOVERY, limit=2, **given)
    assert str(caught.value).startswith(says)
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "heads", "share"), [(32, 32, 30), (6, 8, 1), (1, 8, 1), (64, 64, 30), (24, 16, 11)]
)
def test_the_default_number_of_heads_is_the_papers_share(layers: int, heads: int, share: int) -> None:
    assert default_heads(ModelShape(layers, heads, 4, 8, 16, 99)) == share


@pytest.mark.usefixtures("models_loaded_once")
def test_the_command_says_how_many_heads_it_took_and_refuses_only_an_explicit_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "hones_llava", "--model_args", MODEL_ARGS, "--tasks", DISCOVERY, "--limit", "1"]
    rank = ["rank", "--method", "vseam", *flags, "--out", str(tmp_path / "ranking")]
    assert main(rank) == 0
    printed = capsys.readouterr()
    assert "chose 1 of 48 heads, the paper's share (30 of 1024); --heads changes that" in printed.out
    assert he.Ranking.load(tmp_path / "ranking").provenance.settings["heads"] == 1
    assert main([*rank, "--overwrite", "--heads", "49"]) == 1
    assert "--heads 49: cannot choose 49 of 48 heads" in capsys.readouterr().err


def test_steering_by_hand_takes_what_load_returns(model: he.Model) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model.model(input_ids=tokens).logits
        with he.steer(model, he.Steering.by_hand(model, heads={(0, 0): 0.0})):  # type: ignore[arg-type]
            during = model.model(input_ids=tokens).logits
        after = model.model(input_ids=tokens).logits
    assert not torch.equal(before, during)
    assert torch.equal(before, after)


def test_the_best_sites_come_first_with_their_scores(ranking: he.Ranking) -> None:
    assert ranking.head_scores is not None
    assert ranking.neuron_scores is not None
    heads, neurons = ranking.top_heads(5), ranking.top_neurons(7)
    assert [score for _, score in heads] == sorted(ranking.head_scores.flatten().tolist(), reverse=True)[:5]
    assert [score for _, score in neurons] == sorted(ranking.neuron_scores.flatten().tolist(), reverse=True)[
        :7
    ]
    assert all(ranking.head_scores[head] == score for head, score in heads)


def test_short_forms_of_a_ranking(ranking: he.Ranking) -> None:
    assert len(repr(ranking)) < 400
    assert DISCOVERY in repr(ranking)
    assert "<table>" in ranking._repr_html_()
    table = ranking.to_pandas()
    assert len(table) == 48
    head, score = ranking.top_heads(1)[0]
    row = table[(table["layer"] == head.layer) & (table["head"] == head.head)]
    assert row["head_scores"].item() == score
    assert len(ranking.plot().axes) == 2


def test_short_forms_of_a_verification(ranking: he.Ranking, model: he.Model, tmp_path: Path) -> None:
    found = he.verify(
        ranking, model, "scenes_vqa_relation_development", limit=4, trials=2, out=tmp_path / "v"
    )
    assert (tmp_path / "v" / "verify.png").is_file()
    rows = found.rows()
    base = found["baseline"]["metric"]
    assert all(row["drop"] == pytest.approx(base - row["metric"]) for row in rows)
    assert "unedited on 4 examples" in repr(found)
    assert len(found.to_pandas()) == 3
    assert found._repr_html_().count("<tr>") == 4
    assert found.plot()._repr_png_().startswith(b"\x89PNG")


def test_names_in_html_are_text(ranking: he.Ranking) -> None:
    import dataclasses

    examples = dataclasses.replace(ranking.provenance.examples[0], task="<script>alert(1)</script>")
    source = dataclasses.replace(ranking.provenance, examples=[examples])
    assert "<script>" not in dataclasses.replace(ranking, provenance=source)._repr_html_()


def test_the_package_is_typed_and_imports_nothing_heavy() -> None:
    assert (ROOT / "hones_eval" / "py.typed").is_file()
    code = "import sys, hones_eval; sys.exit(bool({'torch', 'lmms_eval', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(getattr(he, name) is not None for name in he.__all__)
