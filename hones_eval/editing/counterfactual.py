"""What to change, and the answer that follows from it.

Every change makes the clean answer wrong (V-SEAM 1). The edited question's answer is derived from what the
editor does, or, where a model paints what the record's own prompt says, taken from the record; it is never
guessed: a record for which neither works is refused with the reason.
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
    """One counterfactual: which thing becomes what, and what is then true."""

    target: Thing
    """The thing whose place is edited."""
    value: str
    """The new object, colour, material or relation; empty where the thing is taken away."""
    prompt: str
    """The change in words, for editors that read."""
    edited_answer: Answer
    answer_from: Literal["derived", "record"]
    counterfactual_question: str | None = None
    """The same question about `value`, of which `counterfactual_answer` is true after the edit."""
    counterfactual_answer: Answer | None = None
    anchor: Thing | None = None
    """The thing that a relation relates the target to."""
    colour: str | None = None
    """The colour that a prompt asks of a new material."""
    was: str | None = None
    """The colour that the thing has in the clean picture, where the record says so."""


def choose_change(record: Record, kind: Kind, seed: int) -> Change:
    """Choose what an editor of some kind changes; the same for the same record, kind and seed.

    Raises: RecordError when the edited answer does not follow, or there is nothing to edit.
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
            raise RecordError(f"it says that there is no {name}, so there is none to remove")
        return Change(target, "", "empty background", "No", "derived")
    if record.answer == "No":
        return Change(target, name, name, "Yes", "derived")
    value = _another(name, [one.name for one in record.things], chance)
    asked = questions.with_object(record.question, value)
    return Change(target, value, value, "No", "derived", asked, "Yes")


def _another(name: str, present: Sequence[str], chance: random.Random) -> str:
    group = questions.group_of(name) or questions.group_of(name.removesuffix("s"))
    if group is None:
        raise RecordError(f"{name!r} is in no group of objects that are known, so nothing stands in for it")
    alike = set().union(*(one for one in ALIKE if name in one or name.removesuffix("s") in one))
    return chance.choice([one for one in GROUPS[group] if one not in alike | {name, *present}])


def _colour(record: Record, kind: Kind, chance: random.Random) -> Change:
    asked = questions.asked_colour(record.question)
    target = _only(record)
    named = next((one for one in COLOURS if record.prompt and one in record.prompt.lower().split()), None)
    if record.answer == "No":
        return Change(target, asked, f"{asked} {target.name}", "Yes", "derived")
    value = named if named in PLAIN_COLOURS else _another_colour(asked, chance)
    if _colour_distance(asked, value) < 40:
        raise RecordError(
            f"its prompt {record.prompt!r} asks for {value}, which is hard to tell from {asked}"
        )
    question = questions.with_last(record.question, value)
    return Change(target, value, f"{value} {target.name}", "No", "derived", question, "Yes", was=asked)


def _another_colour(asked: str, chance: random.Random) -> str:
    """One of the far colours that need the least change of lightness, so that the shading can stay."""
    middle = _lightness(asked)
    far = [one for one in PLAIN_COLOURS if _colour_distance(one, asked) >= 60] or list(PLAIN_COLOURS)
    return chance.choice(sorted(far, key=lambda one: abs(_lightness(one) - middle))[:3])


def _lightness(name: str) -> float:
    return (COLOURS[name].dark + COLOURS[name].light) / 2


def _colour_distance(one: str, other: str) -> float:
    """CIE76 between the middles of two colours' homes."""
    first, second = COLOURS[one], COLOURS[other]
    return float(
        ((_lightness(one) - _lightness(other)) ** 2 + (first.a - second.a) ** 2 + (first.b - second.b) ** 2)
        ** 0.5
    )


