"""Prompts on one picture share their prefix: the logits are those of plain hooked forwards, at less work."""

from collections.abc import Callable, Sequence

import plain
import pytest
import torch
from families import Family
from PIL import Image, ImageDraw
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head, Neuron
from hones_eval.engine import prefix_segment
from hones_eval.engine.passes import SiteEdit, replaced_by_mean
from hones_eval.engine.prefixes import SharedReplayer, shared_length
from hones_eval.engine.replay import Replayer

CANDIDATES = ("a red cat", "dogs run on the grass by a house", "two", "a red dog", "nothing at all")
PLAIN_EDITS = (
    plain.Edit(0, 1),
    plain.Edit(1, 3),
    plain.Edit(2, 0),
    plain.Edit(1, 2, "zero head"),
    plain.Edit(0, 41, "zero neuron"),
    plain.Edit(0, 7, "zero neuron"),
    plain.Edit(2, 12, "zero neuron"),
    plain.Edit(2, 13, "zero neuron"),
)


def edit(one: plain.Edit) -> SiteEdit:
    if one.kind == "zero neuron":
        return SiteEdit(Neuron(one.layer, one.site), "mask")
    return SiteEdit(Head(one.layer, one.site), "mean" if one.kind == "mean" else "zero")


EDITS = [edit(one) for one in PLAIN_EDITS]


def picture(colour: str) -> Image.Image:
    drawn = Image.new("RGB", (48, 40), "white")
    ImageDraw.Draw(drawn).ellipse([4, 4, 30, 30], fill=colour)
    return drawn


def group_of(family: Family, candidates: Sequence[str] = CANDIDATES, colour: str = "red") -> list[dict]:
    texts = [f"Candidate: {one}\nIs it right?" for one in candidates]
    made = [family.inputs(text, [picture(colour)]) for text in texts]
    return [{name: value for name, value in one.items() if name != "labels"} for one in made]


def gathered(
    sharing: SharedReplayer, group: list[dict], edits: Sequence[SiteEdit], reads: Sequence[int] | None = None
) -> tuple[dict[tuple[int, SiteEdit | None], Tensor], set[int]]:
    """Logits by prompt and edit, each exactly once, and the lengths of the prefixes that were shared."""
    found: dict[tuple[int, SiteEdit | None], Tensor] = {}
    lengths = set()
    for part in sharing.last_tokens(group, edits, reads):
        lengths.add(part.shared)
        for one, rows in zip(part.edits, part.logits, strict=True):
            for member, logits in zip(part.members, rows, strict=True):
                assert (member, one) not in found
                found[member, one] = logits[-1] if reads is None else logits[-reads[member] :]
    assert len(found) == len(group) * (1 + len(edits))
    return found, lengths


