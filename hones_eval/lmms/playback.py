"""Records what an lmms-eval model passes to its Hugging Face model, and plays chosen tokens back through it.

Both directions replace a method of the inner model by a stand-in and call the wrapper's own method. Recording
keeps the arguments of `generate`; playing back returns tokens that were chosen elsewhere and gives the answer
that the wrapper makes of them. So prompts, images and post-processing are the wrapper's own, for every
wrapper, without prompt code here. Log-likelihoods are recorded in the same way from `forward`.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from loguru import logger
from transformers import PreTrainedModel

from hones_eval.engine.prompts import started
from hones_eval.errors import HonesError, TaskError, one_line
from hones_eval.lmms.answers.registry import plain_settings
from hones_eval.lmms.call_capture import Call, CountedForward, StandInForForward, StandInForGenerate, replaced
from hones_eval.lmms.calls import quiet
from hones_eval.lmms.models import inner_model


class Playback:
    """Records the calls of one lmms-eval model, and plays tokens back through its decoding."""

    def __init__(self, lmm: lmms) -> None:
        """Record `lmm`; it is changed only during a call."""
        self.lmm = lmm
        self.model = inner_model(lmm)
        self._cuts_prompt: bool | None = None

    @property
    def wrapper_name(self) -> str:
        """The wrapper's class, as messages name it."""
        return type(self.lmm).__name__

    def record(self, instance: Instance) -> Call:
        """The arguments of `generate` for one request, without a forward pass.

        Raises: TaskError when the request fails, does not call `generate` exactly once, or does not decode
            greedily.
        """
        arguments, _ = self._through(instance, self._end(), with_prompt=True)
        call = Call.of(self.model, arguments)
        _must_be_greedy(self.model, call.settings, instance)
        return call._replace(inputs=started(self.model, call.inputs))

    def decode(self, instance: Instance, token_ids: Sequence[int]) -> str:
        """The answer that the wrapper makes of generated tokens.

        `generate` of decoder-only models returns the prompt before the answer. A wrapper that does not remove
        the prompt is given the new tokens alone, so that its answer is the answer.
        """
        if self._cuts_prompt is None:
            _, nothing = self._through(instance, self._end(), with_prompt=True)
            self._cuts_prompt = not nothing.strip()
        return self._through(instance, list(token_ids), with_prompt=self._cuts_prompt)[1]

    def record_forward(self, instance: Instance) -> dict[str, Any]:
        """The arguments of `forward` for one log-likelihood request, without a forward pass.

        Raises: TaskError when the request fails or does not call `forward` exactly once.
        """
        forward = StandInForForward(self.model)
        self._ask("loglikelihood", instance, "forward", forward)
        return forward.calls[0]

    def log_likelihood(self, instance: Instance) -> float:
        """The value that the wrapper itself returns for a log-likelihood request, by a forward pass."""
        output = self._ask("loglikelihood", instance, "forward", CountedForward(self.model))
        return float(_pair(output)[0])

    def finds_greedy(self, instance: Instance, late: int) -> bool:
        """Whether the wrapper calls a choice greedy when the model is certain of each token.

        The model is certain at the position that predicts a token (`late` 0), or at the token's own (1).
        """
        forward = StandInForForward(self.model, sure=late)
        output = self._ask("loglikelihood", instance, "forward", forward)
        return bool(_pair(output)[1])

    def _end(self) -> list[int]:
        end = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return [] if end is None else [end] if isinstance(end, int) else list(end[:1])

    def _through(
        self, instance: Instance, token_ids: list[int], *, with_prompt: bool
    ) -> tuple[dict[str, Any], str]:
        """Send one request through `generate_until` with a chosen answer."""
        stand_in = StandInForGenerate(self.model, token_ids, with_prompt)
        output = self._ask("generate_until", instance, "generate", stand_in)
        return stand_in.calls[0], str(unwrap_generation_output(output)[0])

    def _ask(
        self,
        method: str,
        instance: Instance,
        name: str,
        stand_in: StandInForGenerate | StandInForForward | CountedForward,
    ) -> Any:
        """Send one request through a method of the wrapper, with one of the inner model's replaced.

        Raises: TaskError unless the replaced method was called exactly once and nothing went wrong.
        """
        where = f"{instance.task_name}, doc_id {instance.doc_id}"
        with _logged_errors() as logged, replaced(self.model, name, stand_in), quiet():
            try:
                output = getattr(self.lmm, method)([_copied(instance)])
            except HonesError:
                raise  # from a steered model, and it names task and document
            except Exception as error:
                hint = _WITHOUT_LIKELIHOODS if method == "loglikelihood" else ""
                reason = one_line(error).rstrip(".") if hint else one_line(error)
                raise TaskError(
                    f"{where}: {self.wrapper_name} failed: {type(error).__name__}: {reason}{hint}"
                ) from error
        if logged:
            raise TaskError(
                f"{where}: {self.wrapper_name} answered after an error: {' '.join(logged[0].split())[:400]}"
            )
        if not stand_in.calls:
            raise TaskError(
                f"{where}: {self.wrapper_name} never called `{name}` of its {type(self.model).__name__}"
            )
        if len(stand_in.calls) > 1:
            raise TaskError(
                f"{where}: {self.wrapper_name} called `{name}` {len(stand_in.calls)} times for one request; "
                "only models that answer with a single call can be measured"
            )
        return output[0]


_WITHOUT_LIKELIHOODS = (
    "; use --model hones with base=<this model>, which scores choices after the prompts that it generates "
    "from"
)


def _pair(output: Any) -> Any:
    """A value and whether it is greedy; steered wrappers return the pair as a result's text."""
    return output.text if isinstance(output, GenerationResult) else output


def _must_be_greedy(model: PreTrainedModel, settings: dict[str, Any], instance: Instance) -> None:
    """Refuse sampling and beams: the head and neuron scores are defined on greedy answers."""
    for name, greedy in (("do_sample", False), ("num_beams", 1)):
        value = _effective(model, settings, name)
        if value not in (None, greedy):
            raise TaskError(
                f"{instance.task_name} generates with {name}={value}; heads and neurons are measured on "
                "greedy answers: pass --gen_kwargs do_sample=False,temperature=0,num_beams=1"
            )


def _effective(model: PreTrainedModel, settings: dict[str, Any], name: str) -> Any:
    if name in settings:
        return settings[name]
    config = settings.get("generation_config") or model.generation_config
    return getattr(config, name, None)


def _copied(instance: Instance) -> Instance:
    """The request with a copy of its generation settings, as wrappers modify them."""
    arguments = tuple(
        plain_settings(copy.deepcopy(part)) if isinstance(part, dict) else part for part in instance.args
    )
    return Instance(instance.request_type, arguments, instance.idx, dict(instance.metadata))


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Errors that are logged within the block: many wrappers log an exception and answer with nothing."""
    logged: list[str] = []

    def keep(self: Any, message: object, *args: Any, **kwargs: Any) -> None:
        logged.append(str(message))

    # Not a loguru sink: adding one takes as long as everything else that is done to play an answer back.
    with mock.patch.multiple(type(logger), error=keep, exception=keep, critical=keep):
        yield logged
