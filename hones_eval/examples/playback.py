"""The door into an lmms-eval model: what it hands to `generate`, and what it makes of the tokens it gets.

Both directions put a stand-in at the place of `generate` and call the model's own `generate_until`, so that
prompts, pictures and post-processing are the wrapper's, for every wrapper, with no prompt code here.
"""

import copy
import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from loguru import logger
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hones_eval import margin
from hones_eval.errors import HonesError, TaskError, one_line
from hones_eval.examples.models import inner_model


class Call(NamedTuple):
    """The arguments of one `generate`: what `forward` takes too, and the settings of generation."""

    inputs: dict[str, Any]
    settings: dict[str, Any]


class Playback:
    """Records what an lmms-eval model passes to `generate`, and plays tokens back through its decoding."""

    def __init__(self, lmm: lmms) -> None:
        """Stand at the door of `lmm`; nothing is changed but during a call."""
        self.lmm = lmm
        self.model = inner_model(lmm)
        self._settings = set(GenerationConfig().to_dict())
        self._forward = set(inspect.signature(self.model.forward).parameters)
        self._cuts_prompt: bool | None = None

    def record(self, instance: Instance) -> Call:
        """Give the arguments of `generate` for one request, without a forward pass.

        Raises: TaskError when the request fails, calls `generate` not once, or does not decode greedily.
        """
        arguments, _ = self._through(instance, self._end(), with_prompt=True)
        call = self._sorted(arguments)
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

    def _end(self) -> list[int]:
        end = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return [] if end is None else [end] if isinstance(end, int) else list(end[:1])

    def _through(
        self, instance: Instance, token_ids: list[int], *, with_prompt: bool
    ) -> tuple[dict[str, Any], str]:
        """Send one request through `generate_until` with the answer already chosen."""
        stand_in = _StandIn(self.model, token_ids, with_prompt)
        where = f"{instance.task_name}, doc_id {instance.doc_id}"
        name = type(self.lmm).__name__
        with _errors_heard() as heard, _generate_replaced(self.model, stand_in), quiet():
            try:
                output = self.lmm.generate_until([_fresh(instance)])
            except HonesError:
                raise  # a steered model's, which names task and document
            except Exception as error:
                raise TaskError(
                    f"{where}: {name} failed: {type(error).__name__}: {one_line(error)}"
                ) from error
        if heard:
            raise TaskError(f"{where}: {name} answered after an error: {' '.join(heard[0].split())[:400]}")
        if not stand_in.calls:
            raise TaskError(f"{where}: {name} never called `generate` of its {type(self.model).__name__}")
        if len(stand_in.calls) > 1:
            raise TaskError(
                f"{where}: {name} called `generate` {len(stand_in.calls)} times for one request; "
                "only models that answer with a single call can be measured"
            )
        return stand_in.calls[0], str(unwrap_generation_output(output[0])[0])

    def _sorted(self, arguments: dict[str, Any]) -> Call:
        inputs = {key: value for key, value in arguments.items() if self._is_input(key, value)}
        return Call(inputs, {key: value for key, value in arguments.items() if key not in inputs})

    def _is_input(self, key: str, value: object) -> bool:
        if key in self._settings:
            return False
        return key in self._forward or isinstance(value, Tensor)


class _StandIn:
    """At the place of `generate`: keeps its arguments and returns an answer that is already chosen."""

    def __init__(self, model: PreTrainedModel, token_ids: list[int], with_prompt: bool) -> None:
        self.calls: list[dict[str, Any]] = []
        self._model, self._token_ids, self._with_prompt = model, token_ids, with_prompt
        self._signature = inspect.signature(cast(Any, type(model)).generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | GenerateDecoderOnlyOutput:
        arguments = self._named(args, kwargs)
        self.calls.append(arguments)
        sequences = self._sequences(arguments)
        if arguments.get("return_dict_in_generate"):
            return GenerateDecoderOnlyOutput(sequences=cast(Any, sequences))
        return sequences

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name; `inputs`, which `generate` takes for any, under the model's own name."""
        bound = self._signature.bind_partial(self._model, *args, **kwargs)
        named: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            kind = self._signature.parameters[name].kind
            named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        if "inputs" in named:
            first = named.pop("inputs")
            if first is not None:
                named[self._model.main_input_name] = first
        return named

    def _sequences(self, arguments: dict[str, Any]) -> Tensor:
        prompt = arguments.get("input_ids")
        if (
            prompt is None
            or not self._with_prompt
            or getattr(self._model.config, "is_encoder_decoder", False)
        ):
            return torch.tensor([self._token_ids], dtype=torch.long, device=self._model.device)
        answer = torch.tensor([self._token_ids] * len(prompt), dtype=prompt.dtype, device=prompt.device)
        return torch.cat([prompt, answer], dim=1)


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
def _generate_replaced(model: PreTrainedModel, stand_in: Callable[..., Any]) -> Iterator[None]:
    """`model.generate` is the stand-in inside, and what it was before, an instance's own included, after."""
    before = vars(model).get("generate")
    model.generate = stand_in  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.generate
        if before is not None:
            model.generate = before


@contextmanager
def _errors_heard() -> Iterator[list[str]]:
    """What is logged as an error inside: many wrappers log an exception and answer with nothing."""
    heard: list[str] = []

    def hear(self: Any, message: object, *args: Any, **kwargs: Any) -> None:
        heard.append(str(message))

    # Not a loguru sink: adding one takes as long as all else that is done to play an answer back.
    with mock.patch.multiple(type(logger), error=hear, exception=hear, critical=hear):
        yield heard


@contextmanager
def quiet() -> Iterator[None]:
    """Neither bars nor prints nor throughput lines of lmms-eval inside: they come with every request."""
    noisy = "lmms_eval.models.model_utils.gen_metrics"
    logger.disable(noisy)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.enable(noisy)