def assert_plain(family: Family, group: list[dict], found: dict, members: Sequence[int]) -> None:
    """Equal to full forwards by the slow reference, whose hooks are its own."""
    for member in members:
        for one in (None, *PLAIN_EDITS):
            expected = plain.forward(family.model, group[member], one).logits[-1]
            logits = found[member, None if one is None else edit(one)]
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max(), (member, one)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "smolvlm"])
def test_logits_behind_a_shared_prefix_are_those_of_full_forwards(
    name: str, build_family: Callable[[str], Family]
) -> None:
    family = build_family(name)
    anatomy, group = Anatomy.of(family.model), group_of(family)
    length = shared_length(group, anatomy)
    assert length > int(anatomy.image_positions(group[0]).sum())
    sharing = SharedReplayer(Replayer(anatomy, rows=2))
    found, lengths = gathered(sharing, group, EDITS)
    assert lengths == {length}
    assert sharing.inexact is None
    assert_plain(family, group, found, members=(1, 2))
    whole, _ = gathered(SharedReplayer(Replayer(anatomy)), group, EDITS)
    for key, logits in found.items():
        torch.testing.assert_close(logits, whole[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_several_tokens_are_read_of_each_prompt(name: str, build_family: Callable[[str], Family]) -> None:
    """More of one than of another, and more than another's ending holds."""
    family = build_family(name)
    anatomy, group, reads = Anatomy.of(family.model), group_of(family), [2, 9, 1, 3, 2]
    length = shared_length(group, anatomy, reads)
    assert length == min(shared_length(group, anatomy), group[1]["input_ids"].shape[1] - 9)
    sharing = SharedReplayer(Replayer(anatomy))
    found, lengths = gathered(sharing, group, EDITS, reads)
    assert (lengths, sharing.inexact) == ({length}, None)
    for (member, one), logits in found.items():
        kind = None if one is None else PLAIN_EDITS[EDITS.index(one)]
        expected = plain.forward(family.model, group[member], kind).logits[-reads[member] :]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max(), (member, one)


def test_the_prefix_passes_once_a_row(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    anatomy, group = Anatomy.of(family.model), group_of(family)
    heads = replaced_by_mean([Head(0, head) for head in range(anatomy.shape.heads)])
    sharing = SharedReplayer(Replayer(anatomy))
    gathered(sharing, group, heads[:1])  # the proof
    passed = 0

    def count(module: object, args: tuple[Tensor, ...]) -> None:
        nonlocal passed
        passed += args[0].shape[0] * args[0].shape[1]

    handle = anatomy.neurons_in[1].module.register_forward_pre_hook(count)
    try:
        gathered(sharing, group, heads)
    finally:
        handle.remove()
    length = shared_length(group, anatomy)
    longest = max(one["input_ids"].shape[1] for one in group) - length
    a_row = length + len(group) * longest  # the endings are padded to the longest
    assert passed == (1 + len(heads)) * a_row + longest  # one ending again, for masks and positions


@pytest.mark.parametrize(
    ("name", "reason"), [("paligemma", "logits after a shared prefix differ"), ("instructblip", None)]
)
def test_what_cannot_share_is_measured_one_at_a_time(
    name: str, reason: str | None, build_family: Callable[[str], Family]
) -> None:
    """A prompt that sees itself in both directions; a picture that is read with the question in mind."""
    family = build_family(name)
    group = group_of(family, CANDIDATES[:2])
    sharing = SharedReplayer(Replayer(Anatomy.of(family.model)))
    for _ in range(2):
        found, lengths = gathered(sharing, group, EDITS)
        assert lengths == {0}
    assert_plain(family, group, found, members=(0, 1))
    assert (sharing.inexact or "None").startswith(str(reason))


def test_only_equal_beginnings_are_shared(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    anatomy, group = Anatomy.of(family.model), group_of(family)
    ids = [one["input_ids"][0].tolist() for one in group]
    length = shared_length(group, anatomy)
    assert len({tuple(one[:length]) for one in ids}) == 1
    assert len({one[length] for one in ids}) > 1
    assert shared_length(group[:1], anatomy) == 0
    assert shared_length([group[0], group_of(family, colour="blue")[1]], anatomy) == 0
    same = shared_length([group[0], group[0]], anatomy)
    assert same == len(ids[0]) - 1  # one token is left to read behind
    masked = group[1] | {"attention_mask": group[1]["attention_mask"].clone()}
    masked["attention_mask"][0, 0] = 0
    assert shared_length([group[0], masked], anatomy) == 0
    late = {**group[1], "input_ids": group[1]["input_ids"].flip(1)}
    assert shared_length([group[0], late], anatomy) == 0


def test_a_wrong_prefix_is_noticed(
    build_family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = build_family("llava")
    group = group_of(family, CANDIDATES[:2])
    right = prefix_segment.AfterPrefix._joined

    def shifted(self: object, past: Tensor, new: Tensor) -> Tensor:
        return right(self, past * 1.01, new)

    monkeypatch.setattr(prefix_segment.AfterPrefix, "_joined", shifted)
    sharing = SharedReplayer(Replayer(Anatomy.of(family.model)))
    found, lengths = gathered(sharing, group, EDITS)
    assert lengths == {0}
    assert "differ from those of full forwards" in str(sharing.inexact)
    assert_plain(family, group, found, members=(0,))
