"""Every family through lmms-eval's door: which wrapper serves it, and what was found to hold there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import families
import plain
import torch
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head
from hones_eval.engine.passes import ROUNDING, replaced_by_mean
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.call_capture import Call
from hones_eval.lmms.models import inner_model
from hones_eval.lmms.playback import Playback

NEW_TOKENS = 5
SETTINGS = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": 2, "do_sample": False}
WITHOUT_GENERIC = ("instructblip",)


class Door(NamedTuple):
    """A family, the name after ``--model``, and the arguments beside ``pretrained=``."""

    family: str
    model: str
    arguments: str

    @property
    def stock(self) -> str | None:
        """lmms-eval's own wrapper behind the door, if it is not ours."""
        return families.WRAPPERS[self.family][0] if self.model == "hones" else None


DOORS = [
    *(Door(name, "hones_hf", "dtype=float32") for name in families.NAMES if name not in WITHOUT_GENERIC),
    *(
        Door(name, "hones", f"base={wrapper},{arguments}")
        for name, (wrapper, arguments) in families.WRAPPERS.items()
    ),
]


class Question(NamedTuple):
    """What a document asks about which pictures."""

    text: str
    pictures: tuple[Image.Image, ...]


def draw(colour: str, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse([4, 4, size[0] // 2, size[1] // 2], fill=colour)
    return picture


RED, BLUE = draw("red", (64, 48)), draw("blue", (40, 90))
QUESTIONS = [
    Question("What color is the circle?", (RED,)),
    Question("Is it a dog or a cat? Answer with a short phrase.", (BLUE,)),
    Question("How many?", (RED,)),
]
BOTH = Question("What color is it?", (RED, BLUE))


@dataclass
class Visit:
    """A family's checkpoint and steering behind one door; models are built when asked for."""

    door: Door
    checkpoint: Path
    steering: Path

    def build(self, *more: str, batch_size: int = 1, model: str | None = None) -> lmms:
        """The model of the door (or lmms-eval's ``model``), as the command builds it."""
        arguments = self.door.arguments
        if model is not None:
            arguments = arguments.removeprefix(f"base={self.door.stock},")
        text = ",".join([f"pretrained={self.checkpoint}", arguments, *more])
        return get_model(model or self.door.model).create_from_arg_string(text, {"batch_size": batch_size})

    @cached_property
    def baseline(self) -> lmms:
        return self.build()

    @cached_property
    def unsteered(self) -> list[str]:
        return ask(self.baseline, QUESTIONS)

    @cached_property
    def steered(self) -> list[str]:
        return ask(self.build(f"steering={self.steering}"), QUESTIONS)

    @cached_property
    def model(self) -> PreTrainedModel:
        return inner_model(self.baseline)

    @cached_property
    def calls(self) -> list[Call]:
        """What the wrapper hands to ``generate`` for each question."""
        return [record(self.baseline, one) for one in QUESTIONS]

    @cached_property
    def plain_model(self) -> PreTrainedModel:
        """The checkpoint as transformers alone loads it, in the type that the wrapper has."""
        attention = (
            {} if self.door.stock is None else {"attn_implementation": self.model.config._attn_implementation}
        )
        return AutoModelForImageTextToText.from_pretrained(
            self.checkpoint, dtype=self.model.dtype, **attention
        ).eval()

    def plainly(self, questions: Sequence[Question]) -> list[str]:
        """Answers by transformers alone: of the tests' own prompts, or of a stock wrapper's inputs."""
        if self.door.stock is None:
            recipe = families.RECIPES[self.door.family](False)
            if self.door.family == "llava_onevision":
                # A flat list would cut each of several pictures into tiles, as if it were the only one.
                recipe = recipe._replace(pictures_by_prompt=True)
            family = families.Family(self.door.family, self.plain_model, recipe.processor, recipe)
            made = [Call(family.inputs(one.text, one.pictures), SETTINGS) for one in questions]
        else:
            made = [record(self.baseline, one) for one in questions]
        return [self._generated(call) for call in made]

    def _generated(self, call: Call) -> str:
        output = self.plain_model.generate(**call.inputs, **call.settings)
        new = output[0, call.inputs["input_ids"].shape[1] :]
        return self.baseline.tokenizer.decode(new, skip_special_tokens=True).strip()


def ask(lm: lmms, questions: Sequence[Question]) -> list[str]:
    """The answers of an lmms-eval model, all asked in one call."""
    lm.task_dict["circles"] = {"test": list(questions)}
    requests = [request(lm, one, i) for i, one in enumerate(questions)]
    return [unwrap_generation_output(one)[0].strip() for one in lm.generate_until(requests)]


def record(lm: lmms, question: Question) -> Call:
    lm.task_dict["circles"] = {"test": [question]}
    return Playback(lm).record(request(lm, question, 0))


def request(lm: lmms, question: Question, index: int) -> Instance:
    ways: dict[bool, tuple[Any, ...]] = {
        True: (question.text, dict(SETTINGS), lambda one: list(one.pictures)),
        False: (question.text, as_messages, dict(SETTINGS)),
    }
    arguments = (*ways[lm.is_simple], index, "circles", "test")
    return Instance("generate_until", arguments, index, {"task": "circles", "doc_id": index, "repeats": 1})


def choice(lm: lmms, question: Question, text: str) -> Instance:
    """The request of one choice of a question, which lmms-eval asks in the simple form alone."""
    lm.task_dict["circles"] = {"test": [question]}
    arguments = (question.text, f" {text}", lambda one: list(one.pictures), 0, "circles", "test")
    return Instance("loglikelihood", arguments, 0, {"task": "circles", "doc_id": 0, "repeats": 1})


def losses(lm: lmms, requests: Sequence[Instance]) -> list[float]:
    lm.task_dict["circles"] = {"test": [QUESTIONS[0]]}
    return [unwrap_generation_output(one)[0][0] for one in lm.loglikelihood(list(requests))]


def forced_loss(model: PreTrainedModel, prompt: Mapping[str, Any], ids: Sequence[int]) -> float:
    """The mean loss of some tokens as ``generate`` gives one after the other."""
    length = prompt["input_ids"].shape[1]
    told = model.generate(
        **prompt,
        max_new_tokens=len(ids),
        do_sample=False,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda _, said: [ids[len(said) - length]],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert told.sequences[0, length:].tolist() == list(ids)
    steps = zip(told.logits, ids, strict=True)
    return -sum(float(step[0].float().log_softmax(-1)[token]) for step, token in steps) / len(ids)


def as_messages(question: Question) -> list[dict[str, Any]]:
    shown = [{"type": "image", "url": picture} for picture in question.pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question.text}]}]


@contextmanager
def overhearing(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every call of ``model.generate`` inside."""
    heard: list[dict[str, Any]] = []
    before = model.__dict__["generate"]

    def generate(**arguments: Any) -> Any:
        heard.append(arguments)
        return before(**arguments)

    model.__dict__["generate"] = generate
    try:
        yield heard
    finally:
        model.__dict__["generate"] = before


def padding_difference(model: PreTrainedModel, batch: Mapping[str, Any], alone: Sequence[Call]) -> float:
    """Largest relative difference of logits between a batch padded on the left and its rows alone."""
    mask = batch["attention_mask"]
    assert (mask[:, 0] == 0).any()
    assert (mask[:, -1] == 1).all()
    together = next_logits(model, _inputs(batch))
    worst = 0.0
    for row, ids in enumerate(batch["input_ids"]):
        said = ids[mask[row].bool()].tolist()
        (call,) = [one for one in alone if _said(one) == said]
        worst = max(worst, relative(together[row : row + 1], next_logits(model, call.inputs)))
    return worst


def _said(call: Call) -> list[int]:
    """The tokens of a single question; some wrappers pad even those."""
    return call.inputs["input_ids"][call.inputs["attention_mask"].bool()].tolist()


def _inputs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    settings = {"inputs", "use_cache"}
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor) and k not in settings}


def replay_difference(model: PreTrainedModel, inputs: Mapping[str, Any]) -> float:
    """Largest difference of logits between replay and a plain hooked forward, over all heads, relative."""
    replayer = Replayer(Anatomy.of(model))
    passes = replayer.record(inputs, 1)
    assert replayer.inexact is None, replayer.inexact
    edits = plain.all_heads(model)
    worst = 0.0
    for rows in passes.edited(replaced_by_mean([Head(edit.layer, edit.site) for edit in edits])):
        for edit, logits in zip(rows.edits, rows.logits, strict=True):
            expected = plain.forward(model, inputs, plain.Edit(*edit.site)).logits[-1:]
            worst = max(worst, relative(logits, expected))
    return worst


@torch.no_grad()
def next_logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Logits [rows, vocabulary] of the first token of each answer, by ``generate``."""
    told = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return told.logits[0].float()


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max())


def within(difference: float, model: PreTrainedModel) -> bool:
    """Whether rounding explains a relative difference of logits in the type that a model has."""
    return difference <= ROUNDING[model.dtype]
