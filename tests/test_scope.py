"""Scopes of a steering, compared with plain hooks whose masks are found token by token here."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import families
import family_doors
import own_answers
import pytest
import text_models
import torch
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import get_model
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import PreTrainedModel

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ExampleSet, Provenance
from hones_eval.core.attach import attach_steering, steer
from hones_eval.core.ranking import Ranking
from hones_eval.core.scope import Scope, ScopeTracker, answer_follows
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import EditError, HonesError
from hones_eval.lmms.answers.tokens import answer_tokens
from hones_eval.lmms.example import Example
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.answers import AnswersUnder
from hones_eval.methods.attribution import Attribution, AttributionSettings

NAMES = ("llava", "qwen2_5_vl", "gemma3", "instructblip")
SCOPES = ("prompt", "image", "text", "last", "generated", "image+last", "text+generated")
TEXTS = ("What color is the circle?", "How many?")


def drawn(color: str) -> Image.Image:
    picture = Image.new("RGB", (64, 48), "white")
    ImageDraw.Draw(picture).ellipse([4, 4, 32, 24], fill=color)
    return picture


class Setup(NamedTuple):
    """A family, a random steering of it, and inputs of one question and of two in a batch."""

    family: families.Family
    steering: Steering
    one: dict[str, Tensor]
    two: dict[str, Tensor]

    @property
    def model(self) -> PreTrainedModel:
        return self.family.model


def steering_of(anatomy: Anatomy) -> Steering:
    shape, generator = anatomy.shape, torch.Generator().manual_seed(0)
    source = Provenance("tiny", None, shape, "by_hand", {}, [ExampleSet("t", "s", 1, 0, "0")])
    heads = torch.rand(shape.layers, shape.heads, generator=generator) * 2
    return Steering(heads, torch.rand(shape.layers, shape.neurons, generator=generator) * 2, source)


@pytest.fixture(scope="module", params=NAMES)
def setup(request: pytest.FixtureRequest, build_family: Callable[[str], families.Family]) -> Setup:
    family = build_family(request.param)
    one = family.inputs(TEXTS[0], [drawn("red")])
    two = family.inputs(TEXTS, [[drawn("red")], [drawn("blue")]])
    return Setup(family, steering_of(Anatomy.of(family.model)), one, two)


def in_scope(scope: str, row: Sequence[int], mask: Sequence[int], image: int, answer: int) -> list[bool]:
    """Whether each token of one row is in a scope; the last ``answer`` tokens were generated."""
    prompt = len(row) - answer
    found = []
    for place, token in enumerate(row):
        names = set()
        if place >= prompt:
            names.add("generated")
        elif mask[place]:
            names |= {"prompt", "image" if token == image else "text"}
            if place == prompt - 1:
                names.add("last")
        found.append(bool(names & set(scope.split("+"))))
    return found


def masks_of(setup: Setup, inputs: dict[str, Tensor], scope: str, answer: int = 0) -> Tensor:
    image = setup.model.config.image_token_id
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    return torch.tensor([in_scope(scope, ids, mask, image, answer) for ids, mask in rows])


@contextmanager
def plainly_steered(model: PreTrainedModel, steering: Steering, mask: Tensor) -> Iterator[None]:
    """Scale the tokens [rows, tokens] of a mask, by hooks of this test's own."""
    language = model.get_decoder()
    while hasattr(language, "get_decoder") and language.get_decoder() is not language:
        language = language.get_decoder()
    handles = []
    for layer, heads, neurons in zip(
        language.layers, steering.head_scales, steering.neuron_scales, strict=True
    ):
        width = layer.self_attn.o_proj.in_features // len(heads)
        pairs = (layer.self_attn.o_proj, heads.repeat_interleave(width)), (layer.mlp.down_proj, neurons)
        for module, scales in pairs:

            def hook(_: nn.Module, args: tuple[Tensor], scales: Tensor = scales) -> tuple[Tensor]:
                x = args[0].clone()
                for row, place in mask.nonzero().tolist():
                    x[row, place] = x[row, place] * scales
                return (x,)

            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "generated"])
