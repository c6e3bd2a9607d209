"""The mixin that puts a steering into any lmms-eval model, and lets no failure become an empty answer."""

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, cast, get_args

import torch
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from hones_eval.core.attach import AttachMode, attach_steering
from hones_eval.core.steering import Steering
from hones_eval.engine.prompts import appended
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.margin import answer_tokens, as_text, tokenizer_in, without, words_of
from hones_eval.lmms.call_capture import Call, StandInForGenerate, replaced
from hones_eval.lmms.calls import quiet

from . import registry
from .likelihoods import as_results
from .run_manifest import RunRecord
from .watch import AskedMargin, Failure, WatchedGenerate, WatchedSource, noticing_logged_errors

SEES_BOTH_WAYS = ("paligemma",)
"""Families whose prompts are attended to in both directions: an answer's tokens are of another type there."""


class Steered(lmms):  # type: ignore[misc]  # lmms-eval is untyped
    """Goes in front of a wrapper class of lmms-eval: `class Llava(Steered, LlavaHf)`.

    Without `steering` it is the stock wrapper, answer for answer, save that failures are not swallowed.
    """

    base_wrapper: str
    own_likelihoods = True
    """Whether the base wrapper is asked for log-likelihoods; False where none that work are known."""

    def __init__(
        self,
        steering: str | None = None,
        strength: float = 1.0,
        attach: AttachMode = "hook",
        allow_noop: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the base wrapper, then attach the steering to the Hugging Face model inside it.

        Args:
            steering: a folder or a hub id; none gives the baseline.
            strength: a scale `s` becomes `1 + strength * (s - 1)`.
            attach: `hook` (works with quantized and shared weights) or `fold` (costs nothing at run time).
            allow_noop: do not stop when the steering changes no logit of the first input.
            kwargs: what the base wrapper takes; it refuses what it does not know.

        Raises:
            HonesError: the steering is missing or does not fit, or a value makes no sense.
        """
        if steering is not None and not str(steering).strip():
            raise HonesError(
                "steering= is empty: give a folder or a hub id, or leave it out for the baseline"
            )
        _check_settings(strength, attach, allow_noop)
        loaded = None if steering is None else Steering.load(str(steering))
        base = _class_after(Steered, type(self))
        super().__init__(**(kwargs | _missing_devices(base, kwargs)))
        self._inner = inner_model(self)
        attached = None
        if loaded is not None:
            attached = attach_steering(self._inner, loaded, attach, float(strength))
        must_act = loaded is not None and strength != 0 and not allow_noop
        self._watched = WatchedGenerate(
            self._inner,
            attached,
            reattach=lambda: attach_steering(self._inner, cast(Steering, loaded), attach, float(strength)),
            finish=self.generated,
            must_act=must_act,
        )
        self._inner.__dict__["generate"] = self._watched
        self.record = RunRecord(
            wrapper=self,
            model=self._inner,
            model_args=kwargs,
            steering=loaded,
            settings={"path": steering, "strength": float(strength), "attach": attach},
        )
        registry.latest_record = self.record

    @property
    def fingerprint(self) -> str:
        """The digest of the scales, by which answers in a cache are told apart; empty for the baseline."""
        return "" if self.record.steering is None else self.record.steering.digest

    def generated(self, inputs: Mapping[str, Any], output: Tensor) -> Tensor:
        """What the base wrapper gets to decode; a family whose `generate` adds to it takes that off here."""
        return output

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        """Answer requests as the base wrapper does, or raise HonesError; never an answer for a failure."""
        plain = [i for i, one in enumerate(requests) if _words(one) is None]
        answers = dict(zip(plain, self._in_words([requests[i] for i in plain]), strict=True))
        for i, request in enumerate(requests):
            if i not in answers:
                answers[i] = self._margin(request)
        return [answers[i] for i in range(len(requests))]

    def _in_words(self, requests: list[Instance]) -> list[Any]:
        if not requests:
            return []
        answers = self._answer("generate_until", requests)
        self._watched.check_rows(len(requests), type(self).__name__)
        return answers

    def _margin(self, request: Instance) -> str:
        """The margin of one word over another as text, read from the model's next-token logits."""
        words = _words(request)
        assert words is not None
        self._watched.margin = AskedMargin(tokenizer_in(self), words)
        try:
            said = self._in_words([request])[0]
            value = self._watched.margin.value
        finally:
            self._watched.margin = None
        return str(unwrap_generation_output([said])[0]) if value is None else as_text(value)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        """As `generate_until`, for tasks that ask again."""
        return self._answer("generate_until_multi_round", requests)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """As `generate_until`, for log-likelihoods; see `as_results`.

        They are the base wrapper's own where it has some. Most have none: then a choice's value is the mean
        loss of its tokens behind the prompt that the wrapper generates from, of which lmms-eval's tasks take
        the smallest.
        """
        self.record.add(requests, self.task_dict)
        with self._watched.proving_forward():
            answers = self._likelihoods(requests)
        self._watched.check_ran()
        return as_results(answers)

    def _likelihoods(self, requests: list[Instance]) -> list[Any]:
        if self.own_likelihoods:
            with suppress(NotImplementedError):
                return self._through("loglikelihood", requests)
        shown = tqdm(requests, disable=self.rank != 0, desc="Model Responding")
        return [self._likelihood(request) for request in shown]

    @torch.inference_mode()
    def _likelihood(self, request: Instance) -> tuple[float, bool]:
        prompt = self._prompt(request)
        choice = str(request.args[1]).strip()
        ids = answer_tokens(tokenizer_in(self), prompt["input_ids"][0].tolist(), choice)
        inputs = appended(prompt, ids, int(self._inner.config.model_type in SEES_BOTH_WAYS))
        labels = inputs["input_ids"].clone()
        labels[:, : -len(ids)] = -100  # no loss is taken of the prompt
        logits = self._inner(**inputs, labels=labels).logits[0, -len(ids) - 1 : -1].float()
        target = labels[0, -len(ids) :].to(logits.device)
        return float(cross_entropy(logits, target)), bool((logits.argmax(-1) == target).all())

    def _prompt(self, request: Instance) -> dict[str, Any]:
        """What the base wrapper would generate from, were it asked for an answer in words."""
        text, _, source, *where = request.args
        parts = (text, {}, source) if self.is_simple else (text, partial(_messages, text, source), {})
        asked = Instance("generate_until", (*parts, *where), request.idx, dict(request.metadata))
        stand_in = StandInForGenerate(self._inner, [], with_prompt=True)
        with replaced(self._inner, "generate", stand_in), quiet():
            self._through("generate_until", [asked])
        if len(stand_in.calls) != 1:
            raise HonesError(
                f"{self.base_wrapper}, task {request.task_name}, doc {request.doc_id}: it called generate "
                f"{len(stand_in.calls)} times for one question, so its prompt cannot be told"
            )
        return Call.of(self._inner, stand_in.calls[0]).inputs

    def clean(self) -> None:
        """Take the steering off and let go of the model: lmms-eval calls this when all answers are there."""
        self._watched.detach()
        self.__dict__.pop("_inner", None)
        self.__dict__.pop("_watched", None)
        super().clean()

    def _answer(self, method: str, requests: list[Instance]) -> list[Any]:
        self.record.add(requests, self.task_dict)
        return self._through(method, requests)

    def _through(self, method: str, requests: list[Instance]) -> list[Any]:
        # Some wrappers write into gen_kwargs, and so change the keys under which answers are cached.
        handed = [self._handed(request) for request in requests]
        self._watched.restart()
        try:
            with noticing_logged_errors(self._watched):
                answers = getattr(super(), method)(handed)
        except Failure as failure:
            raise self._failed(failure.error) from failure.error
        except Exception as error:
            if method == "loglikelihood" and isinstance(error, NotImplementedError):
                raise
            raise self._failed(error) from error
        if self._watched.failure is not None:  # swallowed, and logged at most
            raise self._failed(self._watched.failure) from self._watched.failure
        return cast(list[Any], answers)

    def _handed(self, request: Instance) -> Instance:
        handed = copy.copy(request)
        handed.arguments = tuple(
            without(copy.deepcopy(part))
            if isinstance(part, dict)
            else WatchedSource(part, request, self._watched)
            if callable(part)
            else part
            for part in request.args
        )
        return handed

    def _failed(self, error: Exception) -> HonesError:
        where = self._watched.current
        self.record.add_error(where, error)
        name = f"{self.base_wrapper}, task {where[0]}, doc {where[1]}" if where else self.base_wrapper
        kind = "" if isinstance(error, HonesError) else f"{type(error).__name__}: "
        return HonesError(f"{name}: {kind}{' '.join(str(error).split())}")


def _messages(text: str, source: Callable[[Any], Any], doc: Any) -> list[dict[str, Any]]:
    """A question with its pictures as one turn of a chat."""
    shown = [{"type": "image", "url": picture} for picture in source(doc) or []]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def _words(request: Instance) -> tuple[str, str] | None:
    """The two words of a request that asks for a margin."""
    settings = next((part for part in request.args if isinstance(part, dict)), {})
    return words_of(settings, str(request.task_name))


def inner_model(wrapper: lmms) -> PreTrainedModel:
    """The Hugging Face model that a wrapper of lmms-eval calls.

    Raises: HonesError when there is none, or more than one.
    """
    held = [_unwrapped(value) for value in vars(wrapper).values() if isinstance(value, nn.Module)]
    found = {id(model): model for model in held if isinstance(model, PreTrainedModel)}
    if len(found) > 1:
        found = {key: model for key, model in found.items() if model.can_generate()}
    if len(found) != 1:
        kinds = ", ".join(type(model).__name__ for model in found.values()) or "no Hugging Face model"
        raise HonesError(
            f"{type(wrapper).__name__} holds {kinds}: it takes exactly one that generates, to steer it"
        )
    return next(iter(found.values()))


def _unwrapped(module: nn.Module) -> nn.Module:
    while not isinstance(module, PreTrainedModel) and isinstance(getattr(module, "module", None), nn.Module):
        module = cast(nn.Module, module.module)
    return module


def _class_after(mixin: type, cls: type) -> type:
    order = cls.__mro__
    return order[order.index(mixin) + 1]


def _missing_devices(base: type, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Usable values where the base wrapper's own would not be: cpu without CUDA, no empty device_map."""
    parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
    device = str(kwargs.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    missing = {}
    if "device" in parameters and "device" not in kwargs:
        missing["device"] = device
    if "device_map" not in parameters or "device_map" in kwargs:
        return missing
    # With several processes on GPUs an empty device_map asks llava_hf for one process a GPU.
    if device == "cpu" or (parameters["device_map"].default == "" and not several):
        missing["device_map"] = device
    return missing


def _check_settings(strength: object, attach: object, allow_noop: object) -> None:
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise HonesError(f"strength={strength!r} is not a number")
    if attach not in get_args(AttachMode):
        raise HonesError(f"attach={attach!r} is not known: use {' or '.join(get_args(AttachMode))}")
    if not isinstance(allow_noop, bool):
        raise HonesError(f"allow_noop={allow_noop!r} is neither true nor false")
