"""Conditions: on which prompts a steering acts, compared with prompts that are run one by one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import families
import family_doors
import own_answers
import plain
import pytest
import torch
from lmms_eval.models import get_model
from PIL import Image
from torch import Tensor

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.attach import Part as Attached
from hones_eval.core.attach import attach_parts, attach_steering, steer
from hones_eval.core.condition import Condition, TextCondition, parse_conditions
from hones_eval.core.scope import Scope, answer_follows
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError, MisfitError
from hones_eval.leaderboard.identity import SteeringRef, steering_from_arguments
from hones_eval.methods.condition import best_cut, is_held_out

TEXTS = ("What color is the circle?", "How many?")
SHORT: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


class Setup(NamedTuple):
    """A model, a steering, two questions alone and in a batch, and a condition that holds for the second."""

    family: families.Family
    steering: Steering
    alone: list[dict[str, Tensor]]
    both: dict[str, Tensor]
    condition: Condition


@torch.no_grad()
def last_stream(setup_model: Any, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """The input of a layer at the last token, by a hook of this test's own."""
    kept: list[Tensor] = []
    handle = plain.layers(setup_model)[layer].register_forward_pre_hook(
        lambda _, args, kwargs: kept.append((args[0] if args else kwargs["hidden_states"])[0, -1]),
        with_kwargs=True,
    )
    setup_model(**inputs)
    handle.remove()
    return kept[0].float()


def between(family: families.Family, alone: list[dict[str, Tensor]], layer: int) -> Condition:
    """A condition that holds for the second of two prompts."""
    first, second = (last_stream(family.model, inputs, layer) for inputs in alone)
    direction = second - first
    threshold = float((first + second) @ direction / 2)
    source = Provenance("tiny", None, Anatomy.of(family.model).shape, "condition", {}, [])
    return Condition(layer, direction, threshold, source)


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def setup(request: pytest.FixtureRequest, build_family: Callable[[str], families.Family]) -> Setup:
    family = build_family(request.param)
    pictures = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    alone = [family.inputs(text, [picture]) for text, picture in zip(TEXTS, pictures, strict=True)]
    both = family.inputs(TEXTS, [[picture] for picture in pictures])
    shape, generator = Anatomy.of(family.model).shape, torch.Generator().manual_seed(0)
    source = Provenance("tiny", None, shape, "by hand", {}, [])
    heads = torch.rand(shape.layers, shape.heads, generator=generator) * 2
    steering = Steering(heads, torch.rand(shape.layers, shape.neurons, generator=generator) * 2, source)
    return Setup(family, steering, alone, both, between(family, alone, 2))


def late(steering: Steering) -> Steering:
    """The same from layer 2 on, so that the condition is read in the same pass."""
    heads, neurons = steering.head_scales.clone(), steering.neuron_scales.clone()
    heads[:2] = neurons[:2] = 1
    return replace(steering, head_scales=heads, neuron_scales=neurons)


@torch.no_grad()
def answers(setup: Setup, inputs: dict[str, Tensor], **settings: Any) -> list[list[int]]:
    found = setup.family.model.generate(**inputs, **(SHORT | settings))
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def expected(
    setup: Setup, steering: Steering, acts: tuple[bool, bool], scope: str = "all"
) -> list[list[int]]:
    """The answers to each question alone, steered or not."""
    found = []
    for inputs, on in zip(setup.alone, acts, strict=True):
        if on:
            with steer(setup.family.model, steering, scope=scope):
                found += answers(setup, inputs)
        else:
            found += answers(setup, inputs)
    return found


@pytest.mark.parametrize("early", [True, False])
def test_a_direction_decides_for_every_row_of_a_batch_and_stays_decided(setup: Setup, early: bool) -> None:
    steering = setup.steering if early else late(setup.steering)
    opposite = replace(setup.condition, negated=True)
    plain_answers = expected(setup, steering, (False, False))
    for condition, acts in ((setup.condition, (False, True)), (opposite, (True, False))):
        wanted = expected(setup, steering, acts)
        assert wanted != plain_answers
        with steer(setup.family.model, steering, condition=condition) as attached:
            assert answers(setup, setup.both) == wanted
            assert attached.decided == [(1, 2)]
            assert [answers(setup, inputs)[0] for inputs in setup.alone] == wanted
            assert attached.decided == [(2, 4)]
    wanted = expected(setup, steering, (False, True), "last+generated")
    with steer(setup.family.model, steering, scope="last+generated", condition=setup.condition):
        assert answers(setup, setup.both) == wanted
    assert answers(setup, setup.both) == plain_answers
    assert not any(module._forward_pre_hooks for module in setup.family.model.modules())


