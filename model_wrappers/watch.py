"""Guards for the calls whose errors base wrappers swallow: `generate`, and the loading of images.

About twenty wrappers of lmms-eval catch every exception of `generate` and answer with an empty string, which
scores as a worse model. Here the first error is kept and raised past the wrapper's `except Exception`. The
same guard proves on the first input that the steering changes the logits, and checks on every input that each
of its edits ran and that no logit is NaN.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, cast

import torch
from lmms_eval.api.instance import Instance
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.core.attach import AttachedSteering
from hones_eval.errors import EditError, HonesError
from hones_eval.lmms.answers.kind import NextTokenReader
from hones_eval.lmms.examples.shown import WITHOUT_IMAGE

from .settings import check_reached, settings_reached

Finish = Callable[[Mapping[str, Any], Tensor], Tensor]

ONE_TOKEN = {
    "max_new_tokens": 1,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}
"""Settings for one greedy token, in place of the task's own."""


Document = tuple[str, Any]


class Failure(BaseException):
    """Carries an error past the `except Exception` of a wrapper that would answer with an empty string."""

    def __init__(self, error: Exception) -> None:
        """Carry `error`."""
        super().__init__(str(error))
        self.error = error


class WatchedGenerate:
    """A replacement of a model's `generate` that keeps errors and checks the steering.

    `failure` is the first error since `restart`. `current` is the task and document whose images or messages
    were last loaded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attached: AttachedSteering | None,
        *,
        reattach: Callable[[], AttachedSteering],
        finish: Finish,
        must_act: bool,
    ) -> None:
        """Guard the `generate` of `model`.

        Args:
            model: the Hugging Face model inside the wrapper.
            attached: the steering, or None for the baseline.
            reattach: attaches the steering again after it was detached for a comparison.
            finish: given a call's keyword arguments and its output, returns what the wrapper decodes.
            must_act: whether a steering that changes no logit of the first input is an error.
        """
        self.failure: Exception | None = None
        self.failed_at: Document | None = None
        self.failed_without_media = False
        self.rows = 0
        self.current: Document | None = None
        self.shown = True
        """Whether the current document has images or other media."""
        self._model = model
        self._generate = cast(Callable[..., Any], model.generate)
        self._attached = attached
        self._reattach = reattach
        self._finish = finish
        self._unproven = must_act
        self.reader: NextTokenReader | None = None
        """Reads the next answer from logits; None where answers are generated in words."""
        self.wanted: Mapping[str, Any] = {}
        """Generation settings that the user gave, which have to reach the model."""
        self.reached: dict[str, dict[str, Any]] = {}
        """By task, the generation settings that reached the model with its first request."""
        self.decided: dict[str, list[list[int]]] = {}
        """By task, for each steering with a condition: on how many prompts it acted, of how many."""
        self._last: tuple[Any, Document | None] = (None, None)
        self._nan_hook = None if attached is None else model.register_forward_hook(self._refuse_nan)
        self._refusing_nan = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; prove on the first call that the steering acts, and check on each that every edit ran."""
        try:
            self._refuse_previous_input(args, kwargs)
            self._check_settings(kwargs)
            if self._unproven:
                self._prove(args, kwargs)
                self._unproven = False
            rows = _row_count(args, kwargs)
            with self.refusing_nan(), self.counting(self.current[0] if self.current else "", rows):
                output = self._generated(args, kwargs)
            self.check_ran()
            if isinstance(output, Tensor):
                output = self._finish(kwargs, output)
        except Exception as error:
            raise self.failed(error) from error
        self.rows += len(output if isinstance(output, Tensor) else output.sequences)
        return output

    @contextmanager
    def counting(self, task: str, rows: int | None = None) -> Iterator[None]:
        """Count the prompts within the block on which steerings with a condition act.

        `rows` is the number of prompts that are given, each of which may become several beams.
        """
        before = [] if self._attached is None else self._attached.decided
        yield
        after = [] if self._attached is None else self._attached.decided
        for i, (now, then) in enumerate(zip(after, before, strict=True)):
            beams = max(1, (now[1] - then[1]) // rows) if rows else 1
            counts = self.decided.setdefault(task, [[0, 0] for _ in after])[i]
            counts[0] += (now[0] - then[0]) // beams
            counts[1] += (now[1] - then[1]) // beams

    def _generated(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.reader is None:
            return self._generate(*args, **kwargs)
        output = self._generate(*args, **(dict(kwargs) | ONE_TOKEN))
        prompt = _prompt_of(args, kwargs)
        if prompt is None:
            raise HonesError(
                "the wrapper passes no input_ids to generate, so no answer can be read from logits"
            )
        self.reader.read(prompt, output.logits[0])
        return output if kwargs.get("return_dict_in_generate") else output.sequences

    def failed(self, error: Exception) -> Failure:
        """Keep an error, and return the Failure to raise for it."""
        if self.failure is None:
            self.failure, self.failed_at = error, self.current
            self.failed_without_media = not self.shown and not isinstance(error, EditError)
        return Failure(error)

    def restart(self) -> None:
        """Clear failures and counts before another batch of requests."""
        self.failure = self.failed_at = None
        self.failed_without_media = False
        self.rows = 0
        self._last = (None, None)

    def check_ran(self) -> None:
        """Raise EditError when an edit of the steering did not run since the last check."""
        if self._attached is not None:
            self._attached.check_ran()

    def check_rows(self, requests: int, name: str) -> None:
        """Raise HonesError when fewer answers were generated than requested: a loading error was swallowed.

        Does nothing while `generate` is replaced by another function, as when inputs are recorded.
        """
        if self.is_installed() and self.rows < requests:
            raise HonesError(
                f"{name} answered {requests - self.rows} of {requests} requests without calling the model; "
                "see its log for what could not be loaded"
            )

    def detach(self) -> None:
        """Detach the steering and restore the model's own `generate`. Safe to call twice."""
        if self._attached is not None:
            self._attached.detach()
        if self._nan_hook is not None:
            self._nan_hook.remove()
        if self.is_installed():
            del self._model.generate

    @contextmanager
    def proving_forward(self) -> Iterator[None]:
        """Prove on the first forward pass within the block that the steering acts."""
        handle = self._model.register_forward_hook(self._prove_forward, with_kwargs=True)
        try:
            with self.refusing_nan():
                yield
        finally:
            handle.remove()

    @contextmanager
    def refusing_nan(self) -> Iterator[None]:
        """Raise Failure within the block when a forward pass of the steered model gives a NaN logit."""
        self._refusing_nan = True
        try:
            yield
        finally:
            self._refusing_nan = False

    def _refuse_nan(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook. Called for every step of decoding, so NaN that begins later is seen as well."""
        logits = getattr(output, "logits", None)
        watching = self._refusing_nan and not self._unproven
        if watching and isinstance(logits, Tensor) and bool(logits.isnan().any()):
            raise self.failed(EditError("the logits are NaN under the steering: lower its strength"))

    def _refuse_previous_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse tensors that were already passed for another document.

        Some wrappers keep the inputs of the previous question when they cannot make those of a question
        without an image, and answer from them.
        """
        prompt = _prompt_of(args, kwargs)
        previous, document = self._last
        self._last = (prompt, self.current)
        if prompt is not None and prompt is previous and document != self.current:
            raise HonesError(
                f"the wrapper passed the inputs of {document and document[1]} again{WITHOUT_IMAGE}"
            )

    def _check_settings(self, kwargs: Mapping[str, Any]) -> None:
        """Check that the user's settings reached the model, and keep those of each task's first request."""
        task = self.current[0] if self.current else ""
        if task not in self.reached:
            self.reached[task] = settings_reached(self._model, kwargs)
        if self.is_installed():
            check_reached(self._model, self.wanted, kwargs)

    def is_installed(self) -> bool:
        """Whether this object is the model's `generate`, and not replaced while inputs are recorded."""
        return self._model.__dict__.get("generate") is self

    def _prove_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._unproven:
            return None
        self._unproven = False
        try:
            self._compare(output.logits, lambda: model(*args, **kwargs).logits)
        except Exception as error:
            raise self.failed(error) from error
        return model(*args, **kwargs)  # with the steering attached again

    def _prove(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._compare(self._next_logits(args, kwargs), lambda: self._next_logits(args, kwargs))

    def _compare(self, steered: Tensor, logits: Callable[[], Tensor]) -> None:
        """Compare steered logits with those of the model while the steering is detached."""
        assert self._attached is not None
        self.check_ran()
        self._attached.detach()
        plain = logits()
        self._attached = self._reattach()
        if torch.equal(steered, plain):
            raise EditError(
                "the steering changes no logit of the first input: its scales are 1, or too close to 1 for "
                f"{steered.dtype}; allow_noop=true runs it anyway"
            )
        if bool(steered.isnan().any()) and not bool(plain.isnan().any()):
            raise EditError("the steering turns the logits of the first input into NaN: lower its strength")

    def _next_logits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        logits: Tensor = self._generate(*args, **(dict(kwargs) | ONE_TOKEN)).logits[0]
        return logits


def _prompt_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The prompt's tokens among the arguments of `generate`."""
    prompt = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
    return prompt if isinstance(prompt, Tensor) else None


def _row_count(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The number of prompts among the arguments of `generate`."""
    prompt = _prompt_of(args, kwargs)
    prompt = kwargs.get("inputs_embeds") if prompt is None else prompt
    return len(prompt) if isinstance(prompt, Tensor) else None


@contextmanager
def noticing_logged_errors(watched: WatchedGenerate) -> Iterator[None]:
    """Treat errors that are logged within the block as failures: wrappers log what they swallow."""

    def notice(message: Any) -> None:
        watched.failed(HonesError(str(message.record["message"])))

    handler = logger.add(notice, level="ERROR")
    try:
        yield
    finally:
        logger.remove(handler)


class WatchedSource:
    """A replacement of a request's `doc_to_visual` or `doc_to_messages` whose loading errors are kept."""

    def __init__(self, source: Callable[..., Any], request: Instance, watched: WatchedGenerate) -> None:
        """Call `source`; `watched` is told which document is being loaded."""
        update_wrapper(self, source)  # some wrappers look at the signature
        self._source = source
        self._document = (str(request.task_name), request.doc_id)
        self._watched = watched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the source. Raises: Failure, which wrappers do not catch."""
        self._watched.current, self._watched.shown = self._document, True
        try:
            content = self._source(*args, **kwargs)
        except Exception as error:
            raise self._watched.failed(error) from error
        self._watched.shown = _has_media(content)
        return content


def _has_media(content: Any) -> bool:
    """Whether a list of visuals, or of messages, contains anything but text."""
    if not isinstance(content, list) or not content:
        return bool(content)
    if not isinstance(content[0], dict) or "role" not in content[0]:
        return True
    parts = [
        part for message in content if not isinstance(message["content"], str) for part in message["content"]
    ]
    return any(part["type"] != "text" for part in parts)
