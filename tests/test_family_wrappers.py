"""Every family through lmms-eval: the properties of each wrapper, and their table in the docs."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import families
import family_doors
import pytest
import torch
from family_doors import BOTH, DOORS, QUESTIONS, Door, Visit, ask
from lmms_eval.models import get_model
from lmms_runs import write_steering

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import steer
from hones_eval.core.steering import Steering
from hones_eval.engine import prompts
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.choices import recorded_choice
from hones_eval.lmms.playback import Playback

TABLE = Path(__file__).parent.parent / "docs" / "families.md"
REWRITE = "HONES_EVAL_REWRITE_DOCS"
COLUMNS = ("unsteered", "steered", "replay", "fold", "batches", "two images", "choices")
ONE_AT_A_TIME = "one question at a time"


@pytest.fixture(scope="session")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Door], Visit]:
    """A wrapper's checkpoint and steering, written once per family; scales from 1 to 2."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def write(name: str) -> tuple[Path, Path]:
        checkpoint = families.save_checkpoint(name, folder / name)
        write_steering(checkpoint, folder / f"{name}_steering", seed=1)
        return checkpoint, folder / f"{name}_steering"

    @cache
    def make(door: Door) -> Visit:
        return Visit(door, *write(door.family))

    return make


@pytest.fixture(scope="session")
def found(visit: Callable[[Door], Visit]) -> dict[Door, dict[str, str]]:
    """The findings per wrapper, by column, which the tests fill in."""
    return {door: {} for door in DOORS}


@pytest.fixture(params=DOORS, ids=lambda door: f"{door.family}-{door.stock or door.model}")
def at(request: pytest.FixtureRequest, visit: Callable[[Door], Visit]) -> Visit:
    return visit(request.param)


Found = dict[Door, dict[str, str]]


def test_without_a_steering_it_answers_as_transformers_and_as_the_stock_wrapper(
    at: Visit, found: Found
) -> None:
    assert len(set(at.unsteered)) == len(QUESTIONS)  # one may be empty: some wrappers know no least length
    assert at.unsteered == at.plainly(QUESTIONS)
    if at.door.stock is not None:
        stock = ask(at.build(model=at.door.stock), QUESTIONS)
        if at.door.family == "instructblip":  # which repeats the question in front of the answer
            told = zip(stock, QUESTIONS, strict=True)
            stock = [text.removeprefix(question.text).strip() for text, question in told]
        assert at.unsteered == stock
    found[at.door]["unsteered"] = "yes"


def test_a_steering_changes_the_answers_and_transformers_agrees(at: Visit, found: Found) -> None:
    assert at.steered != at.unsteered
    with steer(at.plain_model, Steering.load(at.steering)):
        assert at.steered == at.plainly(QUESTIONS)
    found[at.door]["steered"] = "yes"


def test_replay_equals_the_hooked_forward(at: Visit, found: Found) -> None:
    difference = max(family_doors.replay_difference(at.model, call.inputs) for call in at.calls[:2])
    assert family_doors.within(difference, at.model), difference
    found[at.door]["replay"] = exactly(at)


def test_folding_equals_hooking(at: Visit, found: Found) -> None:
    steering, inputs = Steering.load(at.steering), at.calls[0].inputs
    with steer(at.model, steering):
        hooked = family_doors.next_logits(at.model, inputs)
    with steer(at.model, steering, how="fold"):
        folded = family_doors.next_logits(at.model, inputs)
    assert family_doors.relative(hooked, family_doors.next_logits(at.model, inputs)) > 0.01
    assert family_doors.within(family_doors.relative(folded, hooked), at.model)
    answers = ask(at.build(f"steering={at.steering}", "attach=fold"), QUESTIONS)
    if at.model.dtype == torch.float32:
        assert answers == at.steered
    found[at.door]["fold"] = exactly(at)


def test_batches_padded_on_the_left_give_the_answers_of_single_questions(at: Visit, found: Found) -> None:
    try:
        lm = at.build(f"steering={at.steering}", batch_size=3)
        with family_doors.overhearing(lm._inner) as heard:
            answers = ask(lm, QUESTIONS)
    except (AssertionError, HonesError) as error:
        said = str(error)
        assert "batch" in said.lower(), said
        assert at.door.stock in ("llava_hf", "internvl_hf", "instructblip"), said
        found[at.door]["batches"] = ONE_AT_A_TIME
        return
    assert [len(call["input_ids"]) for call in heard[-1:]] == [3]
    difference = family_doors.padding_difference(at.model, heard[-1], at.calls)
    assert family_doors.within(difference, at.model), difference
    if at.model.dtype == torch.float32:
        assert answers == at.steered
        assert ask(at.build(f"steering={at.steering}", batch_size=2), QUESTIONS) == at.steered
    found[at.door]["batches"] = exactly(at)


