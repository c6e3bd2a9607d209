"""A question without an image is answered from its own input, or the error names it."""

from pathlib import Path

import families
import family_doors
import pytest
from family_doors import BLUE, RED, Question
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model

from hones_eval.errors import HonesError

SHOWN = [Question("What color is the circle?", (RED,)), Question("How many?", (BLUE,))]
BARE = Question("What color is grass in the summer of a warm year?", ())


def built(name: str, checkpoint: Path, *, simple: bool = False) -> lmms:
    more = ",dtype=float32" if name == "hones_hf" else ""
    return get_model(name, simple).create_from_arg_string(f"pretrained={checkpoint}{more}", {"batch_size": 1})


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_llava_names_the_document_and_the_way_out(
    llava_checkpoint: Path, simple: bool, position: int
) -> None:
    questions = [*SHOWN[:position], BARE, *SHOWN[position:]]
    lm = built("hones_llava", llava_checkpoint, simple=simple)
    with pytest.raises(HonesError, match=rf"llava_hf, task circles, doc {position}: .*--model hones_hf"):
        family_doors.ask(lm, questions)
    assert lm.record.errors[0]["doc_id"] == position


def test_hones_hf_answers_it_as_it_answers_it_alone(tmp_path: Path) -> None:
    checkpoint = families.save_checkpoint("smolvlm", tmp_path / "smolvlm")
    lm = built("hones_hf", checkpoint)
    alone = [family_doors.ask(lm, [question])[0] for question in (*SHOWN, BARE)]
    assert family_doors.ask(lm, [*SHOWN, BARE]) == alone
