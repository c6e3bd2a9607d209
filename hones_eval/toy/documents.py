"""The examples of the scenes tasks, generated from seeds: no data files, no network.

Example `i` of a task and example `i` of its edited version have the same prompt; their images differ by one
edit of the scene graph, and so do their answers (the word, box or caption where the task is not a question).
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hones_eval.toy import captions, edits, prompts, questions
from hones_eval.toy.drawing import draw
from hones_eval.toy.scenes import COLORS, SPLIT_SIZE, Scene, SceneError, Split, check_count, scene
from hones_eval.toy.shifts import Shift, shift_image, shift_scene

Task = Literal["vqa_object", "vqa_attribute", "vqa_relation", "ocr", "caption", "retrieval", "grounding"]
KIND_TASKS = {f"vqa_{kind}": kind for kinds in questions.KINDS.values() for kind in kinds}
"""Questions of one kind each: categories within a semantic level."""
Variant = Literal["plain", "edited", "shifted"] | Shift

CANDIDATES = 10  # of a retrieval query: the true caption, that of the edited image, eight from other images
_POOL = 300  # images that a query's hard negatives come from


@dataclass(frozen=True)
class Document:
    """One example. `answer` is the gold answer word for word, `references` all that count as gold.

    `prompt` is what a model is asked, `question` the bare question in it.
    `kind` is the question's kind or the task's name; `query` numbers the retrieval query; `shapes` are the
    things in the image in reading order, `about` the shape that the example asks for (empty where there is
    none).
    """

    pixels: NDArray[np.uint8]  # [64, 64, 3]
    image_id: str
    prompt: str
    question: str
    answer: str
    references: tuple[str, ...]
    level: str
    kind: str
    about: str
    shapes: tuple[str, ...]
    shift: str
    query: int


@dataclass(frozen=True)
class _Asked:
    """A task's question about a scene, and the edited scene with another answer (unchanged if shifted)."""

    prompt: str
    clean: tuple[str, ...]  # gold answers on the clean scene, the first one is the answer
    edited: tuple[str, ...]
    edited_scene: Scene
    level: str
    kind: str
    about: str = ""
    query: int = -1
    question: str = ""