def test_two_images(at: Visit, found: Found) -> None:
    if not families.RECIPES[at.door.family](False).several_images:
        found[at.door]["two images"] = "one image per question"
        return
    both, one = ask(at.baseline, [BOTH, BOTH._replace(pictures=BOTH.pictures[:1])])
    assert [both] == at.plainly([BOTH])
    assert both != one
    found[at.door]["two images"] = "yes"


def test_log_likelihoods_of_choices_are_those_of_generating_them(at: Visit, found: Found) -> None:
    """A choice's loss is that of its tokens when transformers is made to generate them one by one."""
    requests = [family_doors.choice(at.baseline, QUESTIONS[0], text) for text in ("a red circle", "blue")]
    losses = family_doors.losses(at.baseline, requests)
    playback = Playback(at.baseline)
    for request, loss in zip(requests, losses, strict=True):
        asked = recorded_choice(playback, request)
        prompt = prompts.shortened(asked.inputs, asked.inputs["input_ids"].shape[1] - asked.scored)
        assert prompt["input_ids"].tolist() == at.calls[0].inputs["input_ids"].tolist()
        assert at.baseline.tokenizer.decode(asked.ids).split() == request.args[1].split()
        forced = family_doors.forced_loss(at.plain_model, prompt, asked.ids)
        assert loss == pytest.approx(forced, rel=1e-4 if at.model.dtype == torch.float32 else 2e-2)
        difference = family_doors.replay_difference(at.model, asked.inputs)
        assert family_doors.within(difference, at.model), difference
    steered = at.build(f"steering={at.steering}")
    assert family_doors.losses(steered, requests) != losses
    assert not steered.record.errors
    found[at.door]["choices"] = exactly(at)


def exactly(at: Visit) -> str:
    """The table's word for a number that agrees; only float32 distinguishes a mistake from rounding."""
    return "yes" if at.model.dtype == torch.float32 else "to the rounding of bfloat16"


HEAD = f"""\
# Families

What `tests/test_family_wrappers.py` finds for a small random model of each family, saved to disk and loaded
through lmms-eval (`{REWRITE}=1` rewrites this page; otherwise the test compares). `--model hones`
with `base=` is the stock wrapper, steered; `--model hones_hf` is this package's own, for any
`AutoModelForImageTextToText` whose processor has a chat template (or PaliGemma, which needs none).

- **unsteered**: the answers of transformers alone, and of the stock wrapper, text for text
- **steered**: other answers, those of transformers alone under the same steering
- **replay**: edited passes replayed from one recording have the logits of hooked forwards, over all heads
- **fold**: scales folded into the weights give the logits and answers of hooks
- **batches**: batches of two and three, padded on the left, give the logits and answers of single questions
- **two images**: in one question, as transformers has them
- **choices**: in tasks of log-likelihoods the loss of a choice is that of its tokens when transformers is
  made to generate them one by one, after the prompt of an answer; replay over it is exact

"yes" is to 1e-4 of the largest logit in float32, answers being equal. Some stock wrappers load bfloat16
whatever they are told; there logits agree to its rounding (8 % of the largest logit at most), and answers may
flip where two tokens are that close. `hones_hf` takes the checkpoint's own type, or `dtype=`; the rows below
are in float32. With several images LLaVA-OneVision does not cut them into tiles under `hones_hf`, as
transformers' chat template has it; `llava_hf` cuts each as if it were the only one.

| family | type | how to run it |{"".join(f" {column} |" for column in COLUMNS)}
|---|---|---|{"---|" * len(COLUMNS)}
"""
REFUSED_HEAD = """
lmms-eval's own wrapper of GLM-4.1V takes its class from the checkpoint's path and loads the mixture of
experts unless the path says otherwise, so GLM4V runs under `hones_hf`. InstructBLIP has no chat template.

## Refused by name
| model | why |
|---|---|
"""


