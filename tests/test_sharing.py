"""`push` and `pull` on a hub of this test's own, on the loopback."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from transformers import AutoModelForImageTextToText

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance
from hones_eval.core.model_card import model_card
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError

SHAPE = ModelShape(layers=2, heads=3, head_width=4, hidden=8, neurons=5, vocabulary=99)
BOARD = "task,metric,n,baseline,steered,difference,low,high,verdict,steering_digest\n"


def make(base: str = "org/base") -> Steering:
    heads = torch.ones(2, 3)
    heads[1, 2] = 0.5
    examples = [ExampleSet("vqa", "dev", 7, 0, "f00d", [0], ["aa"])]
    settings = {"how": "fixed", "model_args": "pretrained=/home/me/secret", "note": "a|b<i>"}
    return Steering(heads, torch.ones(2, 5), Provenance(base, None, SHAPE, "hones", settings, examples))


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The repositories of a hub that every call of huggingface_hub reaches."""
    found: dict[str, Any] = {"me/other": {"config.json": b"{}"}}
    with hub.serving(found) as url:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        yield found


def test_what_is_pushed_is_pulled_at_its_commit(
    repositories: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steering = make()
    steering.save(tmp_path / "s")
    (tmp_path / "board").mkdir()
    row = f"gqa,exact_match,100,0.5,0.6,0.1,0.02,0.18,better,{steering.digest}\n"
    (tmp_path / "board" / "leaderboard.csv").write_text(BOARD + row + row.replace(steering.digest, "other"))
    flags = ["--board", str(tmp_path / "board"), "--licence", "apache-2.0"]
    assert main(["push", str(tmp_path / "s"), "me/steering", *flags]) == 0
    commit = hub.commit_of(repositories["me/steering"])
    assert f"uploaded {tmp_path / 's'} to me/steering, commit {commit}" in capsys.readouterr().out
    assert hub.CREATED["me/steering"]["visibility"] == "private"
    files = repositories["me/steering"]
    assert sorted(files) == ["README.md", "steering.json", "steering.safetensors"]
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "org/base"
    assert (metadata["library_name"], metadata["license"]) == ("hones-eval", "apache-2.0")
    assert {"steering", "hones"} <= set(metadata["tags"])
    assert "| gqa | exact_match | 100 | 0.5 | 0.6 | 0.1 | 0.02 | 0.18 | better |" in card
    assert card.count("| gqa |") == 1
    assert "vqa (dev), 7 examples" in card
    assert "a\\|b&lt;i>" in card
    assert "secret" not in card

    assert main(["pull", "me/steering", str(tmp_path / "back")]) == 0
    assert f"from me/steering, commit {commit}" in capsys.readouterr().out
    pulled = Steering.load(tmp_path / "back")
    assert pulled.digest == steering.digest
    assert pulled.provenance.settings["hub"] == {"repository": "me/steering", "commit": commit}
    assert (tmp_path / "back" / "README.md").read_text() == card
    assert main(["pull", "me/steering", str(tmp_path / "back")]) == 1  # not over another result
    assert Steering.load(f"me/steering@{commit}").provenance.settings["hub"]["commit"] == commit
    assert Steering.load("me/steering:0.5").head_scales[1, 2] == 0.75


@pytest.mark.parametrize("to", ["checkpoint", "ia3"])
def test_an_export_takes_the_model_at_the_recorded_commit(
    to: str, repositories: dict[str, Any], llava_checkpoint: Path, tmp_path: Path
) -> None:
    """The model on the hub has changed since: each commit gives the export of its own weights."""
    model = AutoModelForImageTextToText.from_pretrained(llava_checkpoint)
    shape = Anatomy.of(model).shape
    heads = torch.ones(shape.layers, shape.heads)
    heads[1, 0] = 0.5
    name = next(name for name, _ in model.named_parameters() if name.endswith("0.self_attn.o_proj.weight"))
    files = {path.name: path.read_bytes() for path in llava_checkpoint.iterdir()}
    older = hub.commit_of(files)
    hub.OLDER["me/base", older] = files
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
    model.save_pretrained(tmp_path / "newer")
    repositories["me/base"] = files | {p.name: p.read_bytes() for p in (tmp_path / "newer").iterdir()}
    found = {}
    for revision in (older, hub.commit_of(repositories["me/base"])):
        source = Provenance("me/base", revision, shape, "hones", {}, [])
        Steering(heads, torch.ones(shape.layers, shape.neurons), source).save(tmp_path / revision)
        out = tmp_path / f"exported {revision}"
        assert main(["export", "--steering", str(tmp_path / revision), "--to", to, "--out", str(out)]) == 0
        found[revision] = out
    if to == "checkpoint":
        ends = [
            AutoModelForImageTextToText.from_pretrained(out).get_parameter(name) for out in found.values()
        ]
        torch.testing.assert_close(2 * ends[0], ends[1])
    else:
        stated = [json.loads((out / "adapter_config.json").read_text())["revision"] for out in found.values()]
        assert stated == list(found)


def test_what_cannot_be_shared_is_one_line(
    repositories: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make().save(tmp_path / "s")
    (tmp_path / "board").mkdir()
    (tmp_path / "board" / "leaderboard.csv").write_text(BOARD)
    own = str(tmp_path / "s")
    for given, says in (
        (["push", str(tmp_path / "none"), "me/x"], "none is no folder"),
        (["push", own, "me/x", "--board", str(tmp_path / "board")], "has no row with this steering"),
        (["push", own, "not a name"], "not a name could not be written on the hub"),
        (["pull", "me/other", str(tmp_path / "o")], "me/other on the hub is no steering: it has no steering"),
        (["pull", "me/none", str(tmp_path / "o")], "no steering at 'me/none'"),
        (["push", own], "missing: REPOSITORY"),
    ):
        assert main(given) != 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hones-eval:")]
        assert says in line
    assert set(repositories) == {"me/other"}
    assert not (tmp_path / "o").exists()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(HonesError, match="is there a token with write access"):
        make().push("me/x")


def test_a_card_of_a_local_model_names_no_folder() -> None:
    steering = make("/home/me/models/toy")
    card = model_card(steering.provenance, steering.counts, steering.digest, "me/s")
    assert "/home" not in card
    assert "`toy`" in card
    assert "base_model" not in card
    assert "No board was given" in card