def documents(task: Task | str, variant: Variant, split: Split, count: int) -> list[Document]:
    """The first `count` examples of a task; for retrieval, `CANDIDATES` consecutive examples share an image.

    A task is one of `Task` or of `KIND_TASKS`; the latter skip images without such a question.
    `shifted` applies all shifts in turn, one per image; the name of a shift applies only that shift.

    Raises:
        SceneError: unknown task, variant or split, or more examples than the split has.
    """
    known = (*get_args(Task), *KIND_TASKS)
    if task not in known:
        raise SceneError(f"no scenes task '{task}'; there are {', '.join(known)}")
    shifts = _shifts(variant)
    images = -(-count // CANDIDATES) if task == "retrieval" else count
    check_count(split, images)
    pool = [scene(split, i) for i in range(_POOL)] if task == "retrieval" else []
    made: list[Document] = []
    for index in range(SPLIT_SIZE[split] if task in KIND_TASKS else images):
        shift = shifts[index % len(shifts)]
        base = scene(split, index)
        asked_of = shift_scene(base, shift) if shift else base
        for asked in _asked(task, asked_of, index, pool, editable=shift is None):
            made.append(_document(asked_of, asked, variant == "edited", shift))
        if len(made) >= count:
            break
    if len(made) < count:
        raise SceneError(f"only {len(made)} images of the {split} split have a question of {task}")
    return made[:count]


def _shifts(variant: str) -> tuple[Shift | None, ...]:
    if variant in ("plain", "edited"):
        return (None,)
    every = get_args(Shift)
    if variant == "shifted":
        return every
    if variant not in every:
        raise SceneError(
            f"no variant '{variant}' of scenes; there are plain, edited, shifted, {', '.join(every)}"
        )
    return (variant,)  # type: ignore[return-value]


def _document(clean: Scene, asked: _Asked, edited: bool, shift: Shift | None) -> Document:
    shown = asked.edited_scene if edited else clean
    references = asked.edited if edited else asked.clean
    return Document(
        pixels=shift_image(shown, shift) if shift else draw(shown),
        image_id=_image_id(clean, shown, shift),
        prompt=asked.prompt,
        question=asked.question or asked.prompt,
        answer=references[0],
        references=references,
        level=asked.level,
        kind=asked.kind,
        about=asked.about,
        shapes=tuple(thing.shape for thing in shown.things),
        shift=shift or "",
        query=asked.query,
    )


def _image_id(clean: Scene, shown: Scene, shift: Shift | None) -> str:
    """A unique name per image: its seed, the shift, and a digest of the graph if it was edited."""
    edit = "" if shown == clean else "-edit-" + hashlib.sha256(repr(shown).encode()).hexdigest()[:8]
    return clean.seed + (f"-{shift}" if shift else "") + edit


def _asked(task: str, shown: Scene, index: int, pool: list[Scene], editable: bool) -> Iterator[_Asked]:
    rng = random.Random(f"{task}/{shown.seed}")
    if task == "ocr":
        edited = edits.change_word(shown, rng)
        yield _Asked(prompts.OCR, (shown.word,), (edited.word,), edited, "attribute", "ocr")
    elif task == "caption":
        edited = _recaptioned(shown, rng)
        clean, other = tuple(captions.captions(shown)), tuple(captions.captions(edited))
        yield _Asked(prompts.CAPTION, clean, other, edited, "attribute", "caption")
    elif task == "grounding":
        yield _grounding(shown, rng, editable)
    elif task == "retrieval":
        yield from _retrieval(shown, index, pool, rng)
    else:
        yield from _question(shown, task, index, rng, editable)


def _question(shown: Scene, task: str, index: int, rng: random.Random, editable: bool) -> Iterator[_Asked]:
    """Alternate the question kinds of a level, and yes and no. Kinds that do not fit are skipped."""
    if task in KIND_TASKS:
        kinds: tuple[questions.Kind, ...] = (KIND_TASKS[task],)
    else:
        kinds = questions.KINDS[task.removeprefix("vqa_")]  # type: ignore[index]
    for turn in range(64):
        yes = index // len(kinds) % 2 == 0
        question = questions.ask(shown, kinds[(index + turn) % len(kinds)], rng, yes)
        edited = questions.edit(shown, question, rng) if question and editable else shown
        if question and edited:
            prompt = prompts.VQA.format(question=question.text)
            clean, other = question.answer(shown), question.answer(edited)
            yield _Asked(
                prompt,
                (str(clean),),
                (str(other),),
                edited,
                question.level,
                question.kind,
                question.shape,
                question=question.text,
            )
            return
    if task not in KIND_TASKS:
        raise SceneError(f"scene {shown.seed} has no question of {task} that an edit changes")


def _grounding(shown: Scene, rng: random.Random, editable: bool) -> _Asked:
    """Ask where a thing is. In the edited image it has swapped places with another thing."""
    thing, other = rng.sample(shown.things, 2)
    edited = edits.swap_places(shown, thing.shape, other.shape) if editable else shown
    moved = edited.thing(thing.shape) or thing
    before, after = prompts.locate(thing), prompts.locate(moved)
    return _Asked(
        before.prompt, (before.answer,), (after.answer,), edited, "relation", "grounding", thing.shape
    )


def _retrieval(shown: Scene, index: int, pool: list[Scene], rng: random.Random) -> Iterator[_Asked]:
    """One question per candidate: the clean caption, the edited caption, then hard negatives."""
    edited = _recaptioned(shown, rng)
    clean, other = captions.captions(shown)[0], captions.captions(edited)[0]
    negatives = [n for n in captions.hard_negatives(shown, pool, CANDIDATES) if n not in (clean, other)]
    for caption in (clean, other, *negatives[: CANDIDATES - 2]):
        prompt = prompts.judge(caption, True).prompt
        answers = ("Yes" if caption == clean else "No",), ("Yes" if caption == other else "No",)
        yield _Asked(prompt, *answers, edited, "attribute", "retrieval", query=index)


def _recaptioned(shown: Scene, rng: random.Random) -> Scene:
    """The scene with one colour changed, which every caption names."""
    thing = rng.choice(shown.things)
    color = rng.choice([color for color in COLORS if color != thing.color])
    return edits.set_attribute(shown, thing.shape, "color", color)
