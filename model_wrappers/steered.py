"""The mixin that steers any lmms-eval model, and never lets a failure become an empty answer."""

import copy
import inspect
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast, get_args

import torch
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import CacheHook, lmms
from loguru import logger
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hones_eval.core.adapters import apply_adapter, model_source, without_adapter
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import AttachedSteering, AttachMode, Part, attach_parts
from hones_eval.core.scope import Scope
from hones_eval.core.steering import Steering
from hones_eval.core.unwrapping import held_model
from hones_eval.core.weights import weights_digest
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.kind import NextTokenReader, settings_of
from hones_eval.lmms.answers.registry import plain_settings, reader_of
from hones_eval.lmms.answers.tokens import tokenizer_of
from hones_eval.lmms.arguments import check_arguments, parsed
from hones_eval.lmms.chat_text import with_context
from hones_eval.lmms.examples.shown import WITHOUT_IMAGE

from . import registry
from .likelihoods import as_results, likelihood, recorded_prompt
from .run_manifest import RunRecord
from .settings import ends_at, refuse_contradiction, until
from .steering_parts import named_steerings, number
from .watch import Failure, WatchedGenerate, WatchedSource, noticing_logged_errors


class Steered(lmms):  # type: ignore[misc]  # lmms-eval is untyped
    """A mixin before a wrapper class of lmms-eval: `class Llava(Steered, LlavaHf)`.

    Without `steering` it gives the answers of the stock wrapper, except that failures are not swallowed.
    """

    base_wrapper: str
    own_likelihoods = True
    """Whether the base wrapper has log-likelihoods that work."""

    def __init__(
        self,
        steering: str | None = None,
        strength: float | list[float] = 1.0,
        attach: AttachMode = "hook",
        scope: str | list[str] = "all",
        condition: str | list[str | None] | None = None,
        allow_noop: bool = False,
        peft: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the base wrapper, then attach the steering to the Hugging Face model inside it.

        Args:
            steering: a folder or a hub id; None is the baseline. Several joined by +, each with a strength
                after a colon, act at once, as in runs/a:0.5+runs/b.
            strength: a scale `s` becomes `1 + strength * (s - 1)`.
            attach: `hook` (works with quantized and shared weights) or `fold` (no cost at run time).
            scope: the tokens that the steering acts on: all, prompt, image, text, last, generated, or several
                joined by +, as in image+last.
            condition: the prompts that the steering acts on: a folder that hones-eval condition wrote,
                !FOLDER for all others, several joined by + that all have to hold, or re:PATTERN, a regular
                expression on the prompt. With several steerings, strength, scope and condition may be lists
                with one value for each.
            allow_noop: run a steering that changes no logit of the first input.
            peft: the folder or hub id of a PEFT adapter, such as a LoRA, to load onto the base model;
                `org/name@revision` names a revision. With attach=fold it is merged into the weights first.
            kwargs: arguments of the base wrapper, which refuses unknown ones.

        Raises:
            HonesError: the steering is missing or does not fit, or a value is invalid.
        """
        if steering is not None and not str(steering).strip():
            raise HonesError(
                "steering= is empty: give a folder or a hub id, or leave it out for the baseline"
            )
        _check_settings(attach, allow_noop)
        if steering is None:
            number(strength)
            _refuse_without_steering(strength, scope, condition)
        check_arguments(type(self), kwargs | {"peft": peft}, self.base_wrapper)
        named = None if steering is None else named_steerings(str(steering), strength, scope, condition)
        base = _class_after(Steered, type(self))
        kwargs = without_adapter(kwargs if peft is None else kwargs | {"peft": peft})
        peft = kwargs.pop("peft", None)
        super().__init__(**(kwargs | _missing_devices(base, kwargs)))
        self._inner = inner_model(self)
        apply_adapter(self._inner, peft, kwargs.get("pretrained"), merge=attach == "fold")
        weights = weights_digest(self._inner)  # before a steering is folded in
        attached, must_act, parts = None, False, list[Part]()
        if named is not None:
            named = named.with_tokenizer(tokenizer_of(self)) if named.conditions else named
            parts = named.parts
            _tell_of_overlap(named.whole)
            attached = _attached(self._inner, parts, attach)
            must_act = named.acts_on_prompts and named.strength != 0 and not allow_noop
        self._acts_everywhere = all(part.acts_everywhere for part in parts)
        self._watched = WatchedGenerate(
            self._inner,
            attached,
            reattach=lambda: attach_parts(Anatomy.of(self._inner), parts, attach, self._inner),
            finish=self.generated,
            must_act=must_act,
        )
        self._watched.wanted = registry.wanted_settings
        self._inner.__dict__["generate"] = self._watched
        self.record = RunRecord(
            wrapper=self,
            model=self._inner,
            model_args=kwargs,
            steering=None if named is None else named.whole,
            settings={
                "path": steering,
                "strength": 1.0 if named is None else named.strength,
                "attach": attach,
                "scope": "all" if named is None else named.scope,
                "condition": "none" if named is None else named.condition,
                "condition_digests": [] if named is None else named.conditions,
            },
            weights=weights,
        )
        self.record.generation = self._watched.reached
        self.record.decided = self._watched.decided
        registry.latest_record = self.record

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """Build the model from a `--model_args`. Raises: HonesError where it cannot be parsed."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(given | parsed(arg_string)))

    @property
    def fingerprint(self) -> str:
        """The key of cached answers: digests of weights, scales and conditions, and the hub's commits."""
        steering, source = self.record.steering, model_source(self._inner)
        commits = [commit for commit in (source["revision"], source["adapter_revision"]) if commit]
        scales = [] if steering is None else [steering.digest]
        return "-".join([self.record.weights, *commits, *scales, *self.record.condition_digests])

    def generated(self, inputs: Mapping[str, Any], output: Tensor) -> Tensor:
        """The output of `generate` that the base wrapper decodes; a family may change it here."""
        return output

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        """Answer requests as the base wrapper does, or as their kind of answer is read from logits.

        Raises: HonesError naming task and document; a failure never becomes an answer.
        """
        for request in requests:
            refuse_contradiction(self._watched.wanted, settings_of(request))
        readers = {i: reader_of(request, self) for i, request in enumerate(requests)}
        in_words = [i for i, reader in readers.items() if reader is None]
        answers = dict(zip(in_words, self._in_words([requests[i] for i in in_words]), strict=True))
        for i, reader in readers.items():
            if reader is not None:
                answers[i] = self._read_answer(reader, requests[i])
        return [answers[i] for i in range(len(requests))]

    def _in_words(self, requests: list[Instance]) -> list[Any]:
        if not requests:
            return []
        self._check_until(requests)
        answers = self._answer("generate_until", requests)
        self._watched.check_rows(len(requests), type(self).__name__)
        return answers

    def _check_until(self, requests: list[Instance]) -> None:
        """Find out for each task with `until` whether the wrapper ends answers there, and record it.

        Raises: HonesError when the user gave `until` and the wrapper ignores it.
        """
        for request in requests:
            task, stops = str(request.task_name), until(settings_of(request))
            if not stops or task in self.record.until or not self._watched.is_installed():
                continue
            obeyed = ends_at(self._inner, tokenizer_of(self), self._asked, request, stops[0])
            self.record.until[task] = {"strings": stops, "obeyed": obeyed}
            if obeyed is False and "until" in self._watched.wanted:
                raise HonesError(
                    f"--gen_kwargs until={stops}: {self.base_wrapper} does not end answers there; leave it "
                    "out, or use --model hones_hf, which does"
                )
            if obeyed is False:
                logger.warning(
                    f"{self.base_wrapper} ignores until={stops} of task {task}, so its answers are not "
                    "comparable with those of a wrapper that obeys it; the run manifest says so"
                )

    def _asked(self, requests: list[Instance]) -> list[Any]:
        """Answers of the base wrapper to requests that are not part of the run; they are not cached."""
        cache = getattr(self, "cache_hook")  # noqa: B009  lmms-eval does not declare it
        self.cache_hook = CacheHook(None)
        try:
            return self._through("generate_until", requests)
        finally:
            self.cache_hook = cache

    def _read_answer(self, reader: NextTokenReader, request: Instance) -> str:
        """The answer that a reader reads from the logits of the request's `generate`.

        While inputs are recorded, `generate` is replaced and nothing is read. Then the wrapper's own answer
        is returned.
        """
        self._watched.reader = reader
        try:
            output = self._in_words([request])[0]
        finally:
            self._watched.reader = None
        return str(unwrap_generation_output([output])[0]) if reader.text is None else reader.text

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        """Answer requests of tasks with several rounds, as the base wrapper does."""
        return self._answer("generate_until_multi_round", requests)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Log-likelihoods of choices by the base wrapper, or where it has none by `likelihood`."""
        self.record.add(requests, self.task_dict)
        try:
            with self._watched.proving_forward():
                answers = self._likelihoods(requests)
        except Failure as failure:  # raised in a forward pass outside the base wrapper
            raise self._failed(failure.error) from failure.error
        self._watched.check_ran()
        return as_results(answers)

    def _likelihoods(self, requests: list[Instance]) -> list[Any]:
        if self.own_likelihoods and self._acts_everywhere:
            with suppress(NotImplementedError):
                return self._through("loglikelihood", requests)
        bar = tqdm(requests, disable=self.rank != 0, desc="Model Responding")
        return [self._likelihood(request) for request in bar]

    def _likelihood(self, request: Instance) -> tuple[float, bool]:
        prompt = recorded_prompt(self._inner, self._asked, request, simple=self.is_simple)
        with self._watched.counting(str(request.task_name)):
            return likelihood(self._inner, tokenizer_of(self), prompt, str(request.args[1]).strip())

    def clean(self) -> None:
        """Detach the steering and release the model; lmms-eval calls this after the last answer."""
        self._watched.detach()
        self.__dict__.pop("_inner", None)
        self.__dict__.pop("_watched", None)
        super().clean()

    def _answer(self, method: str, requests: list[Instance]) -> list[Any]:
        self.record.add(requests, self.task_dict)
        return self._through(method, requests)

    def _through(self, method: str, requests: list[Instance]) -> list[Any]:
        """Answer requests by a method of the base wrapper. Raises: HonesError for any failure inside it."""
        guarded = [self._guarded(request) for request in requests]
        self._watched.restart()
        try:
            with noticing_logged_errors(self._watched):
                answers = getattr(super(), method)(guarded)
        except Failure as failure:
            raise self._failed(failure.error) from failure.error
        except Exception as error:
            if method == "loglikelihood" and isinstance(error, NotImplementedError):
                raise
            self._watched.failed(error)
            raise self._failed(error) from error
        if self._watched.failure is not None:  # swallowed by the wrapper
            raise self._failed(self._watched.failure) from self._watched.failure
        return cast(list[Any], answers)

    def _guarded(self, request: Instance) -> Instance:
        """A copy of a request whose sources are watched.

        Its settings are copied too: some wrappers modify them, which would change lmms-eval's cache keys.
        """
        request = with_context(request)
        guarded = copy.copy(request)
        guarded.arguments = tuple(
            plain_settings(copy.deepcopy(part))
            if isinstance(part, dict)
            else WatchedSource(part, request, self._watched)
            if callable(part)
            else part
            for part in request.args
        )
        return guarded

    def _failed(self, error: Exception) -> HonesError:
        where = self._watched.failed_at or self._watched.current
        self.record.add_error(where, error)
        name = f"{self.base_wrapper}, task {where[0]}, doc {where[1]}" if where else self.base_wrapper
        kind = "" if isinstance(error, HonesError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split())
        if self._watched.failed_without_media and "hones_hf" not in (self.base_wrapper, *message.split()):
            message += WITHOUT_IMAGE
        return HonesError(f"{name}: {kind}{message}")


def _tell_of_overlap(steering: Steering) -> None:
    """Log how many sites more than one of several steerings scales."""
    settings = steering.provenance.settings
    counts = [settings.get(f"{kind}_scaled_by_several", 0) for kind in ("heads", "neurons")]
    if any(counts):
        logger.warning(
            f"{counts[0]} heads and {counts[1]} neurons are scaled by more than one of "
            f"{', '.join(settings['parts'])}: their scales are multiplied"
        )


def inner_model(wrapper: lmms) -> PreTrainedModel:
    """The Hugging Face model that a wrapper of lmms-eval calls.

    Raises: HonesError when there is none, or more than one.
    """
    held = [held_model(value) for value in vars(wrapper).values()]
    found = {id(model): model for model in held if model is not None}
    if len(found) > 1:
        found = {key: model for key, model in found.items() if model.can_generate()}
    if len(found) != 1:
        kinds = ", ".join(type(model).__name__ for model in found.values()) or "no Hugging Face model"
        raise HonesError(
            f"{type(wrapper).__name__} holds {kinds}; exactly one model that generates is needed to steer it"
        )
    return next(iter(found.values()))


def _attached(model: PreTrainedModel, parts: list[Part], attach: AttachMode) -> AttachedSteering:
    """Attach steerings and log their warnings: many wrappers switch Python's warnings off on import."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached = attach_parts(Anatomy.of(model), parts, attach, model)
    for warning in caught:
        logger.warning(str(warning.message))
    return attached


def _class_after(mixin: type, cls: type) -> type:
    order = cls.__mro__
    return order[order.index(mixin) + 1]


def _missing_devices(base: type, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Values for defaults of the base wrapper that fail: CUDA where there is none, an empty device_map."""
    parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
    device = str(kwargs.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    missing = {}
    if "device" in parameters and "device" not in kwargs:
        missing["device"] = device
    if "device_map" not in parameters or "device_map" in kwargs:
        return missing
    # With several processes on GPUs an empty device_map makes llava_hf use one GPU per process.
    if device == "cpu" or (parameters["device_map"].default == "" and not several):
        missing["device_map"] = device
    return missing


def _refuse_without_steering(strength: object, scope: object, condition: object) -> None:
    """Refuse a strength, a scope and a condition of no steering. Raises: HonesError."""
    if isinstance(strength, list) or number(strength) != 1:
        raise HonesError(f"strength={strength} says how strongly a steering acts: give steering= too")
    if isinstance(scope, list) or not Scope.parse(scope).is_all:  # type: ignore[arg-type]  # checked there
        raise HonesError(f"scope={scope} says where a steering acts: give steering= too")
    if condition is not None:
        raise HonesError(f"condition={condition} says when a steering acts: give steering= too")


def _check_settings(attach: object, allow_noop: object) -> None:
    if attach not in get_args(AttachMode):
        raise HonesError(f"attach={attach!r} is unknown: use {' or '.join(get_args(AttachMode))}")
    if not isinstance(allow_noop, bool):
        raise HonesError(f"allow_noop={allow_noop!r} should be true or false")