def test_a_prompt_is_scaled_token_by_token(setup: Setup, scope: str) -> None:
    for inputs in (setup.one, setup.two):
        mask = masks_of(setup, inputs, scope)
        real = inputs["attention_mask"].bool()
        with plainly_steered(setup.model, setup.steering, mask):
            expected = logits(setup.model, inputs)
        with steer(setup.model, setup.steering, scope=scope):
            found = logits(setup.model, inputs)
        assert_close(found[:, -1], expected[:, -1])
        if setup.family.name != "instructblip":
            assert_close(found[real], expected[real])
        if scope == "prompt":
            continue  # without generated tokens it is `all`
        with steer(setup.model, setup.steering):
            assert not torch.allclose(found[real], logits(setup.model, inputs)[real], atol=1e-3)


def test_generated_alone_leaves_the_prompt_as_it_is(setup: Setup) -> None:
    base = logits(setup.model, setup.two)
    with steer(setup.model, setup.steering, scope="generated"):
        assert torch.equal(logits(setup.model, setup.two), base)
    assert torch.equal(logits(setup.model, setup.two), base)
    assert "prepare_inputs_for_generation" not in vars(setup.model)


def appended(inputs: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """The inputs that change when text tokens [1, tokens] follow the prompt."""
    parts = {"input_ids": new, "attention_mask": torch.ones_like(new)}
    parts |= {"token_type_ids": torch.zeros_like(new), "mm_token_type_ids": torch.zeros_like(new)}
    return {name: torch.cat([inputs[name], part], 1) for name, part in parts.items() if name in inputs}


@torch.no_grad()
def greedy_by_full_passes(setup: Setup, scope: str, steps: int) -> list[int]:
    """Greedy tokens of the first question, each by a pass over all tokens, whose masks are found anew."""
    inputs, tokens = dict(setup.one), []
    for step in range(steps):
        with plainly_steered(setup.model, setup.steering, masks_of(setup, inputs, scope, step)):
            last = logits(setup.model, inputs)[0, -1]
        tokens.append(int(last.argmax()))
        new = torch.tensor([[tokens[-1]]])
        longer = {"input_ids": new, "attention_mask": torch.ones_like(new)}
        longer |= {"token_type_ids": torch.zeros_like(new), "mm_token_type_ids": torch.zeros_like(new)}
        inputs |= {
            name: torch.cat([inputs[name], part], 1) for name, part in longer.items() if name in inputs
        }
    return tokens


@pytest.mark.parametrize("scope", ["prompt", "image+last", "generated", "text+generated"])
def test_generation_scales_every_step_as_passes_over_all_tokens_do(setup: Setup, scope: str) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    settings["suppress_tokens"] = None
    expected = greedy_by_full_passes(setup, scope, 5)
    end = setup.family.tokenizer.eos_token_id
    if end in expected:
        expected = expected[: expected.index(end)]
    with steer(setup.model, setup.steering, scope=scope):
        output = setup.model.generate(**setup.one, max_new_tokens=5, do_sample=False)
        static = None
        if setup.family.name != "instructblip":
            static = setup.model.generate(
                **setup.one, max_new_tokens=5, do_sample=False, cache_implementation="static"
            )
    found = output[0, setup.one["input_ids"].shape[1] :].tolist()
    assert found[: len(expected)] == expected
    if static is not None:
        assert static.tolist() == output.tolist()


@pytest.mark.parametrize("scope", ["last+generated", "image"])
def test_beams_and_padded_batches_have_the_scores_of_passes_over_all_tokens(setup: Setup, scope: str) -> None:
    if setup.family.name == "instructblip":
        pytest.skip("its padding stands between image and text, so that a plain pass needs position ids")
    with steer(setup.model, setup.steering, scope=scope):
        output = setup.model.generate(
            **setup.two, max_new_tokens=3, num_beams=2, return_dict_in_generate=True, output_scores=True
        )
    length = setup.two["input_ids"].shape[1]
    new = output.sequences[:1, length:]
    end = setup.family.tokenizer.eos_token_id
    count = next((i + 1 for i, token in enumerate(new[0].tolist()) if token == end), new.shape[1])
    rows = {name: value[:1] if len(value) == 2 else value for name, value in setup.two.items()}
    if setup.family.name == "qwen2_5_vl":  # patches of both images are in one list
        rows["pixel_values"] = setup.two["pixel_values"][: len(setup.two["pixel_values"]) // 2]
    new = new[:, :count]
    rows |= appended(rows, new)
    with plainly_steered(setup.model, setup.steering, masks_of(setup, rows, scope, count)):
        read = logits(setup.model, rows)[0, -count - 1 : -1].log_softmax(-1)
    total = sum(float(read[i, token]) for i, token in enumerate(new[0].tolist()))
    assert float(output.sequences_scores[0]) == pytest.approx(total / count, rel=1e-3)


def test_positions_and_texts(setup: Setup) -> None:
    ids = setup.two["input_ids"]
    mask = setup.two["attention_mask"].bool()
    places = torch.zeros_like(mask)
    for row in range(2):
        real = mask[row].nonzero().flatten()
        places[row, real[-2]] = True
    with plainly_steered(setup.model, setup.steering, places):
        expected = logits(setup.model, setup.two)
    with steer(setup.model, setup.steering, scope=Scope.at(-2)):
        assert_close(logits(setup.model, setup.two)[:, -1], expected[:, -1])
    token = int(ids[0, -1])
    inside = (ids == token) & mask
    with plainly_steered(setup.model, setup.steering, inside):
        expected = logits(setup.model, setup.two)
    with steer(setup.model, setup.steering, scope=Scope((), (), ((token,),))):
        assert_close(logits(setup.model, setup.two)[:, -1], expected[:, -1])
    assert Scope.of_text("circle", setup.family.tokenizer).token_ids[0]
    with (
        pytest.raises(HonesError, match="there is no token 500 in a prompt of"),
        steer(setup.model, setup.steering, scope=Scope.at(500)),
    ):
        logits(setup.model, setup.two)


def test_all_is_what_it_was_and_other_scopes_leave_nothing_behind(setup: Setup) -> None:
    for scope in ("all", "prompt+generated", "image+text+generated"):
        attached = attach_steering(setup.model, setup.steering, scope=scope)
        assert "prepare_inputs_for_generation" not in vars(setup.model)
        hooks = [hook for module in setup.model.modules() for hook in module._forward_pre_hooks.values()]
        assert not [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), ScopeTracker)]
        attached.detach()
    attach_steering(setup.model, setup.steering, scope="image").detach()
    assert not setup.model._forward_pre_hooks
    assert not any(module._forward_pre_hooks for module in setup.model.modules())


