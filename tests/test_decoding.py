"""Answers under every edit equal plain `generate` under a hook, in every family and under every setting."""

from collections.abc import Callable
from typing import Any

import families
import plain
import pytest
import torch
from families import Family
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head, Neuron
from hones_eval.engine import continuation, decoding
from hones_eval.engine.caches import ROOM, KeysValues
from hones_eval.engine.decoding import Decoder, cut_at_end, repeat_example
from hones_eval.engine.encoders import encoders
from hones_eval.engine.passes import FullPasses, Rows, SiteEdit, replaced_by_mean
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError

RED = Image.new("RGB", (64, 48), "white")
ImageDraw.Draw(RED).ellipse([4, 4, 32, 24], fill="red")
QUESTION = "What color is it?"


def inputs_of(family: Family, text: str = QUESTION, pictures: int = 1) -> dict[str, Tensor]:
    made = family.inputs(text, [RED, RED.rotate(180)][:pictures])
    return {name: value for name, value in made.items() if name != "labels"}


def means_of(model: PreTrainedModel) -> list[SiteEdit]:
    return replaced_by_mean([Head(edit.layer, edit.site) for edit in plain.all_heads(model)])


def agree(family: Family, inputs: dict[str, Tensor], settings: dict[str, Any]) -> tuple[list[int], int]:
    """Every answer is the plain one. Returns the unedited answer, and how many of the others differ."""
    item = plain.Item(inputs, settings, [])
    decoder = Decoder(Replayer(Anatomy.of(family.model)))
    example = decoder.greedy(inputs, settings)
    assert example.tokens == plain.answer(family.model, item)
    assert example.passes is not None, "the answer could not be verified by one pass"
    edits = means_of(family.model)
    found = dict(example.answers(edits))
    assert decoder.not_continued is None
    assert found.keys() == set(edits)
    for edit, tokens in found.items():
        assert tokens == plain.answer(family.model, item, plain.Edit(*edit.site)), edit
    return example.tokens, sum(tokens != example.tokens for tokens in found.values())


def test_short_and_long_answers(family: Family) -> None:
    inputs = inputs_of(family, pictures=1 + family.several_images)
    short, few = agree(family, inputs, {"max_new_tokens": 1})
    assert len(short) == 1
    long, many = agree(family, inputs, {"max_new_tokens": 8})
    assert 1 < len(long) <= 8
    assert few <= many
    assert many > 0


# What a checkpoint or a task may ask `generate` for.
SETTINGS: dict[str, dict[str, Any]] = {
    "penalty": {"max_new_tokens": 8, "repetition_penalty": 1.7},
    "no repeats": {"max_new_tokens": 8, "no_repeat_ngram_size": 1},
    "at least": {"max_new_tokens": 8, "min_new_tokens": 6},
    "suppressed": {"max_new_tokens": 6, "suppress_tokens": [151, 219, 143, 423, 142, 282]},
    "no cache": {"max_new_tokens": 5, "use_cache": False},
    "greedy in words": {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": 1,
        "temperature": 0,
        "top_p": None,
    },
    "total length": {"max_length": 30},
}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "instructblip"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_generation(
    build_family: Callable[[str], Family], name: str, settings: dict[str, Any]
) -> None:
    family = build_family(name)
    answer, _ = agree(family, inputs_of(family), settings)
    if "no_repeat_ngram_size" in settings:
        assert len(set(answer)) == len(answer)
    if "min_new_tokens" in settings:
        assert len(answer) >= 6
    if "suppress_tokens" in settings:
        assert not set(answer) & set(settings["suppress_tokens"])