def test_a_steering_of_generated_tokens_needs_no_pass_to_decide(setup: Setup) -> None:
    """It leaves the prompt as it is, also in layers before the one that is read.

    An answer that follows the prompt in the same pass is steered in those layers already.
    """
    model, calls = setup.family.model, [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = plain.layers(model)[0].register_forward_pre_hook(count)
    wanted = expected(setup, setup.steering, (False, True), "generated")
    assert wanted != expected(setup, setup.steering, (False, False))
    passes = []
    for scope in ("generated", "last+generated"):
        with steer(model, setup.steering, scope=scope, condition=setup.condition):
            calls[0] = 0
            found = answers(setup, setup.alone[1])
            passes.append(calls[0])
            assert scope != "generated" or found == [wanted[1]]
    assert passes == [SHORT["max_new_tokens"], SHORT["max_new_tokens"] + 1]
    handle.remove()
    longer = plain.with_answer(model, setup.alone[1], wanted[1][:2])
    with torch.no_grad(), answer_follows(model, 2):
        with steer(model, setup.steering, scope="generated"):
            logits = model(**longer).logits
        with steer(model, setup.steering, scope="generated", condition=setup.condition):
            assert torch.equal(model(**longer).logits, logits)


def test_beams_and_static_caches_follow_their_prompt(setup: Setup) -> None:
    wanted = expected(setup, setup.steering, (False, True))
    with steer(setup.family.model, setup.steering, condition=setup.condition):
        assert answers(setup, setup.both, cache_implementation="static") == wanted
    beams = {"num_beams": 2}
    first = answers(setup, setup.alone[0], **beams)
    with steer(setup.family.model, setup.steering):
        second = answers(setup, setup.alone[1], **beams)
    with steer(setup.family.model, setup.steering, condition=setup.condition):
        assert answers(setup, setup.both, **beams) == first + second


def test_a_regular_expression_is_searched_in_the_prompt(setup: Setup) -> None:
    tokenizer = setup.family.tokenizer
    for condition, acts in (
        (TextCondition("(?i)HOW MANY", tokenizer), (False, True)),
        (TextCondition("How many", tokenizer, negated=True), (True, False)),
        (TextCondition(r"circle\?", tokenizer), (True, False)),
        (TextCondition("triangle", tokenizer), (False, False)),
    ):
        wanted = expected(setup, setup.steering, acts)
        with steer(setup.family.model, setup.steering, condition=condition) as attached:
            assert answers(setup, setup.both) == wanted
        assert attached.decided == [(sum(acts), 2)]
    both = [TextCondition("many", tokenizer), replace(setup.condition, negated=True)]
    with steer(setup.family.model, setup.steering, condition=both) as attached:
        answers(setup, setup.both)
    assert attached.decided == [(0, 2)]


def test_several_steerings_each_have_a_condition_and_a_scope(setup: Setup) -> None:
    """Of the first question one steering acts, of the second two."""
    model = setup.family.model
    other = replace(setup.steering, head_scales=setup.steering.head_scales.flip(0))
    parts = [
        Attached(setup.steering, 0.5, Scope(), (setup.condition,)),
        Attached(other, 1.0, Scope.parse("last"), ()),
    ]
    wanted = []
    for inputs, both in zip(setup.alone, (False, True), strict=True):
        first = attach_steering(model, setup.steering, strength=0.5) if both else None
        with steer(model, other, scope="last"):
            wanted += answers(setup, inputs)
        if first is not None:
            first.detach()
    attached = attach_parts(Anatomy.of(model), parts)
    assert answers(setup, setup.both) == wanted
    assert attached.decided == [(1, 2)]
    attached.detach()
    assert answers(setup, setup.both) == expected(setup, setup.steering, (False, False))


def test_what_a_condition_cannot_be_is_refused_in_one_line(setup: Setup, tmp_path: Path) -> None:
    model, steering, condition = setup.family.model, setup.steering, setup.condition
    condition.save(tmp_path / "c")
    loaded = Condition.load(tmp_path / "c")
    assert (loaded.layer, loaded.threshold, loaded.digest) == (2, condition.threshold, condition.digest)
    with pytest.raises(HonesError, match=r"conditions .*c and !.*c contradict"):
        parse_conditions(f"{tmp_path}/c+!{tmp_path}/c")
    assert len(parse_conditions(f"{tmp_path}/c+{tmp_path}/c")) == 1
    assert parse_conditions("!re:a+b")[0].negated
    for text, says in (
        ("re:(", "not a regular expression"),
        ("", "condition= is empty"),
        ("+", "a part has no folder"),
        (f"{tmp_path}/none", "condition.json does not exist"),
    ):
        with pytest.raises(HonesError, match=says):
            parse_conditions(text)
    with pytest.raises(
        HonesError, match=r"attach=fold acts on every prompt, so condition=.* needs attach=hook"
    ):
        attach_steering(model, steering, "fold", condition=condition)
    refused = pytest.raises(HonesError, match="needs the key-value cache")
    with refused, steer(model, steering, condition=condition):
        answers(setup, setup.both, use_cache=False)
    with (
        pytest.raises(HonesError, match="needs a tokenizer"),
        steer(model, steering, condition=TextCondition("a")),
    ):
        answers(setup, setup.both)
    source = replace(condition.provenance, shape=replace(condition.provenance.shape, layers=9))
    with pytest.raises(MisfitError, match=r"the condition for tiny does not fit .*layers: 9 here"):
        attach_steering(model, steering, condition=replace(condition, provenance=source))
    with pytest.raises(HonesError, match="reads layer 4; its model has 4 layers"):
        replace(condition, layer=4)
    warned = pytest.warns(UserWarning, match="held for none of 2 prompts")
    with warned, steer(model, steering, condition=replace(condition, threshold=1e9)):
        answers(setup, setup.both)


def test_the_threshold_is_in_the_middle_of_the_widest_gap() -> None:
    wanted, others = torch.tensor([3.0, 4.0, 9.0]), torch.tensor([0.0, 1.0, 3.5])
    cut = best_cut(wanted.double(), others.double())
    assert cut.balanced == pytest.approx(5 / 6)
    assert cut.threshold == 2.0
    assert cut.margin == pytest.approx(2 / 9)
    assert best_cut(others.double(), others.double()).balanced == 0.5


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.mark.slow
def test_a_condition_is_learned_and_tested_on_other_images(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tasks ask two different questions; precision and recall are those of a plain loop."""
    out = tmp_path / "condition"
    assert main(own.command("condition", "--against", "own_b", "--out", out)) == 0
    assert "held-out examples of own_a" in capsys.readouterr().out
    condition = Condition.load(out)
    lmm = own_answers.load_lmm(own_answers.MODEL, own.model_args)
    model = own_answers.inner_model(lmm)
    streams: dict[bool, list[list[Tensor]]] = {True: [], False: []}
    for task in ("own_a", "own_b"):
        examples = own_answers.TaskExamples(lmm, task, model_name=own_answers.MODEL, include_path=own.tasks)
        for held in streams:
            streams[held].append(
                [
                    last_stream(model, e.inputs, condition.layer)
                    for e in (examples[i] for i in range(12))
                    if is_held_out(e) is held
                ]
            )
    means = [torch.stack(part).mean(0) for part in streams[False]]
    direction = (means[0] - means[1]) / (means[0] - means[1]).norm()
    torch.testing.assert_close(condition.direction, direction, atol=1e-4, rtol=1e-3)
    held = [[bool(x @ direction > condition.threshold) for x in part] for part in streams[True]]
    report = condition.report
    assert report["held_out"] == [len(part) for part in streams[True]]
    assert report["learned_from"] == [len(part) for part in streams[False]]
    assert report["recall"] == pytest.approx(sum(held[0]) / len(held[0]))
    assert report["precision"] == pytest.approx(sum(held[0]) / (sum(held[0]) + sum(held[1])))
    assert [used.task for used in condition.provenance.examples] == ["own_a", "own_b"]
    for flags, says in (
        (["--against", "own_a"], "both own_a"),
        (["--against", "own_b", "--layer", 9], "--layer 9: this model has layers 0 to 3"),
        (["--against", "own_b", "--limit", 1], "of its 1 examples"),
    ):
        assert main(own.command("condition", *flags, "--out", tmp_path / "no")) == 1
        assert says in own_answers.complaint(capsys.readouterr().err)


def test_the_wrapper_counts_where_it_acted(
    llava_checkpoint: Path, tmp_path: Path, build_family: Callable[[str], families.Family]
) -> None:
    family = build_family("llava")
    shape = Anatomy.of(family.model).shape
    steering = Steering.by_hand(family.model, heads={(layer, 0): 0.0 for layer in range(shape.layers)})
    steering.save(tmp_path / "a")
    replace(steering, head_scales=steering.head_scales.flip(1)).save(tmp_path / "b")

    def built(more: str) -> Any:
        text = f"pretrained={llava_checkpoint},dtype=float32,steering={tmp_path / 'a'}{more}"
        return get_model("hones_hf").create_from_arg_string(text, {"batch_size": 1})

    questions = list(family_doors.QUESTIONS[:2])
    first = questions[0].text.split()[1]
    lm = built(f",condition=re:{first}")
    family_doors.ask(lm, questions)
    holds = sum(first in question.text for question in questions)
    (counts,) = lm.record.decided.values()
    assert counts == [[holds, len(questions)]]
    manifest = json.loads(lm.record.write(tmp_path, "hones_hf").read_text())["steering"]
    assert manifest["condition"] == f"re:{first}"
    assert list(manifest["acted"].values()) == [[[holds, len(questions)]]]
    assert lm.fingerprint.endswith(TextCondition(first).digest)

    lm = built(f'+{tmp_path / "b"},strength=[0.5,1],scope=["last","all"],condition=[null,"re:{first}"]')
    settings = lm.record._settings
    assert (settings["scope"], settings["condition"]) == ("last|all", f"none|re:{first}")
    assert lm.record.steering.provenance.settings["how"] == "combined"
    for more, says in (
        (f"+{tmp_path / 'b'},strength=[1,2,3]", "has 3 values, and steering=.* 2 steerings"),
        (f",condition={tmp_path / 'none'}", "condition.json does not exist"),
        (",condition=re:a,attach=fold", "attach=fold acts on every prompt"),
    ):
        with pytest.raises(HonesError, match=says):
            built(more)
    with pytest.raises(HonesError, match="condition=re:a says when a steering acts: give steering= too"):
        get_model("hones_hf").create_from_arg_string(f"pretrained={llava_checkpoint},condition=re:a", {})


def test_the_board_tells_runs_with_other_conditions_apart() -> None:
    named = steering_from_arguments(
        {"steering": "a+b", "strength": "[0.5,1]", "condition": '["runs/c",null]'}
    )
    assert named is not None
    assert (named.strength, named.condition) == (1.0, "runs/c|none")
    ref = SteeringRef("a", "d", 1.0, "hook", condition="runs/c", acted={"gqa": [[12, 20]]})
    assert ref.identity != replace(ref, condition="none").identity
    assert ref.label.endswith(" if c")
    assert ref.acted_on("gqa") == "acted on 12 of 20 prompts"
    assert ref.acted_on("pope") == ""


def test_trackers_are_removed_in_any_order(setup: Setup) -> None:
    model, base = setup.family.model, answers(setup, setup.both)
    first = attach_steering(model, setup.steering, scope="last")
    second = attach_steering(model, setup.steering, condition=setup.condition)
    first.detach()
    second.detach()
    assert "prepare_inputs_for_generation" not in vars(model)
    assert answers(setup, setup.both) == base
