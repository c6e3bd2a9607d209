"""Parse the yes/no questions of V-SEAM, and ask the same about something else."""

import re
from typing import NamedTuple

from hones_eval.editing.problems import RecordError
from hones_eval.editing.vocabulary import COLOURS, GROUPS, MATERIALS, RELATIONS

_FAR = 10_000
_EXISTS = re.compile(r"^(?P<head>(?:is|are) there )(?:(?P<article>an?|any|some|the) )?(?P<name>.+?)"
                     r"(?P<tail> (?:in|on) (?:this|the) (?:picture|image|photo|scene)\?)$", re.I)  # fmt: skip
_MADE = re.compile(r"^(?P<head>(?:is|are) .+? made (?:out )?of )(?P<material>.+?)(?P<tail>\?)$", re.I)
_LAST = re.compile(r"^(?P<head>(?:is|are|does|do) .+ )(?P<word>[\w-]+)(?P<tail>\?)$", re.I)


class Between(NamedTuple):
    """The relation in a question: `before` + subject + `words` + object + `after`."""

    subject: str
    words: str
    thing: str


def category_of(question: str) -> str | None:
    """The category, guessed from the wording of a question, or None."""
    if _MADE.match(question):
        return "material"
    exists = _EXISTS.match(question)
    if exists:
        group = group_of(exists["name"])
        return group or "object"
    last = _LAST.match(question)
    if last and last["word"].lower() in COLOURS:
        return "color"
    relation = next(
        (name for name in sorted(RELATIONS, key=len, reverse=True) if f" {name} " in question), None
    )
    if relation is None:
        return None
    return "spatial" if RELATIONS[relation].kind in ("side", "height", "depth", "near") else "action"


def group_of(name: str) -> str | None:
    """The group of `GROUPS` that a thing's name is in."""
    return next((group for group, members in GROUPS.items() if name.lower() in members), None)


def place_of(name: str, question: str) -> int:
    """The position of a name in a question; a large number if it is not there."""
    match = re.search(rf"\b{re.escape(name)}\b", question, re.I)
    return match.start() if match else _FAR


def asked_object(question: str) -> str:
    """X of "Is there a X in this image?".

    Raises: RecordError when it asks something else.
    """
    match = _EXISTS.match(question)
    if not match:
        raise RecordError(f"{question!r} does not ask whether something is in the image")
    return match["name"]


def asked_colour(question: str) -> str:
    """C of "Is the X C?", as a name of `COLOURS`.

    Raises: RecordError when it asks for no colour that is known.
    """
    match = _LAST.match(question)
    word = match["word"].lower() if match else ""
    if word not in COLOURS:
        raise RecordError(f"{question!r} does not end in a known colour ({', '.join(COLOURS)})")
    return word


def asked_material(question: str) -> str:
    """M of "Is the X made of M?", as the name of its family in `MATERIALS`.

    Raises: RecordError when it asks for no material that is known.
    """
    match = _MADE.match(question)
    word = match["material"].lower() if match else ""
    family = next((name for name, words in MATERIALS.items() if word in words), None)
    if family is None:
        raise RecordError(f"{question!r} does not ask about a known material ({', '.join(MATERIALS)})")
    return family


def asked_relation(question: str, names: list[str]) -> Between:
    """R of "Is the X R the Y?", for X and Y among `names`.

    Raises: RecordError when fewer than two of the names are in the question.
    """
    spans = sorted((place_of(name, question), name) for name in names)
    known = [(place, name) for place, name in spans if place < _FAR]
    if len(known) < 2:
        raise RecordError(
            f"{question!r} is about a relation of two things, but the record names only {names}"
        )
    (start, subject), (end, thing) = known[:2]
    words = re.sub(r"\s+(?:the|an?|his|her|its|their)$", "", question[start + len(subject) : end].strip())
    return Between(subject, words.lower(), thing)


def with_object(question: str, name: str) -> str:
    """Ask for another object."""
    match = _EXISTS.match(question)
    assert match is not None
    article = match["article"]
    if article and article.lower() in ("a", "an"):
        article = article_of(name)
    return match["head"] + (f"{article} " if article else "") + name + match["tail"]


def with_last(question: str, word: str) -> str:
    """Ask for another colour."""
    match = _LAST.match(question)
    assert match is not None
    return match["head"] + word + match["tail"]


def with_material(question: str, material: str) -> str:
    """Ask for another material."""
    match = _MADE.match(question)
    assert match is not None
    return match["head"] + material + match["tail"]


def article_of(name: str) -> str:
    """The indefinite article, a or an."""
    return "an" if name[:1].lower() in "aeiou" else "a"
