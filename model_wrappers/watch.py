"""Watch over the calls that a base wrapper swallows errors of: `generate`, and the loading of pictures."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, cast

import torch
from lmms_eval.api.instance import Instance
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hones_eval.core.attach import AttachedSteering
from hones_eval.errors import EditError, HonesError
from hones_eval.lmms.answers.margin import margin_behind

Finish = Callable[[Mapping[str, Any], Tensor], Tensor]

# One greedy token from the same inputs, whatever the task asked for.
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


class Failure(BaseException):
    """Carries an error past the `except Exception` of a wrapper that would answer with an empty string."""

    def __init__(self, error: Exception) -> None:
        """`error` is what happened."""
        super().__init__(str(error))
        self.error = error


class AskedMargin:
    """A margin between two words that the next call of `generate` is to be read for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: tuple[str, str]) -> None:
        """`value` is None until a call has been read."""
        self.value: float | None = None
        self._tokenizer, self._words = tokenizer, words

    def read(self, prompt: Tensor, logits: Tensor) -> None:
        """Read it from the logits [1, vocabulary] behind a prompt [1, tokens].

        Raises: HonesError when there is more than one row, or the margin is not finite.
        """
        if len(prompt) != 1 or len(logits) != 1:
            raise HonesError(f"a margin is read of one prompt at a time, not of {len(prompt)}")
        between = margin_behind(self._tokenizer, prompt[0].tolist(), self._words)
        self.value = float(between.of(logits[0]))
        if not math.isfinite(self.value):
            raise HonesError(f"the margin between {' and '.join(self._words)} is {self.value}")


class WatchedGenerate:
    """Stands in for a model's `generate`: the same call, but it fails loudly and checks the steering.

    `failure` is the first error since `restart`, `current` the task and document that were last asked for.
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
        """`reattach` puts the steering back on; `must_act` asks that it changes the first call's logits."""
        self.failure: Exception | None = None
        self.rows = 0
        self.current: tuple[str, Any] | None = None
        self._model = model
        self._generate = cast(Callable[..., Any], model.generate)
        self._attached = attached
        self._reattach = reattach
        self._finish = finish
        self._unproven = must_act
        self.margin: AskedMargin | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, prove on the first call that the steering acts, and check that every edit ran."""
        try:
            if self._unproven:
                self._prove(args, kwargs)
                self._unproven = False
            output = self._generated(args, kwargs)
            self.check_ran()
            if isinstance(output, Tensor):
                output = self._finish(kwargs, output)
        except Exception as error:
            raise self.failed(error) from error
        self.rows += len(output if isinstance(output, Tensor) else output.sequences)
        return output

    def _generated(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.margin is None:
            return self._generate(*args, **kwargs)
        output = self._generate(*args, **(dict(kwargs) | ONE_TOKEN))
        prompt = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        if not isinstance(prompt, Tensor):
            raise HonesError("the wrapper hands no input_ids to generate, so no margin can be read")
        self.margin.read(prompt, output.logits[0])
        return output if kwargs.get("return_dict_in_generate") else output.sequences

    def failed(self, error: Exception) -> Failure:
        """Remember an error and make the Failure to raise for it."""
        if self.failure is None:
            self.failure = error
        return Failure(error)

    def restart(self) -> None:
        """Forget failures and counts, before another batch of requests."""
        self.failure = None
        self.rows = 0

    def check_ran(self) -> None:
        """Raise EditError when an edit of the steering did not run since the last check."""
        if self._attached is not None:
            self._attached.check_ran()

    def check_rows(self, requests: int, name: str) -> None:
        """Raise HonesError when fewer answers were generated than asked for: a loading error was swallowed.

        Does nothing while somebody else's function stands in for `generate`, as when inputs are recorded.
        """
        if self._model.__dict__.get("generate") is self and self.rows < requests:
            raise HonesError(
                f"{name} answered {requests - self.rows} of {requests} requests without calling the model: "
                "its log says which it could not load"
            )

    def detach(self) -> None:
        """Take the steering off and give the model its own `generate` back. Safe to call twice."""
        if self._attached is not None:
            self._attached.detach()
        if self._model.__dict__.get("generate") is self:
            del self._model.generate

    @contextmanager
    def proving_forward(self) -> Iterator[None]:
        """Prove on the first forward pass within the block that the steering acts; nothing is generated."""
        handle = self._model.register_forward_hook(self._prove_forward, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _prove_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._unproven:
            return None
        self._unproven = False
        try:
            self._compare(output.logits, lambda: model(*args, **kwargs).logits)
        except Exception as error:
            raise self.failed(error) from error
        return model(*args, **kwargs)  # the steering is on again, and its edits have run

    def _prove(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._compare(self._next_logits(args, kwargs), lambda: self._next_logits(args, kwargs))

    def _compare(self, steered: Tensor, logits: Callable[[], Tensor]) -> None:
        """Compare steered logits with those that the model gives while the steering is off."""
        assert self._attached is not None
        self.check_ran()
        self._attached.detach()
        plain = logits()
        self._attached = self._reattach()
        if torch.equal(steered, plain):
            raise EditError(
                "the steering changes no logit of the first input: its scales are 1, or too near to 1 for "
                f"{steered.dtype}; allow_noop=true runs it all the same"
            )
        if bool(steered.isnan().any()) and not bool(plain.isnan().any()):
            raise EditError("the steering turns the logits of the first input into NaN: lower its strength")

    def _next_logits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        logits: Tensor = self._generate(*args, **(dict(kwargs) | ONE_TOKEN)).logits[0]
        return logits


@contextmanager
def noticing_logged_errors(watched: WatchedGenerate) -> Iterator[None]:
    """Take what is logged as an error within the block for a failure: wrappers log what they swallow."""

    def notice(message: Any) -> None:
        watched.failed(HonesError(str(message.record["message"])))

    handler = logger.add(notice, level="ERROR")
    try:
        yield
    finally:
        logger.remove(handler)


class WatchedSource:
    """Stands in for a request's `doc_to_visual` or `doc_to_messages`: what cannot be loaded is an error."""

    def __init__(self, source: Callable[..., Any], request: Instance, watched: WatchedGenerate) -> None:
        """`watched` learns which document is being asked for."""
        update_wrapper(self, source)  # some wrappers look at the signature
        self._source = source
        self._document = (str(request.task_name), request.doc_id)
        self._watched = watched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the source; a failure is not to be swallowed."""
        self._watched.current = self._document
        try:
            return self._source(*args, **kwargs)
        except Exception as error:
            raise self._watched.failed(error) from error