def test_what_a_scope_cannot_have_is_refused_in_one_line(setup: Setup) -> None:
    model, steering = setup.model, setup.steering
    with pytest.raises(HonesError, match="scope='imge' is unknown: did you mean image"):
        attach_steering(model, steering, scope="imge")
    with pytest.raises(HonesError, match="attach=fold scales every token, so scope=last needs attach=hook"):
        attach_steering(model, steering, "fold", scope="last")
    if setup.family.name != "instructblip":
        bare = {name: setup.one[name] for name in ("input_ids", "attention_mask")}
        image = bare["input_ids"] == model.config.image_token_id
        bare = {name: value[~image][None] for name, value in bare.items()}
        refused = pytest.raises(HonesError, match="scope=image: row 0 of 1 has no image")
        with refused, steer(model, steering, scope="image"):
            logits(model, bare)
        refused = pytest.raises(HonesError, match="scope=last needs the key-value cache: use_cache=True")
        with refused, steer(model, steering, scope="last"):
            model.generate(**setup.one, max_new_tokens=2, use_cache=False)
    anatomy = Anatomy.of(model)
    with (
        pytest.raises(EditError, match="a layer was called outside of the model's forward pass"),
        steer(model, steering, scope="last"),
    ):
        anatomy.neurons_in[0].module(torch.zeros(1, 3, anatomy.neurons_in[0].width))


