"""The last step of a model: how its logits come from the hidden states after the last layer.

In most models that is final norm, unembedding and, in a few, a soft cap. Some scale or mask logits in another
way, or transform hidden states once more. `prove_last_step` runs the model once and compares: where the plain
step differs, the model's own forward computes logits, with layers that pass on hidden states of ours.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hones_eval.core.hooks import replaced_forward
from hones_eval.core.probing import IMAGE_MASK, REFUSALS, Probe, first_tensor
from hones_eval.errors import first_line

# Largest difference, relative to the largest value, that rounding explains.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass(repr=False)
class LastStep:
    """How logits come from hidden states, once that is proven.

    `own` is the model's own computation, where the plain one differs; `refused` says why neither is known.
    Of models with several residual streams `merged` computes logits from the output of the last layer.
    """

    own: Callable[[Tensor], Tensor] | None = None
    refused: str | None = None
    merged: Callable[[Tensor], Tensor] | None = None


class Stack(NamedTuple):
    """The parts of a model that its last step needs; `plain` is the plain step."""

    model: PreTrainedModel
    layers: Sequence[nn.Module]
    final_norm: nn.Module
    unembed: nn.Module
    plain: Callable[[Tensor], Tensor]
    token_dim: int = 1
    one_stream: bool = True


Run = Callable[[Tensor], Tensor]
"""Logits [rows, tokens, vocabulary] of token ids [rows, tokens]."""


def close(first: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, relative to the largest value."""
    scale = float(first.abs().max())
    return float((first - other).abs().max()) <= ROUNDING[first.dtype] * max(scale, 1e-12)


def prove_last_step(stack: Stack, probe: Probe) -> LastStep:
    """Compare the plain last step with the model's own logits, and choose one of the two.

    A model that cannot be run on text alone is not compared here. Replay, patching and the lens compare the
    logits of their first example.
    """
    for run in _runs(stack, probe):
        try:
            return _proven(stack, probe, run)
        except _CannotRun:
            continue
    return LastStep()


class _CannotRun(Exception):
    """A way to run the model does not work."""


def _proven(stack: Stack, probe: Probe, run: Run) -> LastStep:
    read: list[Tensor] = []
    outputs: dict[nn.Module, Any] = {}
    ends_with_layer = isinstance(stack.final_norm, nn.Identity)
    token = int(probe.ids[0, 0])
    with ExitStack() as hooks:
        handle = _keep_read(stack.layers[-1] if ends_with_layer else stack.final_norm, read, ends_with_layer)
        hooks.callback(handle.remove)
        for layer in set(stack.layers):
            kept = layer.register_forward_hook(lambda module, args, output: outputs.update({module: output}))
            hooks.callback(kept.remove)
        try:
            with torch.no_grad():
                logits = run(probe.ids)
                if not bool(torch.isfinite(logits).all()):
                    return LastStep()  # nothing can be compared; the first pass names the layer
        except REFUSALS:
            raise _CannotRun from None
    with torch.no_grad():
        is_plain = close(logits, stack.plain(read[-1]))
    if not stack.one_stream:
        return LastStep(merged=_merging(stack, outputs, run, token, logits))
    if is_plain:
        return LastStep()
    try:
        own = partial(_own_logits, stack, outputs, run, token)
        with torch.no_grad():
            if close(logits, own(read[-1])):
                return LastStep(own=own)
        reason = "logits computed by its own last step differ"
    except REFUSALS as error:
        reason = first_line(error)
    return LastStep(
        refused=f"{type(stack.model).__name__} scales or masks its logits in a way that cannot be repeated "
        f"for other hidden states ({reason})"
    )


def _merging(
    stack: Stack, outputs: dict[nn.Module, Any], run: Run, token: int, logits: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """Logits from the output of the last layer by the model's own forward, if that gives its own logits."""
    stack = stack._replace(final_norm=nn.Identity())
    merged = partial(_own_logits, stack, outputs, run, token)
    last = outputs[stack.layers[-1]]
    try:
        with torch.no_grad():
            found = merged(last[0] if isinstance(last, tuple) else last)
    except REFUSALS:
        return None
    return merged if close(logits, found) else None


def _runs(stack: Stack, probe: Probe) -> Iterator[Run]:
    """Ways to run a model on a few tokens: the whole model on text, then the language model inside it.

    An encoder-decoder gets the tokens as the beginning of its answer, and the probe's states in place of what
    its encoder would give. A language model with cross-attention gets these states as well.
    """
    inner = [
        part
        for part in stack.model.modules()
        if isinstance(part, PreTrainedModel) and part is not stack.model
        if part.get_output_embeddings() is stack.unembed
    ]
    models = [stack.model, *inner] if probe.states else [stack.model]
    for model in models:
        if getattr(model.config, "is_encoder_decoder", False):
            yield partial(_answer_logits, model, probe)
        yield partial(_text_logits, model, {})
        if probe.states:
            yield partial(_text_logits, model, probe.states)


def _text_logits(model: Any, states: dict[str, Tensor], ids: Tensor) -> Tensor:
    given = {name: x.expand(len(ids), *x.shape[1:]) for name, x in states.items()}
    if IMAGE_MASK in given:
        given[IMAGE_MASK] = given[IMAGE_MASK][:, : ids.shape[1]]
    logits: Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), **given, use_cache=False
    ).logits
    return logits


@dataclass
class _Encoded(BaseModelOutput):
    """What an encoder gives. UDOP's gives a mask as well."""

    attention_mask: Tensor | None = None


def _answer_logits(model: Any, probe: Probe, ids: Tensor) -> Tensor:
    states = next(iter(probe.states.values()))
    mask = torch.ones(len(ids), states.shape[1], dtype=torch.long, device=ids.device)
    encoded = _Encoded(states.expand(len(ids), -1, -1), attention_mask=mask)
    logits: Tensor = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits
    return logits


def _keep_read(module: nn.Module, read: list[Tensor], is_layer: bool) -> Any:
    if is_layer:
        return module.register_forward_hook(
            lambda m, args, output: read.append(output[0] if isinstance(output, tuple) else output)
        )
    return module.register_forward_pre_hook(
        lambda m, args, kwargs: read.append(first_tensor(args, kwargs)), with_kwargs=True
    )


def _own_logits(stack: Stack, outputs: dict[nn.Module, Any], run: Run, token: int, hidden: Tensor) -> Tensor:
    """Logits by the model's own forward, in which every layer passes on its input and hidden states are ours.

    Each hidden state is an answer of one token. This costs an embedding and L calls that do nothing.
    """
    dim = stack.token_dim
    if hidden.ndim < 4:
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        shape = hidden.shape[:-1]
    else:
        flat = hidden.flatten(dim - 1, dim).unsqueeze(dim)
        shape = hidden.shape[dim - 1 : dim + 1]
    ids = torch.full((flat.shape[dim - 1], 1), token, device=flat.device)
    ends_with_layer = isinstance(stack.final_norm, nn.Identity)

    def stub(output: Any, is_last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = flat if is_last else first_tensor(args, kwargs)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return forward

    def ours(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((flat, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": flat})

    with ExitStack() as replaced:
        for layer in set(stack.layers):
            is_last = ends_with_layer and layer is stack.layers[-1]
            replaced.enter_context(replaced_forward(layer, stub(outputs.get(layer), is_last)))
        if not ends_with_layer:
            handle = stack.final_norm.register_forward_pre_hook(ours, with_kwargs=True)
            replaced.callback(handle.remove)
        logits = run(ids)
    return logits.reshape(*shape, logits.shape[-1])
