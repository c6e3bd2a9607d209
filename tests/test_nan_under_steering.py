"""NaN logits stop a steered run at the example where they begin, also when that is not the first."""

from pathlib import Path

import family_doors
import pytest
import torch
from family_doors import QUESTIONS, record
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_runs import write_steering

from hones_eval.errors import HonesError
from hones_eval.lmms.examples import inner_model


@pytest.fixture
def steered(llava_checkpoint: Path, tmp_path: Path) -> lmms:
    write_steering(llava_checkpoint, tmp_path / "steering", seed=1)
    arguments = f"pretrained={llava_checkpoint},steering={tmp_path / 'steering'}"
    return get_model("hones_llava").create_from_arg_string(arguments, {"batch_size": 1})


def prompt_tokens(lm: lmms, question: int) -> set[int]:
    return set(record(lm, QUESTIONS[question]).inputs["input_ids"][0].tolist())


def poison(lm: lmms, token: int) -> None:
    """From now on a token's embedding is NaN, and so are all logits after it."""
    with torch.no_grad():
        inner_model(lm).get_input_embeddings().weight[token] = torch.nan


def test_in_the_prompt_of_a_later_question(steered: lmms) -> None:
    only_second = prompt_tokens(steered, 1) - prompt_tokens(steered, 0)
    assert family_doors.ask(steered, QUESTIONS[:1])
    poison(steered, min(only_second))
    with pytest.raises(HonesError, match=r"task circles, doc 1: the logits are NaN under the steering"):
        family_doors.ask(steered, QUESTIONS)
    (error,) = steered.record.errors
    assert (error["task"], error["doc_id"]) == ("circles", 1)


def test_in_a_later_step_of_an_answer(steered: lmms) -> None:
    """The first step of decoding is sound; the step after the poisoned token is not."""
    call = record(steered, QUESTIONS[1])
    model = inner_model(steered)
    output = model.generate(**call.inputs, **call.settings)
    new = output[0, call.inputs["input_ids"].shape[1] :].tolist()
    known = prompt_tokens(steered, 0) | prompt_tokens(steered, 1)
    assert new[0] not in known
    assert len(new) > 2
    poison(steered, new[0])
    with pytest.raises(
        HonesError, match=r"doc \d: the logits are NaN under the steering: lower its strength"
    ):
        family_doors.ask(steered, [QUESTIONS[1]])


def test_in_the_log_likelihoods_of_a_later_choice(steered: lmms) -> None:
    steered.task_dict["circles"] = {"test": QUESTIONS}
    first, second = (family_doors.choice(steered, QUESTIONS[0], text) for text in ("red", "blue"))
    assert steered.loglikelihood([first])
    poison(steered, steered.tokenizer.encode(" blue", add_special_tokens=False)[0])
    with pytest.raises(HonesError, match="the logits are NaN under the steering"):
        steered.loglikelihood([first, second])


def test_a_baseline_is_not_stopped(llava_checkpoint: Path) -> None:
    """Its answers are those of the stock wrapper, whatever they are."""
    lm = get_model("hones_llava").create_from_arg_string(f"pretrained={llava_checkpoint}", {"batch_size": 1})
    poison(lm, min(prompt_tokens(lm, 1)))
    assert len(family_doors.ask(lm, QUESTIONS)) == len(QUESTIONS)