def test_answers_that_are_scored_count_as_generated(setup: Setup) -> None:
    for scope in ("last", "text+generated"):
        with plainly_steered(setup.model, setup.steering, masks_of(setup, setup.one, scope, 2)):
            expected = logits(setup.model, setup.one)
        with steer(setup.model, setup.steering, scope=scope), answer_follows(setup.model, 2):
            assert_close(logits(setup.model, setup.one)[:, -1], expected[:, -1])


def test_experts_are_scaled_at_the_tokens_of_the_scope(tmp_path: Path) -> None:
    checkpoint = text_models.save_checkpoint("qwen3_moe", tmp_path / "moe")
    model, tokenizer = text_models.load(checkpoint)
    anatomy = Anatomy.of(model)
    steering = steering_of(anatomy)
    ids = text_models.prompt_ids(tokenizer, TEXTS[0])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kept: list[Tensor] = []
    site = anatomy.neurons_in[0]
    handle = site.module.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    only = Steering(torch.ones_like(steering.head_scales), steering.neuron_scales, steering.provenance)
    logits(model, inputs)
    handle.remove()
    with steer(model, only, scope="last"):
        handle = site.module.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
        found = logits(model, inputs)
        handle.remove()
    base, scaled = kept
    torch.testing.assert_close(scaled[:, :-1], base[:, :-1])
    torch.testing.assert_close(scaled[:, -1], base[:, -1] * only.neuron_scales[0])
    assert_close(found[:, :-1], logits(model, inputs)[:, :-1])
    with (
        pytest.raises(HonesError, match="scope=image: Qwen3MoeForCausalLM reads no image tokens"),
        steer(model, steering, scope="image"),
    ):
        logits(model, inputs)


def test_the_wrapper_takes_a_scope_and_records_it(llava_checkpoint: Path, tmp_path: Path) -> None:
    family = families.build("llava")
    steering = steering_of(Anatomy.of(family.model))
    steering.save(tmp_path)

    def built(more: str) -> Any:
        text = f"pretrained={llava_checkpoint},dtype=float32,steering={tmp_path}{more}"
        return get_model("hones_hf").create_from_arg_string(text, {"batch_size": 1})

    lm = built(",scope=image+last")
    assert lm.record._settings["scope"] == "image+last"
    question = family_doors.QUESTIONS[0]
    found = family_doors.ask(lm, [question])
    model = families.build("llava").model
    inputs = family.inputs(question.text, list(question.pictures))
    with steer(model, steering, scope="image+last"):
        new = model.generate(**inputs, max_new_tokens=5, min_new_tokens=2, do_sample=False)
    expected = family.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == [expected.strip()]
    lm.task_dict["scored"] = {"test": [None]}
    request = Instance(
        "loglikelihood",
        (question.text, " red", lambda doc: [question.pictures[0]], 0, "scored", "test"),
        0,
        {"task": "scored", "doc_id": 0, "repeats": 1},
    )
    loss = unwrap_generation_output(lm.loglikelihood([request])[0])[0][0]
    ids = answer_tokens(family.tokenizer, inputs["input_ids"][0].tolist(), "red")
    longer = inputs | appended(inputs, torch.tensor([ids]))
    setup = Setup(family, steering, inputs, inputs)
    with plainly_steered(model, steering, masks_of(setup, longer, "image+last", len(ids))):
        read = logits(model, longer)[0, -len(ids) - 1 : -1].log_softmax(-1)
    assert loss == pytest.approx(-sum(float(read[i, t]) for i, t in enumerate(ids)) / len(ids), rel=1e-3)
    with pytest.raises(HonesError, match="scope=last says where a steering acts: give steering= too"):
        get_model("hones_hf").create_from_arg_string(f"pretrained={llava_checkpoint},scope=last", {})


