"""Choose the change of an edit, and derive the answer that it leads to.

Every change makes the clean answer wrong (V-SEAM 1). The edited question's answer is derived from what the
editor does, or, where a model paints what the record's own prompt says, taken from the record; it is never
guessed: a record for which neither works is rejected with the reason.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hones_eval.editing import questions
from hones_eval.editing.problems import RecordError
from hones_eval.editing.records import Answer, Record, Thing
from hones_eval.editing.vocabulary import (
    ALIKE,
    ALIKE_MATERIALS,
    COLOURS,
    GROUPS,
    MATERIALS,
    PLAIN_COLOURS,
    RELATIONS,
    SURFACES,
)

Kind = Literal["remove", "recolor", "retexture", "move", "mirror", "generate", "adopt"]
RENDERED = ("wood", "metal", "brick", "stone", "plastic", "fabric")


@dataclass(frozen=True)
class Change:
    """One counterfactual: the changed thing, its new value, and the new answers."""

    target: Thing
    """The thing whose region is edited."""
    value: str
    """The new object, colour, material or relation; empty if the thing is removed."""
    prompt: str
    """The change in words, for editors that take a prompt."""
    edited_answer: Answer
    answer_from: Literal["derived", "record"]
    counterfactual_question: str | None = None
    """The same question about `value`, of which `counterfactual_answer` is true after the edit."""
    counterfactual_answer: Answer | None = None
    anchor: Thing | None = None
    """The thing that a relation relates the target to."""
    colour: str | None = None
    """The colour that the prompt names for a new material."""
    was: str | None = None
    """The colour that the thing has in the clean image, if the record says so."""


def choose_change(record: Record, kind: Kind, seed: int) -> Change:
    """Choose the change for a kind of editor; deterministic given record, kind and seed.

    Raises: RecordError when the edited answer cannot be derived, or there is nothing to edit.
    """
    if kind == "adopt":
        return _adopted(record)
    if kind == "generate" and record.prompt:
        return _own_prompt(record)
    chance = random.Random(int(hashlib.sha256(f"{seed}:{record.question_id}".encode()).hexdigest(), 16))
    choose: Callable[[Record, Kind, random.Random], Change] = {
        "object": _object,
        "color": _colour,
        "material": _material,
        "relation": _relation,
    }[record.category if record.level == "attribute" else record.level]
    return choose(record, kind, chance)


def _object(record: Record, kind: Kind, chance: random.Random) -> Change:
    name = questions.asked_object(record.question)
    target = _thing(record, name)
    if record.answer == "Yes" and record.repeated == target.name:
        raise RecordError(
            f"its scene graph has more than one {name}, so editing one leaves the answer as it is"
        )
    if kind == "remove":
        if record.answer == "No":
            raise RecordError(f"its answer says that there is no {name}, so there is nothing to remove")
        return Change(target, "", "empty background", "No", "derived")
    if record.answer == "No":
        return Change(target, name, name, "Yes", "derived")
    value = _another(name, [thing.name for thing in record.things], chance)
    asked = questions.with_object(record.question, value)
    return Change(target, value, value, "No", "derived", asked, "Yes")


def _another(name: str, present: Sequence[str], chance: random.Random) -> str:
    group = questions.group_of(name) or questions.group_of(name.removesuffix("s"))
    if group is None:
        raise RecordError(f"{name!r} is not a known object, so there is no replacement for it")
    alike = set().union(*(names for names in ALIKE if name in names or name.removesuffix("s") in names))
    return chance.choice([other for other in GROUPS[group] if other not in alike | {name, *present}])


def _colour(record: Record, kind: Kind, chance: random.Random) -> Change:
    asked = questions.asked_colour(record.question)
    target = _only(record)
    named = next(
        (colour for colour in COLOURS if record.prompt and colour in record.prompt.lower().split()), None
    )
    if record.answer == "No":
        return Change(target, asked, f"{asked} {target.name}", "Yes", "derived")
    value = named if named in PLAIN_COLOURS else _another_colour(asked, chance)
    if _colour_distance(asked, value) < 40:
        raise RecordError(f"its prompt {record.prompt!r} asks for {value}, which is too similar to {asked}")
    question = questions.with_last(record.question, value)
    return Change(target, value, f"{value} {target.name}", "No", "derived", question, "Yes", was=asked)


def _another_colour(asked: str, chance: random.Random) -> str:
    """A clearly different colour with a similar lightness, so that the shading can stay."""
    middle = _lightness(asked)
    far = [colour for colour in PLAIN_COLOURS if _colour_distance(colour, asked) >= 60] or list(PLAIN_COLOURS)
    return chance.choice(sorted(far, key=lambda name: abs(_lightness(name) - middle))[:3])


def _lightness(name: str) -> float:
    return (COLOURS[name].dark + COLOURS[name].light) / 2


def _colour_distance(name: str, other: str) -> float:
    """CIE76 distance between the centres of two named colours."""
    first, second = COLOURS[name], COLOURS[other]
    return float(
        ((_lightness(name) - _lightness(other)) ** 2 + (first.a - second.a) ** 2 + (first.b - second.b) ** 2)
        ** 0.5
    )


def _material(record: Record, kind: Kind, chance: random.Random) -> Change:
    asked = questions.asked_material(record.question)
    target = _only(record)
    words = set((record.prompt or "").lower().split())
    named = next((one for one, names in MATERIALS.items() if words & set(names)), None)
    colour = next((name for name in COLOURS if name in words), None)
    able = list(MATERIALS) if kind == "generate" else list(RENDERED)
    if record.answer == "No":
        if asked not in able:
            raise RecordError(f"there is no texture for {asked}; there are textures for {', '.join(able)}")
        return Change(target, asked, f"{asked} {target.name}", "Yes", "derived")
    alike = set().union({asked}, *(group for group in ALIKE_MATERIALS if asked in group))
    far = [name for name in able if name not in alike]
    value = named if named in far else chance.choice(far)
    question = questions.with_material(record.question, value)
    paint = colour if value == named else None
    return Change(
        target, value, f"{value} {target.name}", "No", "derived", question, "Yes", colour=paint
    )  # fmt: skip


def _relation(record: Record, kind: Kind, chance: random.Random) -> Change:
    between = questions.asked_relation(record.question, [named.name for named in record.things])
    relation = RELATIONS.get(between.words)
    if relation is None:
        raise RecordError(f"the relation {between.words!r} has no known opposite")
    subject, thing = _thing(record, between.subject), _thing(record, between.thing)
    if kind == "generate":
        return _generated_relation(record, between, subject, thing)
    if kind == "mirror" and relation.kind != "side":
        raise RecordError(
            f"{between.words!r} stays true when mirrored; the mirror editor only handles left and right"
        )
    if relation.kind == "depth":
        raise RecordError(f"{between.words!r} is about depth, which moving within the image does not change")
    if record.answer == "No" and relation.kind not in ("side", "height"):
        raise RecordError(f"moving cannot make {between.words!r} true; only left, right, above and below")
    target, anchor = (thing, subject) if relation.kind == "held" else (subject, thing)
    if relation.kind in ("contact", "near") and anchor.name.lower() in SURFACES:
        raise RecordError(f"{anchor.name!r} is a surface that is everywhere, so nothing can be moved off it")
    if record.answer == "No":
        return Change(target, between.words, record.question, "Yes", "derived", anchor=anchor)
    contrary = relation.contrary if relation.kind in ("side", "height") else None
    question = record.question.replace(f" {between.words} ", f" {contrary} ") if contrary else None
    return Change(
        target,
        relation.contrary or "",
        f"{between.subject} {relation.contrary} {between.thing}",
        "No",
        "derived",
        question,
        "Yes" if question else None,
        anchor=anchor,
    )


def _generated_relation(
    record: Record, between: questions.Between, subject: Thing, thing: Thing
) -> Change:  # fmt: skip
    relation = RELATIONS[between.words]
    if record.answer == "No" or relation.contrary is None:
        raise RecordError(f"{between.words!r} has no known opposite to paint")
    question = record.question.replace(f" {between.words} ", f" {relation.contrary} ")
    prompt = f"{between.subject} {relation.contrary} {between.thing}"
    return Change(subject, relation.contrary, prompt, "No", "derived", question, "Yes", anchor=thing)


def _own_prompt(record: Record) -> Change:
    """The change that the record's own prompt describes; its answer is given or derived."""
    assert record.prompt is not None
    target = _edited_thing(record)
    if record.edited_answer is not None:
        return _as_recorded(record, target)
    words = record.prompt.lower()
    if record.answer == "Yes" and record.level == "object":
        asked = questions.asked_object(record.question)
        if asked.lower() not in words:
            question = questions.with_object(record.question, record.prompt)
            return Change(target, record.prompt, record.prompt, "No", "derived", question, "Yes")
    if record.answer == "Yes" and record.level == "attribute":
        changed = choose_change(record, "recolor" if record.category == "color" else "retexture", 0)
        if changed.value in words:
            return Change(
                target, changed.value, record.prompt, "No", "derived", changed.counterfactual_question, "Yes"
            )
    raise RecordError(f"its prompt {record.prompt!r} does not imply the new answer; add 'edited_answer'")