def _material(record: Record, kind: Kind, chance: random.Random) -> Change:
    asked = questions.asked_material(record.question)
    target = _only(record)
    words = set((record.prompt or "").lower().split())
    named = next((one for one, names in MATERIALS.items() if words & set(names)), None)
    colour = next((one for one in COLOURS if one in words), None)
    able = list(MATERIALS) if kind == "generate" else list(RENDERED)
    if record.answer == "No":
        if asked not in able:
            raise RecordError(f"there is no texture for {asked}; there is one for {', '.join(able)}")
        return Change(target, asked, f"{asked} {target.name}", "Yes", "derived")
    alike = set().union({asked}, *(one for one in ALIKE_MATERIALS if asked in one))
    far = [one for one in able if one not in alike]
    value = named if named in far else chance.choice(far)
    question = questions.with_material(record.question, value)
    paint = colour if value == named else None
    return Change(
        target, value, f"{value} {target.name}", "No", "derived", question, "Yes", colour=paint
    )  # fmt: skip


def _relation(record: Record, kind: Kind, chance: random.Random) -> Change:
    between = questions.asked_relation(record.question, [one.name for one in record.things])
    relation = RELATIONS.get(between.words)
    if relation is None:
        raise RecordError(f"the relation {between.words!r} is none of those whose contrary is known")
    subject, thing = _thing(record, between.subject), _thing(record, between.thing)
    if kind == "generate":
        return _generated_relation(record, between, subject, thing)
    if kind == "mirror" and relation.kind != "side":
        raise RecordError(f"{between.words!r} stays true in a mirror; mirror serves left and right")
    if relation.kind == "depth":
        raise RecordError(f"{between.words!r} is a matter of depth, which moving across the picture leaves")
    if record.answer == "No" and relation.kind not in ("side", "height"):
        raise RecordError(
            f"no move makes {between.words!r} true; only left, right, above and below can be made"
        )
    target, anchor = (thing, subject) if relation.kind == "held" else (subject, thing)
    if relation.kind in ("contact", "near") and anchor.name.lower() in SURFACES:
        raise RecordError(f"{anchor.name!r} is a surface: there is no place off it")
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
        raise RecordError(f"{between.words!r} has no contrary to paint")
    question = record.question.replace(f" {between.words} ", f" {relation.contrary} ")
    prompt = f"{between.subject} {relation.contrary} {between.thing}"
    return Change(subject, relation.contrary, prompt, "No", "derived", question, "Yes", anchor=thing)


def _own_prompt(record: Record) -> Change:
    """What the record's prompt makes; its answer is the record's, or follows where another thing is named."""
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
    raise RecordError(f"its prompt {record.prompt!r} does not say what is then true; give 'edited_answer'")


def _adopted(record: Record) -> Change:
    if record.edited_answer is None:
        raise RecordError("its picture was made elsewhere, so what is then true has to be in 'edited_answer'")
    return _as_recorded(record, _edited_thing(record))


def _as_recorded(record: Record, target: Thing) -> Change:
    assert record.edited_answer is not None
    if record.edited_answer == record.answer:
        raise RecordError(f"its answer stays {record.answer!r} after the edit, so the edit asks nothing")
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
    """The thing that a picture made from the record's own prompt differs in: the first that has a box."""
    if record.level == "object":
        return _thing(record, questions.asked_object(record.question))
    boxed = next((one for one in record.things if one.box is not None), None)
    return boxed or _thing(record, record.things[0].name)


def _only(record: Record) -> Thing:
    if len(record.things) == 1:
        return _thing(record, record.things[0].name)
    named = [
        one for one in record.things if questions.place_of(one.name, record.question) < len(record.question)
    ]
    return _thing(record, (named or list(record.things))[-1].name)


def _thing(record: Record, name: str) -> Thing:
    """The thing of that name.

    Raises: RecordError when the record does not have it, or has no box of it.
    """
    found = next((one for one in record.things if one.name.lower() == name.lower()), None)
    if found is None:
        raise RecordError(
            f"{name!r} is not among its objects ({', '.join(one.name for one in record.things)})"
        )
    if found.box is None:
        raise RecordError(f"it has no box for {name!r}")
    return found
