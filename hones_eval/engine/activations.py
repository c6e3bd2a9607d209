"""Recorded activations of one forward pass: residual streams, and outputs of attentions and FFNs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import replaced_forward, uncompiled
from hones_eval.engine.calling import returning, tensor_of
from hones_eval.engine.passes import ROUNDING, RowLimit
from hones_eval.engine.replay import Replay
from hones_eval.errors import EditError, HonesError

Part = Literal["stream", "attention", "ffn"]
View = Literal["attention", "after_attention", "ffn", "block"]
VIEWS: tuple[View, ...] = get_args(View)


@dataclass(frozen=True, eq=False)
class Activations:
    """The activations of one pass.

    `streams` are the L + 1 residual streams [1, tokens, hidden]: the input of every layer and of the final
    norm. `attention` and `ffn` are the L outputs [1, tokens, hidden]; `logits` [vocabulary] are the last
    position's.
    """

    streams: list[Tensor]
    attention: list[Tensor]
    ffn: list[Tensor]
    logits: Tensor

    def of(self, part: Part) -> list[Tensor]:
        """The tensors of a part, by layer."""
        return {"stream": self.streams, "attention": self.attention, "ffn": self.ffn}[part]


@torch.no_grad()
def activations(anatomy: Anatomy, inputs: Mapping[str, Any]) -> Activations:
    """Run the model once and keep its residual streams and block outputs.

    Raises: HonesError when the decoder reads images by cross-attention, or has several residual streams.
    """
    anatomy.check_plain_streams()
    with (
        inputs_of([*anatomy.layers, anatomy.final_norm]) as streams,
        outputs_of(anatomy.attentions) as attention,
        outputs_of(anatomy.ffns) as ffn,
    ):
        logits: Tensor = anatomy.model(**inputs, use_cache=False).logits
    return Activations(complete(streams), complete(attention), complete(ffn), logits[0, -1])


class LayerViews(Replay):
    """One recorded pass with four views of every layer's hidden states (V-SEAM 2, lens)."""

    def __init__(self, anatomy: Anatomy, inputs: Mapping[str, Any]) -> None:
        """Run and record the pass over one example.

        Raises: HonesError when re-running a layer with its recorded parts does not give its recorded output,
            or the decoder reads images by cross-attention or has several residual streams.
        """
        anatomy.check_plain_streams()
        with outputs_of(anatomy.ffns) as written:
            super().__init__(anatomy, inputs, 1, RowLimit(1, 1))
        self._written = complete(written)
        for layer in (0, len(self._calls) - 1):
            again, recorded = self._with_ffn(layer, self._written[layer]), self._calls[layer].output
            worst = float((again - recorded).abs().max() / recorded.abs().max())
            if not worst <= ROUNDING[recorded.dtype]:
                raise HonesError(
                    f"layer {layer} of {type(anatomy.model).__name__} is not reproducible: re-running it "
                    f"gives a relative difference of {worst:.1e}"
                )

    @torch.no_grad()
    def view(self, view: View, layer: int) -> Tensor:
        """One view of a layer's hidden states [tokens, hidden].

        `attention` and `ffn` are the outputs of these modules, `after_attention` is the residual stream with
        the attention's output added, and `block` is the output of the layer.
        """
        if view == "after_attention":
            return self._with_ffn(layer, torch.zeros_like(self._written[layer]))[0]
        call = self._calls[layer]
        outputs = {"attention": tensor_of(call.attended), "ffn": self._written[layer], "block": call.output}
        return outputs[view][0]

    @torch.no_grad()
    def _with_ffn(self, layer: int, written: Tensor) -> Tensor:
        """The layer's output with its recorded attention and a given FFN output.

        For an FFN output of zeros this is the residual stream after attention, also in families with a norm
        after the FFN (Gemma), which keeps zeros.
        """
        call = self._calls[layer]
        attended = returning(call.attended, tensor_of(call.attended))
        with (
            replaced_forward(self.anatomy.attentions[layer], attended),
            replaced_forward(self.anatomy.ffns[layer], lambda *_, **__: written),
        ):
            return self.call(layer, call.x, narrow=False)


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The hidden states that each module receives, by index; the last call counts."""
    kept: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for index, module in enumerate(modules):
            handle = module.register_forward_pre_hook(keep(index), with_kwargs=True)
            stack.callback(handle.remove)
        yield kept
        _check_ran(kept, len(modules))


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The output tensor of each module, by index."""
    kept: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept[index] = tensor_of(output)

        return hook

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for index, module in enumerate(modules):
            stack.callback(module.register_forward_hook(keep(index)).remove)
        yield kept
        _check_ran(kept, len(modules))


def _check_ran(kept: Mapping[int, Tensor], count: int) -> None:
    if len(kept) != count:
        raise EditError(
            f"the forward pass called {len(kept)} of {count} modules: nothing to record for the others"
        )


def complete(kept: Mapping[int, Tensor]) -> list[Tensor]:
    """The kept tensors in order."""
    return [kept[index] for index in range(len(kept))]
