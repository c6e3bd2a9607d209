"""The door into an lmms-eval model: what it hands to `generate`, and what it makes of the tokens it gets.

Both directions put a stand-in at the place of `generate` and call the model's own `generate_until`, so that
prompts, pictures and post-processing are the wrapper's, for every wrapper, with no prompt code here. For
log-likelihoods the stand-in is at the place of `forward`.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from hones_eval.errors import HonesError, TaskError, one_line
from hones_eval.lmms.answers import margin
from hones_eval.lmms.answers.choices import Choice
from hones_eval.lmms.call_capture import Call, CountedForward, StandInForForward, StandInForGenerate, replaced
from hones_eval.lmms.calls import quiet
from hones_eval.lmms.examples.models import inner_model


class Playback:
    """Records what an lmms-eval model passes to `generate`, and plays tokens back through its decoding."""

    def __init__(self, lmm: lmms) -> None:
        """Stand at the door of `lmm`; nothing is changed but during a call."""
        self.lmm = lmm
        self.model = inner_model(lmm)
        self._cuts_prompt: bool | None = None

    def record(self, instance: Instance) -> Call:
        """Give the arguments of `generate` for one request, without a forward pass.

        Raises: TaskError when the request fails, calls `generate` not once, or does not decode greedily.
        """
        arguments, _ = self._through(instance, self._end(), with_prompt=True)
        call = Call.of(self.model, arguments)
        _must_be_greedy(self.model, call.settings, instance)
        return call

    def decode(self, instance: Instance, token_ids: Sequence[int]) -> str:
        """Give the answer that the wrapper makes of generated tokens.

        A wrapper that does not take the prompt off the front of what `generate` gives is handed the new
        tokens alone, so that the answer is an answer.
        """
        if self._cuts_prompt is None:
            _, nothing = self._through(instance, self._end(), with_prompt=True)
            self._cuts_prompt = not nothing.strip()
        return self._through(instance, list(token_ids), with_prompt=self._cuts_prompt)[1]

    def record_choice(self, instance: Instance) -> Choice:
        """Give what the model's `forward` is called with for one choice, without a forward pass.

        Raises: TaskError when the request fails, calls `forward` not once, or gives the choice no labels.
        """
        forward = StandInForForward(self.model)
        self._ask("loglikelihood", instance, "forward", forward)
        return self._choice(forward.calls[0], f"{instance.task_name}, doc_id {instance.doc_id}")

    def score_choice(self, instance: Instance) -> float:
        """Give the value that the wrapper itself makes of one choice, by a forward pass."""
        forward = CountedForward(self.model)
        output = self._ask("loglikelihood", instance, "forward", forward)
        return float(_pair(output)[0])

    def finds_greedy(self, instance: Instance, late: int) -> bool:
        """Give whether the wrapper calls a choice greedy when the model is sure of each token.

        It is sure at the position before, which predicts it, and with `late` 1 at the token's own.
        """
        forward = StandInForForward(self.model, sure=late)
        output = self._ask("loglikelihood", instance, "forward", forward)
        return bool(_pair(output)[1])

    def _choice(self, arguments: dict[str, Any], where: str) -> Choice:
        labels = arguments.pop("labels", None)
        if not isinstance(labels, Tensor):
            raise TaskError(
                f"{where}: {type(self.lmm).__name__} hands no labels to its model, by which the choice's "
                "tokens could be told from the question's"
            )
        given = {key: value for key, value in arguments.items() if value is not None}
        inputs = Call.of(self.model, given).inputs
        tokens = inputs["input_ids"].shape
        scored = int((labels != -100).sum())
        if tokens[0] != 1 or not 0 < scored < tokens[1] or bool((labels[0, -scored:] == -100).any()):
            raise TaskError(
                f"{where}: {type(self.lmm).__name__} gives labels to {scored} tokens of input_ids "
                f"{list(tokens)}; wanted is one question with a choice behind it"
            )
        return Choice(inputs, scored)

    def _end(self) -> list[int]:
        end = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return [] if end is None else [end] if isinstance(end, int) else list(end[:1])

    def _through(
        self, instance: Instance, token_ids: list[int], *, with_prompt: bool
    ) -> tuple[dict[str, Any], str]:
        """Send one request through `generate_until` with the answer already chosen."""
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

        Raises: TaskError unless it was called exactly once and nothing went wrong.
        """
        where = f"{instance.task_name}, doc_id {instance.doc_id}"
        wrapper = type(self.lmm).__name__
        with _errors_heard() as heard, replaced(self.model, name, stand_in), quiet():
            try:
                output = getattr(self.lmm, method)([_fresh(instance)])
            except HonesError:
                raise  # a steered model's, which names task and document
            except Exception as error:
                hint = _WITHOUT_LIKELIHOODS if method == "loglikelihood" else ""
                reason = one_line(error).rstrip(".") if hint else one_line(error)
                raise TaskError(
                    f"{where}: {wrapper} failed: {type(error).__name__}: {reason}{hint}"
                ) from error
        if heard:
            raise TaskError(f"{where}: {wrapper} answered after an error: {' '.join(heard[0].split())[:400]}")
        if not stand_in.calls:
            raise TaskError(f"{where}: {wrapper} never called `{name}` of its {type(self.model).__name__}")
        if len(stand_in.calls) > 1:
            raise TaskError(
                f"{where}: {wrapper} called `{name}` {len(stand_in.calls)} times for one request; "
                "only models that answer with a single call can be measured"
            )
        return output[0]


_WITHOUT_LIKELIHOODS = (
    "; --model hones with base= this one scores choices by the prompts that it generates from"
)


def _pair(output: Any) -> Any:
    """A value and whether it is greedy, which steered wrappers hand over as a result's text."""
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


def _fresh(instance: Instance) -> Instance:
    """The request with its generation settings copied, since wrappers write into them; a margin is ours."""
    arguments = tuple(
        margin.without(copy.deepcopy(one)) if isinstance(one, dict) else one for one in instance.args
    )
    return Instance(instance.request_type, arguments, instance.idx, dict(instance.metadata))


@contextmanager
def _errors_heard() -> Iterator[list[str]]:
    """What is logged as an error inside: many wrappers log an exception and answer with nothing."""
    heard: list[str] = []

    def hear(self: Any, message: object, *args: Any, **kwargs: Any) -> None:
        heard.append(str(message))

    # Not a loguru sink: adding one takes as long as all else that is done to play an answer back.
    with mock.patch.multiple(type(logger), error=hear, exception=hear, critical=hear):
        yield heard