def test_the_table_in_the_docs_is_up_to_date(
    visit: Callable[[Door], Visit], found: Found, request: pytest.FixtureRequest
) -> None:
    if not all(set(cells) == set(COLUMNS) for cells in found.values()):
        pytest.skip("the table takes every test of this file: run it whole")
    rows = []
    for door in sorted(DOORS, key=lambda one: (families.NAMES.index(one.family), one.model)):
        model = f"`--model {door.model}" + (f" --model_args base={door.stock},...`" if door.stock else "`")
        kind = str(visit(door).model.dtype).removeprefix("torch.")
        rows.append(f"| {door.family} | {kind} | {model} | {' | '.join(found[door][c] for c in COLUMNS)} |\n")
    refused = [f"| {name} | {reason(name)} |\n" for name in families.REFUSED_NAMES]
    page = "".join([HEAD, *rows, REFUSED_HEAD, *refused])
    if os.environ.get(REWRITE):
        TABLE.write_text(page, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == page, f"{REWRITE}=1 rewrites it"


def reason(name: str) -> str:
    with pytest.raises(HonesError) as refused:
        Anatomy.of(families.build_refused(name))
    return str(refused.value).replace("|", "\\|")


@pytest.fixture(scope="session")
def smolvlm(visit: Callable[[Door], Visit]) -> Visit:
    return visit(next(door for door in DOORS if door.family == "smolvlm"))


def test_hones_hf_refuses_invalid_arguments(smolvlm: Visit, visit: Callable[[Door], Visit]) -> None:
    cls, folder = get_model("hones_hf"), smolvlm.checkpoint
    instructblip = next(door for door in DOORS if door.family == "instructblip")
    for arguments, message in (
        ("", "pretrained= is missing"),
        (f"pretrained={folder},batch_sise=2", "no argument 'batch_sise': did you mean batch_size?"),
        (f"pretrained={folder},batch_size=auto", "batch_size=auto: hones_hf takes a whole number"),
        (f"pretrained={folder},dtype=float23", "dtype='float23' is unknown"),
        (f"pretrained={folder},chat_template=none.jinja", "chat_template=none.jinja: no such file"),
        (f"pretrained={folder / 'nowhere'}", "nowhere: no such folder"),
        (f"pretrained={visit(instructblip).checkpoint}", r"\(instructblip\) has no chat template"),
    ):
        with pytest.raises(HonesError, match=message):
            cls.create_from_arg_string(arguments)


def test_hones_hf_stops_at_a_request_that_it_cannot_answer(smolvlm: Visit) -> None:
    lm = smolvlm.baseline
    for settings, message in (
        ({"max_new_tokenz": 3}, "no setting max_new_tokenz; did you mean max_new_tokens?"),
        ({"num_beams": 0}, "ZeroDivisionError|num_beams"),
    ):
        lm.task_dict["circles"] = {"test": QUESTIONS}
        asked = family_doors.request(lm, QUESTIONS[0], 0)
        asked.arguments = (asked.args[0], asked.args[1], settings, *asked.args[3:])
        with pytest.raises(HonesError, match=message):
            lm.generate_until([asked])
    video = family_doors.request(lm, QUESTIONS[0], 0)
    shown = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]
    video.arguments = (video.args[0], lambda doc: shown, *video.args[2:])
    with pytest.raises(HonesError, match=r"it shows video \(str\); hones_hf takes images and text"):
        lm.generate_until([video])


def test_hones_hf_ends_an_answer_at_until_and_keeps_questions_in_order(smolvlm: Visit) -> None:
    """Two settings, and questions with and without an image, in batches of two."""
    lm, alone = smolvlm.build(batch_size=2), smolvlm.baseline
    texts = [*QUESTIONS, QUESTIONS[0]._replace(pictures=())]
    whole = [ask(alone, [one])[0] for one in texts]
    assert ask(lm, texts) == whole
    lm.task_dict["circles"] = {"test": texts}
    requests = [family_doors.request(lm, one, i) for i, one in enumerate(texts)]
    end = whole[1][2]
    requests[1].arguments[2]["until"] = [end]
    answers = [answer.text for answer in lm.generate_until(requests)]
    assert answers == [whole[0], whole[1].split(end)[0].strip(), *whole[2:]]


def test_hones_hf_in_simple_mode_shows_images_first(smolvlm: Visit) -> None:
    simple = get_model("hones_hf", force_simple=True)
    assert simple.is_simple
    lm = simple.create_from_arg_string(f"pretrained={smolvlm.checkpoint},dtype=float32", {"batch_size": 3})
    assert ask(lm, QUESTIONS) == smolvlm.unsteered


def test_a_custom_chat_template(smolvlm: Visit, tmp_path: Path) -> None:
    template = (smolvlm.checkpoint / "chat_template.jinja").read_text()
    (tmp_path / "mine.jinja").write_text(template.replace("User:", "Say:"))
    lm = smolvlm.build(f"chat_template={tmp_path / 'mine.jinja'}")
    said = lm.tokenizer.decode(family_doors.record(lm, QUESTIONS[0]).inputs["input_ids"][0])
    assert "Say:" in said
    assert "User:" not in said
