"""Arguments of models that cannot be meant: one line with the way out, before any model is loaded."""

from pathlib import Path
from typing import Any

import pytest
from lmms_eval.models import get_model

from hones_eval.errors import HonesError
from hones_eval.lmms.arguments import parsed
from hones_eval.lmms.models import load_lmm
from hones_eval.toy import checkpoint_path

GOOD = f"pretrained={checkpoint_path()}"


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    def loaded(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)


REFUSED = [
    ("pretrained", r"--model_args: 'pretrained' should have the form name=value; .* as in name='a,b'"),
    ("pretrained=/models/a,b", "--model_args: 'b' should have the form name=value"),
    (f"{GOOD} steering=runs/vqa", "a comma is missing before steering="),
    ("pretrained=org/modelsteering=runs/vqa", "a comma is missing before steering="),
    (f"{GOOD} attach=fold", "a comma is missing before attach="),
    (f"{GOOD},strength=1,strength=2", "strength is given twice"),
    (f"pretraind={checkpoint_path()}", "has no argument 'pretraind': did you mean pretrained?"),
    (f"{GOOD},stering=runs/vqa", "has no argument 'stering': did you mean steering?"),
    (f"{GOOD},batch_size=auto", "batch_size=auto: .* takes a whole number of at least 1"),
    ("pretrained=/models/missing", "pretrained=/models/missing: no such folder"),
    ("pretrained=./missing", "pretrained=./missing: no such folder"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
@pytest.mark.parametrize("name", ["hones_llava", "hones_hf"])
def test_lmms_eval_is_told_in_one_line(name: str, arguments: str, message: str) -> None:
    with pytest.raises(HonesError, match=message) as caught:
        get_model(name).create_from_arg_string(arguments, {"batch_size": 1})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "message"), [pair for pair in REFUSED if "stering" not in pair[0]])
def test_the_commands_are_told_the_same_of_stock_models(arguments: str, message: str) -> None:
    with pytest.raises(HonesError, match=message):
        load_lmm("llava_hf", arguments)


def test_a_batch_size_of_the_command_is_checked_too() -> None:
    with pytest.raises(HonesError, match="batch_size=auto: llava_hf takes a whole number"):
        get_model("hones_llava").create_from_arg_string(GOOD, {"batch_size": "auto"})


def test_a_steering_that_is_missing_or_a_ranking(tmp_path: Path) -> None:
    (tmp_path / "ranking.json").write_text("{}")
    with pytest.raises(
        HonesError, match=r"is a ranking: make a steering of it with hones-eval scale --ranking"
    ):
        get_model("hones_llava").create_from_arg_string(f"{GOOD},steering={tmp_path}")
    with pytest.raises(HonesError, match="no steering at '/no/steering'"):
        get_model("hones_llava").create_from_arg_string(f"{GOOD},steering=/no/steering")


def test_a_model_with_a_similar_name_is_named() -> None:
    with pytest.raises(HonesError, match=r"lmms-eval's llava cannot be .*use --model llava_hf"):
        load_lmm("llava", "pretrained=org/model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("pretrained=org/model,dtype=float32", {"pretrained": "org/model", "dtype": "float32"}),
        ("pretrained='/models/a,b',strength=1.5", {"pretrained": "/models/a,b", "strength": 1.5}),
        ("pretrained=/models/lr=0.1,allow_noop=true", {"pretrained": "/models/lr=0.1", "allow_noop": True}),
        ('pretrained="/models/steering=2"', {"pretrained": "/models/steering=2"}),
        ('sizes=[1, 2],more={"a": 3}', {"sizes": [1, 2], "more": {"a": 3}}),
        ("batch_size=4", {"batch_size": 4}),
    ],
)
def test_values_with_commas_equal_signs_and_lists(text: str, expected: dict[str, Any]) -> None:
    assert parsed(text) == expected
