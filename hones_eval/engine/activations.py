"""What passes through a decoder in one forward: the residual stream, and what each layer's parts write."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import standing_in
from hones_eval.engine.passes import ROUNDING, RowLimit
from hones_eval.engine.replay import Replay, returning, tensor_of
from hones_eval.errors import EditError, HonesError

Part = Literal["stream", "attention", "ffn"]
View = Literal["attention", "after_attention", "ffn", "block"]
VIEWS: tuple[View, ...] = get_args(View)


@dataclass(frozen=True, eq=False)
class Activations:
    """One pass: `streams` has L + 1 tensors [1, tokens, hidden], the others L; `logits` [vocabulary]."""

    streams: list[Tensor]
    attention: list[Tensor]
    ffn: list[Tensor]
    logits: Tensor

    def of(self, part: Part) -> list[Tensor]:
        """The tensors of a part, by layer."""
        return {"stream": self.streams, "attention": self.attention, "ffn": self.ffn}[part]


@torch.no_grad()
def activations(anatomy: Anatomy, inputs: Mapping[str, Any]) -> Activations:
    """Run the model once and keep what can be patched or read."""
    with (
        inputs_of([*anatomy.layers, anatomy.final_norm]) as streams,
        outputs_of(anatomy.attentions) as attention,
        outputs_of(anatomy.ffns) as ffn,
    ):
        logits: Tensor = anatomy.model(**inputs, use_cache=False).logits
    return Activations(complete(streams), complete(attention), complete(ffn), logits[0, -1])


class LayerViews(Replay):
    """One recorded pass, in which every layer can be looked at in four places (V-SEAM 2, lens)."""

    def __init__(self, anatomy: Anatomy, inputs: Mapping[str, Any]) -> None:
        """Run and record the pass over one example.

        Raises: HonesError when a layer called again with the recorded parts does not give what it gave.
        """
        with outputs_of(anatomy.ffns) as written:
            super().__init__(anatomy, inputs, 1, RowLimit(1, 1))
        self._written = complete(written)
        for layer in (0, len(self._calls) - 1):
            again, once = self._with_ffn(layer, self._written[layer]), self._calls[layer].output
            worst = float((again - once).abs().max() / once.abs().max())
            if not worst <= ROUNDING[once.dtype]:
                raise HonesError(
                    f"layer {layer} of {type(anatomy.model).__name__} cannot be looked into: called again it "
                    f"differs by {worst:.1e} of its largest value"
                )

    @torch.no_grad()
    def view(self, view: View, layer: int) -> Tensor:
        """Hidden states [tokens, hidden]: the output of attention or FFN as the module gives it, the residual
        stream with the attention's output added, or the whole block's output.
        """
        if view == "after_attention":
            return self._with_ffn(layer, torch.zeros_like(self._written[layer]))[0]
        call = self._calls[layer]
        outputs = {"attention": tensor_of(call.attended), "ffn": self._written[layer], "block": call.output}
        return outputs[view][0]

    @torch.no_grad()
    def _with_ffn(self, layer: int, written: Tensor) -> Tensor:
        """The layer's output with its recorded attention and a given FFN output.

        With zeros that is the residual stream after attention in every family: norms behind the FFN (Gemma)
        leave zeros as they are.
        """
        call = self._calls[layer]
        attended = returning(call.attended, tensor_of(call.attended))
        with (
            standing_in(self.anatomy.attentions[layer], attended),
            standing_in(self.anatomy.ffns[layer], lambda *_, **__: written),
        ):
            return self.call(layer, call.x, narrow=False)


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The hidden states that modules are called with, by place; the last call counts."""
    kept: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[place] = args[0] if args else kwargs["hidden_states"]

        return hook

    with ExitStack() as stack:
        for place, module in enumerate(modules):
            handle = module.register_forward_pre_hook(keep(place), with_kwargs=True)
            stack.callback(handle.remove)
        yield kept
        _check_ran(kept, len(modules))


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """The first tensor that modules give, by place."""
    kept: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept[place] = tensor_of(output)

        return hook

    with ExitStack() as stack:
        for place, module in enumerate(modules):
            stack.callback(module.register_forward_hook(keep(place)).remove)
        yield kept
        _check_ran(kept, len(modules))


def _check_ran(kept: Mapping[int, Tensor], count: int) -> None:
    if len(kept) != count:
        raise EditError(f"nothing recorded: a forward pass went through {len(kept)} of {count} modules")


def complete(kept: Mapping[int, Tensor]) -> list[Tensor]:
    """What was kept, in order."""
    return [kept[place] for place in range(len(kept))]