def test_the_wrapper_takes_several_steerings(llava_checkpoint: Path, tmp_path: Path) -> None:
    family = families.build("llava")
    first = steering_of(Anatomy.of(family.model))
    second = Steering(first.head_scales.flip(0), first.neuron_scales.flip(0), first.provenance)
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    text = (
        f"pretrained={llava_checkpoint},dtype=float32,steering={tmp_path / 'first'}:0.5+{tmp_path / 'second'}"
    )
    lm = get_model("hones_hf").create_from_arg_string(text, {"batch_size": 1})
    question = family_doors.QUESTIONS[0]
    found = family_doors.ask(lm, [question])
    inputs = family.inputs(question.text, list(question.pictures))
    with steer(family.model, first, strength=0.5), steer(family.model, second):
        new = family.model.generate(**inputs, max_new_tokens=5, min_new_tokens=2, do_sample=False)
    expected = family.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == [expected.strip()]
    assert lm.record.steering.digest == Steering.combine([(first, 0.5), (second, 1)]).digest


@pytest.mark.slow
def test_verify_masks_at_the_tokens_of_the_scope(
    llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    own = own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")
    lmm = load_lmm(own_answers.MODEL, own.model_args)
    examples = TaskExamples(lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, limit=3)
    model = inner_model(lmm)
    first = steering_of(Anatomy.of(model))
    second = Steering(first.head_scales.flip(1), first.neuron_scales.flip(1), first.provenance)
    steerings = {"first": first, "second": second}
    for scope in ("image+last", "generated"):
        under = AnswersUnder(Replayer(Anatomy.of(model)), examples, steerings, scope)
        for i in range(3):
            _, answers = under.measure(examples[i]).record
            for name, steering in steerings.items():
                with steer(model, steering, scope=scope):
                    output = model.generate(**examples[i].inputs, **examples[i].settings)
                new = output[0, examples[i].inputs["input_ids"].shape[1] :].tolist()
                assert answers[name].result == examples.score(i, examples.decode(i, new))
                with steer(model, steering, scope=scope):
                    step = logits(model, examples[i].inputs)[0, -1].softmax(-1)
                assert answers[name].probability == pytest.approx(
                    float(step[examples[i].target_ids[0]]), rel=1e-3
                )
    masked = ["--ranking", own.rankings / "hones", "--offset", 4, "--trials", 2]
    for scope in ("all", "image"):
        out = tmp_path / scope
        assert main(own.command("verify", *masked, "--scope", scope, "--out", out)) == 0
        assert json.loads((out / "verify.json").read_text())["scope"] == scope
    assert main(own.command("verify", *masked, "--scope", "imge", "--out", tmp_path / "no")) == 1


@contextmanager
def head_replaced(model: PreTrainedModel, layer: int, head: int, mask: Tensor) -> Iterator[None]:
    """Replace a head by the mean of the others at the tokens [tokens] of a prompt, and nowhere after it."""
    module = model.get_decoder().layers[layer].self_attn.o_proj
    count = model.config.get_text_config().num_attention_heads

    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        heads = args[0].clone().unflatten(-1, (count, -1))
        others = [i for i in range(count) if i != head]
        if heads.shape[1] > 1:
            for place in mask.nonzero().flatten().tolist():
                heads[:, place, head] = heads[:, place][:, others].mean(1)
        return (heads.flatten(-2),)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["text", "image+last"])
