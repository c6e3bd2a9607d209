"""Test doubles for `model.generate` and `model.forward` that capture the arguments a wrapper passes."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast


class Call(NamedTuple):
    """The arguments of one `generate`: those that `forward` takes too, and the generation settings."""

    inputs: dict[str, Any]
    settings: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, arguments: Mapping[str, Any]) -> "Call":
        """Split a call's arguments, given by name."""
        settings, forward = _settings_and_inputs(cast(Any, type(model)))
        inputs = {
            key: value
            for key, value in arguments.items()
            if key not in settings and (key in forward or isinstance(value, Tensor))
        }
        return cls(inputs, {key: value for key, value in arguments.items() if key not in inputs})


@cache
def _settings_and_inputs(model: type[PreTrainedModel]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of all generation settings, and of the arguments of a model class's `forward`."""
    return frozenset(GenerationConfig().to_dict()), frozenset(inspect.signature(model.forward).parameters)


class StandInForGenerate:
    """Replaces `generate`: keeps the arguments and returns an answer that is already chosen."""

    def __init__(self, model: PreTrainedModel, token_ids: list[int], with_prompt: bool) -> None:
        """Return `token_ids`, after the prompt as decoder-only models do, or without it."""
        self.calls: list[dict[str, Any]] = []
        self._model, self._token_ids, self._with_prompt = model, token_ids, with_prompt
        self._signature = inspect.signature(cast(Any, type(model)).generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | GenerateDecoderOnlyOutput:
        """Keep the arguments of `generate`, and return the answer."""
        arguments = self._named(args, kwargs)
        self.calls.append(arguments)
        sequences = self._sequences(arguments)
        if arguments.get("return_dict_in_generate"):
            return GenerateDecoderOnlyOutput(sequences=cast(Any, sequences))
        return sequences

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name; `inputs` under the name of the model's main input."""
        named = _by_name(self._signature, self._model, args, kwargs)
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


class StandInForForward:
    """Replaces `forward`: keeps the arguments and returns logits of 0.

    With `sure` the logit of every token of `input_ids` is 1: at the position before it (0) or at its own (1).
    """

    def __init__(self, model: PreTrainedModel, sure: int | None = None) -> None:
        """`calls` holds the arguments of every call, by name."""
        self.calls: list[dict[str, Any]] = []
        self._model, self._sure = model, sure
        self._signature = inspect.signature(type(model).forward)
        self._vocabulary = int(model.config.get_text_config().vocab_size)

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """As `forward`."""
        arguments = _by_name(self._signature, self._model, args, kwargs)
        self.calls.append(arguments)
        ids: Tensor = arguments["input_ids"]
        zero = torch.zeros((), device=ids.device, dtype=self._model.dtype)
        logits = zero.expand(*ids.shape, self._vocabulary)
        if self._sure is not None:
            known = ids.roll(self._sure - 1, dims=1).unsqueeze(-1)
            logits = torch.zeros_like(logits).scatter(-1, known, 1.0)
        return CausalLMOutputWithPast(loss=cast(Any, zero), logits=cast(Any, logits))


class CountedForward:
    """Replaces `forward`: calls it and counts the calls."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`calls` has one entry per call."""
        self.calls: list[None] = []
        self._forward = model.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`."""
        self.calls.append(None)
        return self._forward(*args, **kwargs)


def _by_name(
    signature: inspect.Signature, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a call of a model's method by name, including those in `**kwargs`."""
    named: dict[str, Any] = {}
    for name, value in list(signature.bind_partial(model, *args, **kwargs).arguments.items())[1:]:
        kind = signature.parameters[name].kind
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


@contextmanager
def replaced(model: PreTrainedModel, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of the model within the block; afterwards it is what it was before."""
    before = vars(model).get(name)
    setattr(model, name, stand_in)
    try:
        yield
    finally:
        delattr(model, name)
        if before is not None:
            setattr(model, name, before)