@pytest.mark.parametrize("name", ["llava", "gemma3", "instructblip"])
def test_several_end_tokens(build_family: Callable[[str], Family], name: str) -> None:
    """Answers end at whichever comes first; what a batch pads behind it is cut off."""
    family = build_family(name)
    inputs = inputs_of(family)
    item = plain.Item(inputs, {"max_new_tokens": 8, "min_new_tokens": 8}, [])
    every = [plain.answer(family.model, item, plain.Edit(*edit.site)) for edit in means_of(family.model)]
    ends = sorted({every[0][3], every[5][2], every[9][4], int(family.tokenizer.eos_token_id)})
    edits = means_of(family.model)
    settings = {"max_new_tokens": 8, "eos_token_id": ends}
    agree(family, inputs, settings)
    example = Decoder(Replayer(Anatomy.of(family.model))).greedy(inputs, settings)
    lengths = {len(tokens) for _, tokens in example.answers(edits)}
    assert len(lengths) > 1
    for _, tokens in example.answers(edits):
        assert not set(tokens[:-1]) & set(ends)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_stop_strings(build_family: Callable[[str], Family], name: str) -> None:
    family = build_family(name)
    inputs = inputs_of(family)
    edits = means_of(family.model)
    whole = plain.answer(family.model, plain.Item(inputs, {"max_new_tokens": 8, "min_new_tokens": 8}, []))
    stop = family.tokenizer.decode(whole[3:5])[:3]
    settings = {"max_new_tokens": 8, "stop_strings": [stop], "tokenizer": family.tokenizer}
    answer, _ = agree(family, inputs, settings)
    assert len(answer) < 8
    assert stop in family.tokenizer.decode(answer)
    example = Decoder(Replayer(Anatomy.of(family.model))).greedy(inputs, settings)
    assert len({tuple(tokens) for _, tokens in example.answers(edits)}) > 1


def test_answers_that_end_by_themselves_and_answers_that_are_cut(
    build_family: Callable[[str], Family],
) -> None:
    family = build_family("qwen2_5_vl")
    inputs = inputs_of(family)
    whole, _ = agree(family, inputs, {"max_new_tokens": 6, "min_new_tokens": 6})
    ended, _ = agree(family, inputs, {"max_new_tokens": 6, "eos_token_id": whole[3]})
    assert ended == whole[: whole.index(whole[3]) + 1]
    cut, _ = agree(family, inputs, {"max_new_tokens": len(ended) - 1, "eos_token_id": whole[3]})
    assert cut == ended[:-1]


