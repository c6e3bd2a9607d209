"""Edited passes of one example that take part in the call of the model for its unedited pass.

`hones_eval.engine.replay` records the unedited pass and walks up the layers a second time with the edited
rows. Where the edits are known beforehand, both are one walk. Whenever the model calls a decoder layer on its
one row, the call is made on a batch: the unedited row, the rows that were edited in lower layers, and a copy
of the unedited row for every edit in this layer. The attention is called without the copies: the edit changes
the heads of the unedited row, and their projection becomes the attention's output of the copies. The model
gets the unedited row back, and never sees the others.

This saves calls and no arithmetic: L layer calls in place of 2 L. It pays where a call takes longer than its
arithmetic, as in small models. It is exact where replay with the same `Ways` is, which the first example of a
run shows for both.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import replaced_forwards
from hones_eval.engine.calling import (
    by_row_only,
    on_first_rows,
    only_read,
    tensor_of,
    with_more_rows,
    with_tensor,
)
from hones_eval.engine.passes import NeuronReader, Passes, Rows, SiteEdit, edit_recorded_heads


def can_run_ahead(anatomy: Anatomy) -> bool:
    """Whether every decoder layer has one attention and one plain FFN, and passes on one residual stream."""
    layers = range(anatomy.shape.layers)
    single = anatomy.one_stream and len(anatomy.stages) == len(layers)
    return single and all(
        anatomy.heads_in[i].width
        and anatomy.has_plain_ffn(i)
        and anatomy.attentions[i] is not anatomy.layers[i]
        for i in layers
    )


class AheadPasses:
    """The unedited pass of one example and the passes under some edits of heads, all run at once.

    Implements `Passes`.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        inputs: Mapping[str, Any],
        read: int,
        edits: Sequence[SiteEdit],
        neurons: bool,
        others: Callable[[], Passes],
    ) -> None:
        """Run the model once.

        Args:
            anatomy: of a model for which `can_run_ahead` holds.
            inputs: the model's inputs for one example.
            read: number of positions at the end that are read.
            edits: of heads, in any order; all their rows run at once.
            neurons: whether to keep the FFN activations of edited rows, for `on_neurons`.
            others: makes the passes that serve any other edits.
        """
        order = sorted(range(len(edits)), key=lambda i: edits[i].site.layer)
        self._edits, self._numbers = list(edits), torch.tensor(order)
        self._chosen = [edits[i] for i in order]
        self._others, self._with_neurons = others, neurons
        batch = _Batch(anatomy, slice(-read, None), self._chosen, neurons)
        with batch.taken_along():
            output = anatomy.model(**inputs, use_cache=False)
        self.base_logits: Tensor = output.logits[0, batch.read]
        self._logits = anatomy.last_logits(batch.rows, batch.read)
        self._neurons = batch.neurons

    def base_neurons(self) -> list[Tensor]:
        """FFN activations [read, I] of the unedited pass, by layer."""
        return [z[0] for z in self._neurons]

    def edited(self, edits: Sequence[SiteEdit], on_neurons: NeuronReader | None = None) -> Iterator[Rows]:
        """See `Passes.edited`."""
        if list(edits) != self._edits or (on_neurons is not None and not self._with_neurons):
            yield from self._others().edited(edits, on_neurons)
            return
        for layer, z in enumerate(self._neurons if on_neurons is not None else ()):
            if len(z) > 1:
                on_neurons(layer, self._numbers[: len(z) - 1], z[1:])  # type: ignore[misc]
        yield Rows(self._chosen, self._logits)


class _Batch:
    """The edited rows during the model's call, and what is kept of them."""

    def __init__(self, anatomy: Anatomy, read: slice, edits: Sequence[SiteEdit], neurons: bool) -> None:
        """Take along one row per edit; `edits` ascend by layer."""
        self.anatomy, self.read = anatomy, read
        layers = range(anatomy.shape.layers)
        self._starting = [[edit for edit in edits if edit.site.layer == layer] for layer in layers]
        self._keep_rows = neurons
        self.rows = torch.empty(0)
        """Hidden states [rows, tokens, hidden] of the rows edited so far."""
        self.neurons: list[Tensor] = []
        """By layer, FFN activations [rows, read, I]: the unedited row first, then those edited so far."""
        self._base: Tensor | None = None  # the unedited row's output of the layer below
        self._heads: Tensor | None = None  # the unedited row's heads in the layer that is being called
        self._broadcast: list[Any] = []  # the arguments of the layer below
        self._attending = 0  # rows that go through the attention of that layer

    @contextmanager
    def taken_along(self) -> Iterator[None]:
        """Take the edited rows along in a call of the model within the block."""
        anatomy, last = self.anatomy, len(self.anatomy.layers) - 1
        narrow = (anatomy.ffns[last], anatomy.heads_in[last].module)
        forwards = [(module, partial(only_read, module.forward, self.read)) for module in narrow]
        hooks = [(site.module, self._keep_neurons) for site in anatomy.neurons_in]
        for i, (layer, attention) in enumerate(zip(anatomy.layers, anatomy.attentions, strict=True)):
            forwards.append((layer, partial(self._layer, i, layer.forward)))
            if self._starting[i]:
                forwards.append((attention, partial(self._attend, i, attention.forward)))
                hooks.append((anatomy.heads_in[i].module, self._keep_heads))
        with replaced_forwards(forwards):
            handles = [module.register_forward_pre_hook(keep) for module, keep in hooks]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _layer(self, layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a layer on the unedited row, which it is called with, and on the rows that are taken along."""
        rest = dict(kwargs)
        hidden: Tensor = args[0] if args else rest.pop("hidden_states")
        self._check_broadcast(args[1:], rest)
        parts = [hidden]
        if len(self.rows):
            parts.append(self._moved(hidden))
        self._attending = sum(map(len, parts))
        if entering := len(self._starting[layer]):
            parts.append(hidden.expand(entering, -1, -1))
        output = forward(torch.cat(parts) if len(parts) > 1 else hidden, *args[1:], **rest)
        whole = tensor_of(output)
        self._base, self.rows = whole[:1], whole[1:]
        return with_tensor(output, self._base)

    def _check_broadcast(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError for arguments that differ by row. Most are those of the layer below, and known."""
        given = [*args, *kwargs.values()]
        known = len(given) == len(self._broadcast) and all(map(operator.is_, given, self._broadcast))
        if not known and (by_row := by_row_only(args, kwargs)):
            raise TypeError(f"a decoder layer has {len(by_row)} arguments that are different for each row")
        self._broadcast = given

    def _moved(self, hidden: Tensor) -> Tensor:
        """The rows edited so far, with whatever the model added to the unedited row since the last layer."""
        if self._base is None or hidden is self._base or torch.equal(hidden, self._base):
            return self.rows
        return self.rows + (hidden - self._base)

    def _attend(self, layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the attention without the rows that are edited in its layer; edit the heads for those."""
        output = on_first_rows(forward, self._attending, args, kwargs)
        assert self._heads is not None
        edited = edit_recorded_heads(self._heads, self._starting[layer], self.anatomy)
        return with_more_rows(output, tensor_of(self.anatomy.heads_in[layer].module(edited)))

    def _keep_heads(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._heads = args[0][:1]

    def _keep_neurons(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        z = args[0][:, self.read] if self._keep_rows else args[0][:1, self.read]
        self.neurons.append(self.anatomy.padded(z.clone()))  # a view would keep all positions in memory
