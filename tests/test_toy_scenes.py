"""The scenes: graphs, drawings, questions, edits, shifts, against what the pixels themselves say."""

import dataclasses
import random
from typing import get_args

import numpy as np
import pytest

from hones_eval.toy import captions, drawing, edits, questions, scenes, shifts
from hones_eval.toy.scenes import Scene, SceneError, scene

SPLITS = ("discovery", "development", "test")
SOME = [scene(split, index) for split in ("train", *SPLITS) for index in range(40)]


def without(scene: Scene, shape: str) -> Scene:
    return dataclasses.replace(scene, things=tuple(t for t in scene.things if t.shape != shape))


def changed_box(before: np.ndarray, after: np.ndarray) -> tuple[int, int, int, int]:
    """Tight box round the pixels that differ."""
    rows, columns = np.nonzero((before != after).any(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_a_seed_names_one_image() -> None:
    assert scene("test", 7) == scene("test", 7)
    pictures = {drawing.draw(scene("test", index)).tobytes() for index in range(200)}
    assert len(pictures) == 200


def test_no_word_is_in_two_splits() -> None:
    words = [word for split in ("train", *SPLITS) for word in scenes.WORDS[split]]
    assert len(words) == len(set(words)) == 21**3
    assert all(s.word in scenes.WORDS[s.seed.split("-")[0]] for s in SOME)


@pytest.mark.parametrize("split", SPLITS)
def test_edits_stay_in_their_split(split: scenes.Split) -> None:
    rng = random.Random(0)
    for index in range(30):
        edited = edits.change_word(scene(split, index), rng)
        assert edited.word in scenes.WORDS[split]
        assert edited.word != scene(split, index).word


@pytest.mark.parametrize("one", SOME[::9], ids=lambda s: s.seed)
def test_a_box_holds_all_the_pixels_of_its_thing(one: Scene) -> None:
    for thing in one.things:
        left, top, right, bottom = changed_box(drawing.draw(without(one, thing.shape)), drawing.draw(one))
        assert thing.box[0] <= left
        assert thing.box[1] <= top
        assert right <= thing.box[2]
        assert bottom <= thing.box[3]
        assert (right - left) * (bottom - top) >= 0.7 * (thing.box[2] - thing.box[0]) ** 2


@pytest.mark.parametrize("one", SOME[::9], ids=lambda s: s.seed)
def test_the_image_shows_the_colour_that_the_graph_names(one: Scene) -> None:
    picture = drawing.draw(one).astype(int)
    for thing in one.things:
        left, top, right, bottom = thing.box
        inside = picture[top:bottom, left:right].reshape(-1, 3)
        exact = {name: int((inside == rgb).all(axis=1).sum()) for name, rgb in drawing.RGB.items()}
        assert max(exact, key=exact.__getitem__) == thing.color


@pytest.mark.parametrize("kind", get_args(questions.Kind))
def test_an_edit_changes_the_answer_and_nothing_outside_its_boxes(kind: questions.Kind) -> None:
    rng, edited_some = random.Random(kind), 0
    for item in SOME:
        question = questions.ask(item, kind, rng)
        edited = question and questions.edit(item, question, rng)
        if not question or not edited:
            continue
        edited_some += 1
        assert question.answer(edited) != question.answer(item)
        assert (edited.word, edited.word_box, edited.seed) == (item.word, item.word_box, item.seed)
        touched = np.zeros((scenes.SIDE, scenes.SIDE), dtype=bool)
        for thing in set(item.things) ^ set(edited.things):
            left, top, right, bottom = thing.box
            touched[top:bottom, left:right] = True
        differs = (drawing.draw(item) != drawing.draw(edited)).any(axis=2)
        assert differs.any()
        assert not (differs & ~touched).any()
    assert edited_some >= 20


@pytest.mark.parametrize("kind", ["exists", "color", "texture", "is_color", "is_texture", "shape_at"])
def test_object_and_attribute_edits_change_one_thing_in_one_respect(kind: questions.Kind) -> None:
    rng = random.Random(kind)
    for item in SOME:
        question = questions.ask(item, kind, rng)
        edited = question and questions.edit(item, question, rng)
        assert edited is not None
        pairs = [(a, b) for a, b in zip(item.things, edited.things, strict=True) if a != b]
        assert len(pairs) == 1
        before, after = (dataclasses.asdict(thing) for thing in pairs[0])
        assert len([name for name in before if before[name] != after[name]]) == 1


def test_relation_answers_follow_the_pixels() -> None:
    """Left, right, above and below by the middle of each thing's pixels, found by taking it away."""
    rng = random.Random(1)
    for item in SOME[::4]:
        question = questions.ask(item, "is_side", rng)
        assert question is not None
        middles = []
        for shape in (question.shape, question.other):
            left, top, right, bottom = changed_box(drawing.draw(without(item, shape)), drawing.draw(item))
            middles.append(((left + right) / 2, (top + bottom) / 2))
        (x1, y1), (x2, y2) = middles
        holds = {
            "left of": x1 + 14 < x2,
            "right of": x2 + 14 < x1,
            "above": y1 + 14 < y2,
            "below": y2 + 14 < y1,
        }
        assert question.answer(item) == ("Yes" if holds[question.value] else "No")


def test_yes_and_no_are_equally_frequent() -> None:
    rng = random.Random(2)
    for kind in ("exists", "is_color", "is_texture", "is_side"):
        answers = [q.answer(s) for s in SOME * 4 if (q := questions.ask(s, kind, rng))]
        assert 0.42 < answers.count("Yes") / len(answers) < 0.58


def test_five_captions_are_distinct_and_name_everything() -> None:
    for item in SOME:
        references = captions.captions(item)
        assert len(set(references)) == 5
        assert all(captions.phrase(thing) in reference for thing in item.things for reference in references)


def test_near_misses_are_false() -> None:
    rng = random.Random(3)
    for item in SOME:
        assert captions.near_miss(item, rng) not in captions.captions(item)


def test_hard_negatives_share_most_words_and_are_not_true() -> None:
    pool = [scene("test", index) for index in range(120)]
    one = pool[5]
    chosen = captions.hard_negatives(one, pool, 49)
    assert len(set(chosen)) == 49
    assert captions.captions(one)[0] not in chosen

    def shared(caption: str) -> int:
        left = captions.captions(one)[0].split()
        return sum(1 for word in caption.split() if word in left and not left.remove(word))

    scores = [shared(caption) for caption in chosen]
    assert scores == sorted(scores, reverse=True)
    phrases = [captions.phrase(thing) for thing in one.things]
    passed_over = {captions.captions(s)[0] for s in pool} - set(chosen)
    true = {
        captions.captions(s)[0] for s in pool if all(captions.phrase(thing) in phrases for thing in s.things)
    }
    assert all(shared(caption) <= min(scores) for caption in passed_over - true)


@pytest.mark.parametrize("shift", get_args(shifts.Shift))
def test_a_shift_changes_the_image_alike_for_a_scene_and_its_edit(shift: shifts.Shift) -> None:
    one = scene("test", 3)
    edited = edits.change_word(one, random.Random(0))
    plain, shifted = drawing.draw(one), shifts.shift_image(shifts.shift_scene(one, shift), shift)
    assert shifted.shape == plain.shape
    assert (plain != shifted).any()
    differs = (shifted != shifts.shift_image(shifts.shift_scene(edited, shift), shift)).any(axis=2)
    left, top, right, bottom = one.word_box
    differs[top:bottom, left:right] = False
    assert not differs.any()


def test_one_more_object_fits_every_image_of_every_split() -> None:
    for split in SPLITS:
        for index in range(0, scenes.SPLIT_SIZE[split], 5):
            one = scene(split, index)
            more = shifts.shift_scene(one, "extra_object")
            assert len(more.things) == len(one.things) + 1


def test_a_full_image_has_no_room_for_one_more() -> None:
    boxes = [(x, y, x + 24, y + 24) for x, y in ((4, 4), (34, 4), (4, 34))]
    looks = zip(scenes.SHAPES, boxes, strict=False)
    things = tuple(scenes.Thing(shape, "red", "solid", "large", box) for shape, box in looks)
    crowded = Scene("test-full", things, "BAK", (32, 32, 64, 64))
    with pytest.raises(SceneError, match="no room for one more object"):
        shifts.shift_scene(crowded, "extra_object")


def test_what_cannot_be_laid_out_is_refused() -> None:
    one = scene("test", 0)
    first, second = one.things[:2]
    with pytest.raises(SceneError, match="overlaps another"):
        dataclasses.replace(one, things=(first, dataclasses.replace(second, box=first.box)))
    with pytest.raises(SceneError, match="is not inside the 64 x 64 image"):
        dataclasses.replace(one, word_box=(50, 50, 76, 68))
    with pytest.raises(SceneError, match="each shape may appear once"):
        dataclasses.replace(one, things=(first, dataclasses.replace(second, shape=first.shape)))


def test_beyond_a_split_is_an_error() -> None:
    with pytest.raises(SceneError, match="asked for 1001 images of the test split of scenes, which has 1000"):
        scene("test", 1000)
    with pytest.raises(SceneError, match="scenes have no split 'val'; the splits are train, discovery"):
        scene("val", 0)  # type: ignore[arg-type]


def test_an_edit_of_what_is_not_there_is_an_error() -> None:
    one = scene("test", 0)
    with pytest.raises(SceneError, match="has no"):
        edits.swap_places(one, edits.absent_shapes(one)[0], one.things[0].shape)
    with pytest.raises(SceneError, match="cannot set color to 'pink'"):
        edits.set_attribute(one, one.things[0].shape, "color", "pink")