def test_zeroed_heads_and_masked_neurons(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    inputs, settings = inputs_of(family), {"max_new_tokens": 6}
    item = plain.Item(inputs, settings, [])
    edits = [SiteEdit(Head(1, 2), "zero"), SiteEdit(Neuron(1, 2), "mask"), SiteEdit(Head(1, 2))]
    edits += [SiteEdit(Neuron(layer, neuron), "mask") for layer in range(4) for neuron in range(0, 96, 12)]
    example = Decoder(Replayer(Anatomy.of(family.model))).greedy(inputs, settings)
    found = dict(example.answers(edits))
    assert found.keys() == set(edits)
    kinds = {"mean": "mean", "zero": "zero head", "mask": "zero neuron"}
    for edit, tokens in found.items():
        assert tokens == plain.answer(family.model, item, plain.Edit(*edit.site, kinds[edit.how])), edit
    assert sum(tokens != example.tokens for tokens in found.values()) > 1


@pytest.mark.parametrize("rows", [1, 3])
def test_however_many_rows_are_decoded_at_once(build_family: Callable[[str], Family], rows: int) -> None:
    family = build_family("qwen3_vl")
    inputs, settings = inputs_of(family, pictures=2), {"max_new_tokens": 6}
    edits = means_of(family.model)
    anatomy = Anatomy.of(family.model)
    whole = dict(Decoder(Replayer(anatomy)).greedy(inputs, settings).answers(edits))
    assert dict(Decoder(Replayer(anatomy, rows)).greedy(inputs, settings).answers(edits)) == whole


def test_only_answers_that_differ_are_decoded(
    build_family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = build_family("llava")
    example = Decoder(Replayer(Anatomy.of(family.model))).greedy(inputs_of(family), {"max_new_tokens": 3})
    decoded: list[int] = []
    ours = decoding.GreedyExample._continue

    def counted(self: decoding.GreedyExample, model: Any, rows: list[Any]) -> Any:
        decoded.append(len(rows))
        return ours(self, model, rows)

    def from_the_start(*_: object) -> None:
        raise AssertionError("an answer that differs was decoded from the start")

    monkeypatch.setattr(decoding.GreedyExample, "_continue", counted)
    monkeypatch.setattr(decoding.GreedyExample, "_decode_rows", from_the_start)
    found = list(example.answers(means_of(family.model)))
    differing = [tokens != example.tokens for _, tokens in found]
    assert 0 < sum(differing) == sum(decoded) < len(found)
    assert differing == sorted(differing)  # unchanged answers come first


@pytest.mark.parametrize("name", ["llava", "gemma3", "instructblip"])
def test_keys_and_values_that_are_not_the_models_own_are_noticed(
    build_family: Callable[[str], Family], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then answers that differ are decoded from the start, and are right all the same."""
    family, ours = build_family(name), continuation.KeptKeys.of

    def shifted(self: continuation.KeptKeys, number: int, tokens: int, copy: bool) -> list[KeysValues]:
        return [KeysValues(kept.keys, kept.values.roll(1, 1)) for kept in ours(self, number, tokens, copy)]

    monkeypatch.setattr(continuation.KeptKeys, "of", shifted)
    decoder = Decoder(Replayer(Anatomy.of(family.model)))
    inputs, settings = inputs_of(family), {"max_new_tokens": 5, "min_new_tokens": 5}
    found = dict(decoder.greedy(inputs, settings).answers(means_of(family.model)))
    assert decoder.continuing is None
    assert "logits from replayed keys and values differ" in str(decoder.not_continued)
    item = plain.Item(inputs, settings, [])
    for edit, tokens in found.items():
        assert tokens == plain.answer(family.model, item, plain.Edit(*edit.site)), edit


def test_rows_that_wait_are_decoded_before_they_fill_the_memory(
    build_family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = build_family("llava")
    inputs, settings = inputs_of(family), {"max_new_tokens": 6}
    edits, replayer = means_of(family.model), Replayer(Anatomy.of(family.model), rows=4)
    expected = dict(Decoder(replayer).greedy(inputs, settings).answers(edits))
    batches: list[int] = []
    ours = decoding.GreedyExample._continue

    def counted(self: decoding.GreedyExample, model: Any, rows: list[Any]) -> Any:
        batches.append(len(rows))
        return ours(self, model, rows)

    monkeypatch.setattr(decoding.GreedyExample, "_continue", counted)
    monkeypatch.setattr(decoding, "waiting_rows", lambda _: 2)
    assert dict(Decoder(replayer).greedy(inputs, settings).answers(edits)) == expected
    assert len(batches) > 1
    assert max(batches) == 2


def test_answers_longer_than_the_room_that_is_made_at_a_time(build_family: Callable[[str], Family]) -> None:
    family = build_family("gemma3")
    settings = {"max_new_tokens": ROOM + 6, "min_new_tokens": ROOM + 6}
    answer, differing = agree(family, inputs_of(family), settings)
    assert len(answer) == ROOM + 6
    assert differing > 0


def test_padding_on_the_left(build_family: Callable[[str], Family]) -> None:
    """Positions then count from the first real token, as `generate` counts them."""
    family = build_family("llava")
    inputs = inputs_of(family)
    padding = torch.full((1, 3), int(family.tokenizer.pad_token_id))
    inputs["input_ids"] = torch.cat([padding, inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([torch.zeros_like(padding), inputs["attention_mask"]], dim=1)
    item = plain.Item(inputs, {"max_new_tokens": 5}, [])
    example = Decoder(Replayer(Anatomy.of(family.model))).greedy(inputs, item.settings)
    for edit, tokens in example.answers(means_of(family.model)):
        assert tokens == plain.answer(family.model, item, plain.Edit(*edit.site)), edit


def forward_tokens(model: PreTrainedModel, run: Callable[[], object]) -> int:
    """Tokens that pass the FFNs of all layers, counted by hooks."""
    count = 0

    def add(module: torch.nn.Module, args: tuple[Tensor]) -> None:
        nonlocal count
        count += args[0].shape[:-1].numel()

    handles = [layer.mlp.register_forward_pre_hook(add) for layer in plain.layers(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return count


def along(
    example: decoding.GreedyExample, target: list[int], edits: list[SiteEdit]
) -> dict[SiteEdit, Tensor]:
    """Logits along a target, unedited under the key None, and under each edit."""
    reading = example.along(target)
    assert reading is not None
    seen: dict[Any, Tensor] = {None: reading.base_logits}

    def keep(rows: Rows) -> None:
        seen.update(zip(rows.edits, rows.logits, strict=True))

    list(example.answers(edits, reading, keep))
    assert seen.keys() == {None, *edits}
    return seen


def test_logits_along_a_target(family: Family) -> None:
    """The model's own answer, one that leaves it at once or later, and one that goes on after its end."""
    inputs = inputs_of(family)
    decoder = Decoder(Replayer(Anatomy.of(family.model)))
    example = decoder.greedy(inputs, {"max_new_tokens": 4, "min_new_tokens": 4})
    own, edits = example.tokens, means_of(family.model)
    other = [(token + 7) % 100 + 50 for token in own]
    prompt = inputs["input_ids"].shape[1]
    for target in (own, own[:2], other[:1], other, [*own[:2], *other], [*own, *other[:2]]):
        seen = along(example, target, edits)
        longer = plain.with_answer(family.model, inputs, target[:-1])
        for edit, logits in seen.items():
            plainly = None if edit is None else plain.Edit(*edit.site)
            expected = plain.forward(family.model, longer, plainly).logits[prompt - 1 :]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert decoder.branching.inexact is None


@pytest.mark.parametrize("rows", [None, 3])
def test_a_target_that_leaves_the_answer_costs_its_own_tokens_only(
    build_family: Callable[[str], Family], rows: int | None
) -> None:
    """Counted in tokens through FFNs, as the answer's own pass counts them without a target."""
    family = build_family("llava")
    inputs, settings = inputs_of(family), {"max_new_tokens": 3}
    edits = means_of(family.model)
    decoder = Decoder(Replayer(Anatomy.of(family.model), rows))
    example = decoder.greedy(inputs, settings)
    target = [(example.tokens[0] + 3) % 100 + 50, 60, 61, 62]
    assert decoder.greedy(inputs, settings).along(target) is not None  # the proof
    list(example.answers(edits))  # the proof that answers can be continued
    decoder.guesses = False  # guesses, of which the second run knows more, change the number of tokens
    reading = example.along(target)
    alone = forward_tokens(family.model, lambda: list(example.answers(edits)))
    both = forward_tokens(family.model, lambda: list(example.answers(edits, reading, lambda _: None)))
    # A row runs the FFN of its edit's layer and of those above; in the last layer all positions are read.
    depth = len(plain.layers(family.model))
    passes = sum(depth - edit.site.layer for edit in edits)
    assert both - alone == passes * (len(target) - 1)
    assert forward_tokens(family.model, lambda: example.along(target[:1])) == 0


def test_a_branch_that_is_not_exact_is_noticed(
    build_family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the target is replayed from the start; a target that needs no branch is still read."""
    family, ours = build_family("llava"), continuation.KeptKeys.of_rows

    def shifted(self: continuation.KeptKeys, *where: int) -> KeysValues:
        found = ours(self, *where)
        return KeysValues(found.keys, found.values.roll(1, 1))

    monkeypatch.setattr(continuation.KeptKeys, "of_rows", shifted)
    decoder = Decoder(Replayer(Anatomy.of(family.model)))
    example = decoder.greedy(inputs_of(family), {"max_new_tokens": 3, "min_new_tokens": 3})
    other = [(example.tokens[0] + 3) % 100 + 50, 60, 61]
    assert example.along(other) is None
    assert "logits after a replayed prompt differ" in str(decoder.branching.inexact)
    assert example.along(example.tokens) is not None
    assert example.along(other[:1]) is not None


def test_what_one_pass_does_not_explain_is_decoded_in_full() -> None:
    """A model whose cached decoding sees something else than one pass over prompt and answer."""
    family = families.build("llava")
    stack = plain.layers(family.model)

    def shifted(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + 0.5 * (args[0].shape[1] == 1), *args[1:])

    handle = stack[0].register_forward_pre_hook(shifted)
    inputs, settings = inputs_of(family), {"max_new_tokens": 5, "min_new_tokens": 5}
    example = Decoder(Replayer(Anatomy.of(family.model))).greedy(inputs, settings)
    assert example.passes is None
    assert example.along(example.tokens) is None
    item = plain.Item(inputs, settings, [])
    for edit, tokens in example.answers(means_of(family.model)):
        assert tokens == plain.answer(family.model, item, plain.Edit(*edit.site))
    handle.remove()


def test_a_model_that_cannot_be_replayed_is_verified_by_full_passes() -> None:
    family = families.build("llava")
    kind = type(plain.layers(family.model)[1])

    class Layer(kind):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            assert len(hidden_states) == 1, "one row at a time"
            return super().forward(hidden_states, *args, **kwargs)

    replayer = Replayer(Anatomy.of(family.model), 1)
    replayer.inexact = "for this test"
    inputs, settings = inputs_of(family), {"max_new_tokens": 4}
    for layer in plain.layers(family.model):
        layer.__class__ = Layer
    example = Decoder(replayer).greedy(inputs, settings)
    assert isinstance(example.passes, FullPasses)
    item = plain.Item(inputs, settings, [])
    for edit, tokens in example.answers(means_of(family.model)):
        assert tokens == plain.answer(family.model, item, plain.Edit(*edit.site))


def no_generate(*_: object, **__: object) -> None:
    raise AssertionError("the unedited answer was decoded by generate")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_answers_that_are_guessed(
    build_family: Callable[[str], Family], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right guess, wrong ones from some token on, and one that is longer than the answer."""
    family = build_family(name)
    inputs, edits = inputs_of(family), means_of(family.model)
    longest = plain.answer(family.model, plain.Item(inputs, {"max_new_tokens": 6, "min_new_tokens": 6}, []))
    place = next(i for i in range(2, 6) if longest[i] not in longest[:i])
    settings = {"max_new_tokens": 8, "eos_token_id": longest[place]}
    item = plain.Item(inputs, settings, [])
    own = plain.answer(family.model, item)
    expected = {edit: plain.answer(family.model, item, plain.Edit(*edit.site)) for edit in edits}
    decoder = Decoder(Replayer(Anatomy.of(family.model)))
    first = decoder.greedy(inputs, settings, own[:-1])
    assert dict(first.answers(edits)) == expected
    assert decoder.continuing is not None
    monkeypatch.setattr(type(family.model), "_sample", no_generate)
    other = (own[0] + 5) % 100 + 50
    for likely in (own[:-1], [other, *own[1:-1]], [*own[:-2], other], own[:1], [*own[:-1], other, other]):
        for decoder.guesses in (True, False):
            example = decoder.greedy(inputs, settings, likely)
            assert example.tokens == own, likely
    assert dict(example.answers(edits)) == expected
    for room in (1, 2**30):  # where most answers change, the unedited one is decoded with the others
        decoder.settle(inputs, 1.0)
        monkeypatch.setattr(continuation, "BYTES", room)
        example = decoder.greedy(inputs, settings, own[:-1], unchecked=True)
        assert len(example.tokens) == 1
        assert dict(example.answers(edits)) == expected
        assert example.tokens == own


@pytest.mark.parametrize("change", ["a longer prompt", "padding", "rules", "a near tie", "experts"])
def test_answers_are_guessed_only_where_one_pass_is_known_to_equal_generate(
    build_family: Callable[[str], Family], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = build_family("llava")
    inputs, settings = inputs_of(family), {"max_new_tokens": 4}
    decoder = Decoder(Replayer(Anatomy.of(family.model)))
    list(decoder.greedy(inputs, settings).answers(means_of(family.model)))
    ids = inputs["input_ids"]
    if change == "a longer prompt":
        inputs = inputs_of(family, f"{QUESTION} {QUESTION}")
    elif change == "padding":
        mask = torch.cat([torch.zeros_like(ids[:, :1]), torch.ones_like(ids[:, 1:])], dim=1)
        inputs = {**inputs, "attention_mask": mask}
    elif change == "rules":
        settings = {**settings, "repetition_penalty": 1.1}
    elif change == "a near tie":
        monkeypatch.setattr(decoding, "near_tie", lambda _: True)
    else:
        monkeypatch.setattr(type(decoder.anatomy.shape), "has_experts", True)
    monkeypatch.setattr(type(family.model), "_sample", no_generate)
    with pytest.raises(AssertionError, match="decoded by generate"):
        decoder.greedy(inputs, settings, [60, 61])


def test_a_near_tie_is_one_that_rounding_could_turn() -> None:
    logits = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0 - 1e-4, 0.0]])
    assert not decoding.near_tie(logits[:1])
    assert decoding.near_tie(logits)


def test_rows_that_end_early_are_left_out_and_guesses_save_passes(
    build_family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in passes and rows, the second time with all answers known."""
    family = build_family("llava")
    inputs, edits = inputs_of(family), means_of(family.model)
    longest = plain.answer(family.model, plain.Item(inputs, {"max_new_tokens": 12, "min_new_tokens": 12}, []))
    settings = {"max_new_tokens": 12, "eos_token_id": [longest[3], 0, *range(60, 90)]}
    item = plain.Item(inputs, settings, [])
    expected = {edit: plain.answer(family.model, item, plain.Edit(*edit.site)) for edit in edits}
    monkeypatch.setattr(continuation, "LARGE", 2)
    decoder = Decoder(Replayer(Anatomy.of(family.model)))
    example = decoder.greedy(inputs, settings)
    assert dict(example.answers(edits)) == expected
    sizes: list[tuple[int, int]] = []
    ours = continuation._Batch.step

    def counted(batch: Any, *rest: Any) -> None:
        ours(batch, *rest)
        sizes.append((len(batch.edits), len(batch.alive)))

    monkeypatch.setattr(continuation._Batch, "step", counted)
    passes = []
    for decoder.guesses in (False, True):
        sizes.clear()
        assert dict(example.answers(edits)) == expected
        passes.append(len(sizes))
        assert all(
            2 * alive > rows for (rows, _), (_, alive) in zip(sizes[1:], sizes, strict=False) if rows > 1
        )
    assert passes[1] < passes[0]


def test_images_are_encoded_once_per_example(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    calls: list[int] = []
    handle = encoders(Anatomy.of(family.model))[0].register_forward_hook(lambda *_: calls.append(1))
    inputs = inputs_of(family)
    decoder = Decoder(Replayer(Anatomy.of(family.model)))
    decoder.greedy(inputs, {"max_new_tokens": 3})  # the proof
    inner: list[int] = []
    vision = encoders(decoder.anatomy)[0]
    layer = next(module for name, module in vision.named_modules() if name.endswith("layers.0"))
    layer.register_forward_hook(lambda *_: inner.append(1))
    example = decoder.greedy(inputs, {"max_new_tokens": 3})
    assert example.passes is not None
    assert len(inner) == 1 < len(calls)
    handle.remove()


@pytest.mark.parametrize(
    "settings", [{"do_sample": True, "max_new_tokens": 3}, {"num_beams": 3, "max_new_tokens": 3}]
)
def test_answers_that_are_not_greedy_are_refused(
    build_family: Callable[[str], Family], settings: dict[str, Any]
) -> None:
    family = build_family("llava")
    with pytest.raises(HonesError, match="samples or uses beam search: pass --gen_kwargs do_sample=False"):
        Decoder(Replayer(Anatomy.of(family.model))).greedy(inputs_of(family), settings)


@pytest.mark.parametrize("settings", [{"max_length": 3}, {"max_new_tokens": 0}, {"top_kk": 3}])
def test_settings_that_generate_refuses_are_one_line(
    build_family: Callable[[str], Family], settings: dict[str, Any]
) -> None:
    family = build_family("llava")
    with pytest.raises(HonesError, match=r"generate rejects this task's settings: .*--gen_kwargs") as caught:
        Decoder(Replayer(Anatomy.of(family.model))).greedy(inputs_of(family), settings)
    assert "\n" not in str(caught.value)


def test_cutting_at_the_first_end_token() -> None:
    assert cut_at_end([5, 1, 2, 1, 0], [1, 2]) == [5, 1]
    assert cut_at_end([5, 6], [1]) == [5, 6]
    assert cut_at_end([1, 5], [1]) == [1]
    assert cut_at_end([5, 1], []) == [5, 1]


def test_examples_are_repeated_along_the_first_dimension() -> None:
    patches = torch.arange(6.0).view(3, 2)
    repeated = repeat_example(
        {"input_ids": torch.tensor([[1, 2]]), "pixel_values": patches, "sizes": [(4, 5)]}, 2
    )
    assert repeated["input_ids"].tolist() == [[1, 2], [1, 2]]
    assert torch.equal(repeated["pixel_values"], torch.cat([patches, patches]))
    assert repeated["sizes"] == [(4, 5), (4, 5)]