def test_rank_replaces_heads_at_the_tokens_of_the_scope(
    own: own_answers.Prepared, tmp_path: Path, scope: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--method", "hones", "--limit", 2, "--heads", 4, "--neurons", 0.02, "--scope", scope]
    assert main(own.command("rank", *given, "--out", tmp_path)) == 0
    assert f"edits act on scope={scope} only" in capsys.readouterr().out
    ranking = Ranking.load(tmp_path)
    assert ranking.provenance.settings["scope"] == scope
    assert ranking.head_log_probability is not None
    assert ranking.head_scores is not None
    lmm = load_lmm(own_answers.MODEL, own.model_args)
    examples = TaskExamples(lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, limit=2)
    model = inner_model(lmm)
    for layer, head in ((0, 1), (1, 2)):
        drops, scores = [], []
        for i in range(2):
            example = examples[i]
            rows = example.inputs["input_ids"][0].tolist()
            ones = [1] * len(rows)
            prompt = torch.tensor(in_scope(scope, rows, ones, model.config.image_token_id, 0))
            longer = example.inputs | appended(example.inputs, torch.tensor([example.target_ids[:-1]]))
            values, results = [], []
            for mask in (torch.zeros_like(prompt), prompt):
                with head_replaced(model, layer, head, mask):
                    read = logits(model, longer)[0, -len(example.target_ids) :].double().log_softmax(-1)
                    output = model.generate(**example.inputs, **example.settings)
                values.append(sum(float(read[t, token]) for t, token in enumerate(example.target_ids)))
                text = examples.decode(i, output[0, len(rows) :].tolist())
                results.append(float(examples.score(i, text)["exact_match"]))
            drops.append(values[0] - values[1])
            scores.append(results[0] - results[1])
        assert float(ranking.head_log_probability[layer, head]) == pytest.approx(sum(drops) / 2, abs=2e-4)
        assert float(ranking.head_scores[layer, head]) == pytest.approx(sum(scores) / 2, abs=1e-6)


@pytest.mark.slow
def test_other_methods_take_the_scope_or_refuse_it(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--limit", 2, "--heads", 4, "--neurons", 0.02]
    for method in ("vseam", "atp"):
        scores = []
        for scope in ("all", "image"):
            out = tmp_path / method / scope
            assert main(own.command("rank", "--method", method, *sizes, "--scope", scope, "--out", out)) == 0
            scores.append(Ranking.load(out).head_scores)
        assert scores[0] is not None
        assert scores[1] is not None
        assert bool(scores[1].any())
        assert not torch.allclose(scores[0], scores[1], rtol=1e-2)
    capsys.readouterr()
    for method, scope, message in (
        ("hones", "image", "--scope image leaves out the last token of the prompt"),
        ("dvp", "last", "--scope only applies to --method hones, vseam, atp, not to dvp"),
        ("hones", "imge", "scope='imge' is unknown: did you mean image?"),
    ):
        given = ["--method", method, *sizes, "--scope", scope, "--out", tmp_path / "no"]
        assert main(own.command("rank", *given)) == 1
        assert message in capsys.readouterr().err


def test_attribution_in_a_scope_is_the_slope_at_its_tokens(setup: Setup) -> None:
    """Compared with the log-probability when a neuron is scaled at the tokens of the scope alone."""
    if setup.family.name == "instructblip":
        pytest.skip("its images enter as embeddings, and an appended answer needs position ids")
    model, target = setup.model, [11, 12]
    anatomy = Anatomy.of(model)

    def append(inputs: Any, settings: Any, ids: list[int]) -> dict[str, Tensor]:
        return {**inputs, **appended(inputs, torch.tensor([ids]))}

    example = Example(0, "t", "s", 0, setup.one, {}, "a", ["a"], target, ["i"], "x")
    settings = AttributionSettings("first_order", "log_probability", "example")
    tracker = ScopeTracker(anatomy, Scope.parse("text"))
    sums = Attribution(anatomy, append, None, settings, ("heads", "neurons"), tracker).measure(example).sums
    inputs = append(setup.one, {}, target[:-1])
    mask = masks_of(setup, inputs, "text", 1)
    layer = anatomy.shape.layers - 2
    chosen = sums["neurons"][layer].topk(2).indices.tolist()

    def value(number: int, factor: float) -> float:
        neurons = torch.ones(anatomy.shape.layers, anatomy.shape.neurons)
        neurons[layer, number] = factor
        heads = torch.ones(anatomy.shape.layers, anatomy.shape.heads)
        with plainly_steered(model, Steering(heads, neurons, setup.steering.provenance), mask):
            rows = logits(model, inputs)[0, -2:].double().log_softmax(-1)
        return sum(float(rows[i, token]) for i, token in enumerate(target))

    for number in chosen:
        slope = (value(number, 1.05) - value(number, 0.95)) / 0.1
        assert float(sums["neurons_signed"][layer, number]) == pytest.approx(slope, rel=0.05, abs=2e-5)
    assert not vars(model).get("prepare_inputs_for_generation")