def _adopted(record: Record) -> Change:
    if record.edited_answer is None:
        raise RecordError("its edited image was made elsewhere, so the record needs an 'edited_answer'")
    return _as_recorded(record, _edited_thing(record))


def _as_recorded(record: Record, target: Thing) -> Change:
    assert record.edited_answer is not None
    if record.edited_answer == record.answer:
        raise RecordError(f"its answer stays {record.answer!r} after the edit, so the edit tests nothing")
    return Change(
        target,
        record.prompt or "",
        record.prompt or "",
        record.edited_answer,
        "record",
        record.counterfactual_question,
        record.counterfactual_answer,
    )


def _edited_thing(record: Record) -> Thing:
    """The thing that an image made from the record's own prompt differs in: the first that has a box."""
    if record.level == "object":
        return _thing(record, questions.asked_object(record.question))
    boxed = next((thing for thing in record.things if thing.box is not None), None)
    return boxed or _thing(record, record.things[0].name)


def _only(record: Record) -> Thing:
    if len(record.things) == 1:
        return _thing(record, record.things[0].name)
    named = [
        thing
        for thing in record.things
        if questions.place_of(thing.name, record.question) < len(record.question)
    ]
    return _thing(record, (named or list(record.things))[-1].name)


def _thing(record: Record, name: str) -> Thing:
    """The thing of that name.

    Raises: RecordError when the record does not have it, or has no box of it.
    """
    found = next((thing for thing in record.things if thing.name.lower() == name.lower()), None)
    if found is None:
        raise RecordError(
            f"{name!r} is not among its objects ({', '.join(thing.name for thing in record.things)})"
        )
    if found.box is None:
        raise RecordError(f"it has no box for {name!r}")
    return found
