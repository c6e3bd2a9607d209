"""Edited passes replayed from one recorded pass, with many edits as the rows of one batch.

Why replay works: an edit in layer `l` changes nothing in the layers below `l`. So the unedited pass of an
example is recorded once, and an edited pass restarts at the layer of its edit. All edits share one walk up
the layers with a growing batch: at layer `l` the rows that were edited below `l` are joined by the rows whose
edit is in `l`, until one unembedding reads all rows. L layer calls then serve all edits of all layers: rows
that join take part in the call of the others, and only the attention is called without them.

What is never computed twice: the vision tower, the layers below an edit, the attention of the edited layer
(its recorded output is replaced by the projection of the edited heads), and in the last layer the FFN of
positions that are not read.

Replay knows nothing about a family's layers. A layer is called with the arguments that it had in the recorded
pass. Whatever the model adds to the residual stream between two layers, such as deep-stack features, is the
recorded input of the upper layer minus the recorded output of the lower one, and is added to every row.
A decoder layer with cross-attention counts as two layers of the anatomy, and is still called once per walk:
rows that are edited in its first half and rows that are edited in its second half join after the same call.
That all of this is exact is not assumed: `Replayer` compares the first example with plain hooked forwards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import ModelShape
from hones_eval.core.hooks import editing, recording, recording_calls, replaced_forward, uncompiled
from hones_eval.core.proofs import Proofs
from hones_eval.core.scope import Scope, ScopeTracker
from hones_eval.core.sites import Head, Neuron
from hones_eval.engine.ahead import AheadPasses, can_run_ahead
from hones_eval.engine.caches import KeptByLayer, KeysValues, RecordedCache, is_cache
from hones_eval.engine.calling import (
    argument_of_rows,
    by_row_only,
    on_first_rows,
    only_read,
    returning,
    tensor_of,
    with_more_rows,
)
from hones_eval.engine.passes import (
    ROUNDING,
    FullPasses,
    NeuronReader,
    Passes,
    RowEdits,
    RowLimit,
    Rows,
    SiteEdit,
    edit_recorded_heads,
    edit_rows,
    present,
    replaced_by_mean,
)
from hones_eval.engine.prompts import own_tokens
from hones_eval.errors import HonesError, first_line

# Called per layer with the rows that passed through its attention: layer, numbers of rows, keys and values.
KeyReader = Callable[[int, Sequence[int], KeysValues], None]


class Replayer:
    """Makes `Passes` for examples, by replay where that is exact for this model, else by full forwards."""

    def __init__(
        self,
        anatomy: Anatomy,
        rows: int | None = None,
        scope: str | Scope = "all",
        proofs: Proofs | None = None,
    ) -> None:
        """Replay at most `rows` edited passes at once; by default as many as suit the device.

        Edits act on the tokens of `scope`. Replay knows no other scope than `all`: others take full passes.
        `proofs` are those that earlier runs made of this model; by default each replayer makes its own.
        """
        self.anatomy, self._rows, self._scope = anatomy, rows, Scope.parse(scope)
        self.limit = RowLimit(rows, _tokens_at_once(anatomy))
        self.tracker = None if self._scope.is_all else ScopeTracker(anatomy, self._scope)
        self.inexact: str | None = None if self._scope.is_all else f"edits act on scope={self._scope} only"
        self._proven = False
        self._ways: Ways = WAYS[0]
        self._proofs = proofs

    def unproven(self) -> "Replayer":
        """Another replayer of the same model, which proves itself again on its first example.

        For a model that was changed since, by a steering for example: a proof holds only for the model that
        it was made on.
        """
        return type(self)(self.anatomy, self._rows, self._scope)

    @property
    def scope(self) -> Scope:
        """The tokens that edits act on."""
        return self._scope

    def in_scope(self, scope: str | Scope) -> "Replayer":
        """A replayer of the same model whose edits act on the tokens of a scope."""
        if Scope.parse(scope) == self._scope:
            return self
        return type(self)(self.anatomy, self._rows, scope, self._proofs)

    @torch.no_grad()
    def record(
        self,
        inputs: Mapping[str, Any],
        read: int,
        keep: bool = False,
        ahead: Sequence[SiteEdit] = (),
        neurons: bool = False,
    ) -> Passes:
        """Record the unedited pass of one example, of which the last `read` positions are read.

        With `keep` the replay also records keys and values, from which decoding can continue.

        The first example is also the proof: its replayed logits must equal those of hooked forwards. If they
        do not, `inexact` says by how much, and all later passes are full forwards.

        Args:
            inputs: the model's inputs for one example; `input_ids` is [1, tokens].
            read: number of positions at the end whose logits and activations are read.
            keep: whether to record keys and values.
            ahead: edits that will be asked for. Where their rows fit into one batch, they may run in the same
                pass, which takes fewer calls; the results are the same.
            neurons: whether `ahead` will be asked for with `on_neurons`.

        Raises: HonesError for a batch of more than one example.
        """
        if own_tokens(inputs).shape[0] != 1:
            raise HonesError("replay takes one example at a time, because the rows of its batch are edits")
        replay: Replay | None = None
        if self.inexact is None and not self._proven and not self._is_known(inputs):
            replay = Replay(self.anatomy, inputs, read, self.limit, keep)
            self._prove(replay, inputs, FullPasses(self.anatomy, inputs, read))
        if self.inexact is not None:
            return FullPasses(self.anatomy, inputs, read, self.tracker)
        if not keep and self._runs_ahead(ahead, own_tokens(inputs).shape[1]):
            others = partial(self.record, inputs, read)
            with suppress(torch.OutOfMemoryError):  # a replay then cuts its rows into smaller batches
                return AheadPasses(self.anatomy, inputs, read, ahead, neurons, others)
        replay = replay or Replay(self.anatomy, inputs, read, self.limit, keep)
        replay.ways = self._ways
        return replay

    def _runs_ahead(self, edits: Sequence[SiteEdit], length: int) -> bool:
        """Whether edits of an example with `length` tokens run in its recording pass."""
        heads = bool(edits) and all(edit.is_head for edit in edits)
        return self._ways.ahead and heads and len(edits) < self.limit.rows(length)

    def _is_known(self, inputs: Mapping[str, Any]) -> bool:
        """Whether an earlier run has proven the replay of this model on inputs of this form."""
        found = None if self._proofs is None else self._proofs.find(REPLAY, _form(inputs))
        if found in [list(ways) for ways in WAYS]:
            self._ways, self._proven = Ways(*found), True
        return self._proven

    def _prove(self, replay: "Replay", inputs: Mapping[str, Any], full: FullPasses) -> None:
        """Find the first of `WAYS` that is exact; `inexact` is what the first one lacks if none is."""
        reasons: list[str] = []
        for ways in WAYS:
            replay.ways = ways
            reason = _difference(replay, inputs, full)
            if reason is None:
                self._ways, self._proven = ways, True
                if self._proofs is not None:
                    self._proofs.keep(REPLAY, _form(inputs), list(ways))
                return
            reasons.append(reason)
        self.inexact, self._proven = reasons[0], True


class Ways(NamedTuple):
    """How layers are called again.

    `ahead`: edits of heads that are known beforehand run in the call for the unedited pass; see
    `hones_eval.engine.ahead`.
    `shared`: rows with edited heads take part in the call of the rows that were edited in lower layers, whose
    attention is called without them. This is not exact where a layer uses more of its attention than the
    output.
    `narrow`: in the last layer the output projections compute only the positions that are read. This is not
    exact where something mixes tokens after them, as a convolution after the attention.
    `broadcast`: attention masks and position embeddings of one row are passed as they are. Some sparse
    attentions look them up by row instead, and need them once per row.
    """

    ahead: bool
    shared: bool
    narrow: bool
    broadcast: bool


WAYS = [
    Ways(True, True, True, True),
    Ways(False, True, True, True),
    Ways(False, False, True, True),
    Ways(False, False, True, False),
    Ways(False, False, False, False),
]
"""What is tried in order, from the cheapest."""


REPLAY = "replay equals hooked forwards"
"""The name of the proof, where it is kept."""


def _form(inputs: Mapping[str, Any]) -> list[str]:
    """The names of a model's inputs, and whether some tokens are padding."""
    mask = inputs.get("attention_mask")
    return [*sorted(inputs), "whole" if mask is None or bool(mask.all()) else "padded"]


def _tokens_at_once(anatomy: Anatomy) -> int:
    """The tokens per layer call: few on a CPU, to stay in its caches; on a GPU what fits into memory."""
    weight, device = anatomy.unembed.weight, anatomy.device
    if device.type != "cuda":
        return 2048
    free, _ = torch.cuda.mem_get_info(device)
    shape = anatomy.shape
    neurons = max([getattr(site.module, "width_per_token", site.width) for site in anatomy.neurons_in])
    # Per token: three tensors as wide as the FFN (or as the experts that it is routed to), a dozen as wide as
    # the residual stream, and the keys and values that every layer keeps for decoding (at most as many as
    # there are query heads).
    kept = 2 * shape.layers * shape.heads * shape.head_width
    per_token = (3 * neurons + 12 * shape.hidden + kept) * weight.element_size()
    return max(1, int(0.5 * free) // per_token)


@dataclass(frozen=True, eq=False)
class _LayerCall:
    """The arguments and results of one decoder layer's call; `x` and `output` are [1, tokens, hidden]."""

    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    returned: Any
    heads: Tensor
    neurons: Tensor
    attended: Any


class Replay:
    """The recorded pass of one example, from which edited passes restart."""

    def __init__(
        self, anatomy: Anatomy, inputs: Mapping[str, Any], read: int, limit: RowLimit, keep: bool = False
    ) -> None:
        """Run and record the unedited pass, of which the last `read` positions are read.

        With `keep`, `keys_values` are its keys and values by layer; otherwise None.
        """
        self.anatomy = anatomy
        self.ways = WAYS[0]
        self.read = slice(-read, None)
        self.limit = limit
        self.length = own_tokens(inputs).shape[-1]
        # Models with cross-attention have caches of two kinds; their answers are decoded from the start.
        cache = RecordedCache(anatomy.decoder.config) if keep and not anatomy.reads_states else None
        cached = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        output = self._record(lambda: anatomy.model(**inputs, **cached))
        self.keys_values = None if cache is None else cache.of_layers(len(self._calls))
        self.base_logits: Tensor = output.logits[0, self.read]

    def _record(self, run: Callable[[], Any]) -> Any:
        """Run the model once, and keep every layer's call and what is added between layers."""
        # What the layers of one stage of a walk returned, and for how many rows; None outside of walks.
        self._returned: list[tuple[Any, int]] | None = None
        self.cache: Any = KeptByLayer()  # replaces the model's cache, where the recorded pass had one
        with _recording_calls(self.anatomy, getattr(self, "read", None)) as calls:
            output = run()
        self._calls = [_LayerCall(**entry) for entry in calls]
        self._between = [self._added_after(i) for i in range(len(calls) - 1)]
        return output

    def base_neurons(self) -> list[Tensor]:
        """FFN activations [read, I] of the unedited pass, one per layer."""
        found = []
        for layer, call in enumerate(self._calls):
            z = call.neurons[:, self.read] if self.anatomy.has_plain_ffn(layer) else call.neurons
            found.append(self.anatomy.padded(z)[0])
        return found

    @torch.no_grad()
    def edited(
        self,
        edits: Sequence[SiteEdit],
        on_neurons: NeuronReader | None = None,
        on_keys: KeyReader | None = None,
    ) -> Iterator[Rows]:
        """See `Passes.edited`; `on_keys` receives keys and values of the rows edited below each layer."""
        # Within a layer heads come before neurons, so that each kind joins as one batch.
        order = sorted(range(len(edits)), key=lambda i: (edits[i].site.layer, not edits[i].is_head))

        def run(chunk: Sequence[int]) -> Rows:
            chosen = [edits[i] for i in chunk]

            def enter(layer: int, members: list[int]) -> Tensor:
                return self._enter(layer, [chosen[i] for i in members])

            def heads(layer: int, members: list[int]) -> list[SiteEdit]:
                return [chosen[i] for i in members if chosen[i].is_head] if self._can_share(layer) else []

            layers = [edit.site.layer for edit in chosen]
            return Rows(chosen, self.walk(layers, enter, chunk, on_neurons, on_keys, heads))

        yield from self.limit.chunks(order, self.length, run)

    def walk(
        self,
        layers: Sequence[int],
        enter: Callable[[int, list[int]], Tensor],
        numbers: Sequence[int],
        on_neurons: NeuronReader | None = None,
        on_keys: KeyReader | None = None,
        sharing: Callable[[int, list[int]], list[SiteEdit]] | None = None,
    ) -> Tensor:
        """Walk up the layers once with a growing batch, and return logits [rows, read, vocabulary].

        Args:
            layers: the layer that each row starts at, ascending.
            enter: returns the output [members, tokens, hidden] of a layer for the rows that start there; it
                is given the layer and the indices of these rows in `layers`.
            numbers: the number that `on_neurons` and `on_keys` receive for each row.
            on_neurons: see `Passes.edited`.
            on_keys: see `edited`. Up to the layer a row starts at, its keys and values are the recorded ones.
            sharing: returns the edits of heads of the first of the rows that start at a layer, which then
                share the call of the rows below and do not go through `enter`.
        """
        hidden: Tensor | None = None
        carried: dict[int, Tensor] = {}
        joined = 0
        for stage in self.anatomy.stages:
            if stage[-1] < layers[0]:
                continue
            parts = []
            self._returned = []
            starting = {at: [i for i, start in enumerate(layers) if start == at] for at in stage}
            if hidden is not None:
                shared = sharing(stage[-1], starting[stage[-1]]) if sharing is not None else []
                below, count = joined, len(shared)
                joined += count
                with self._reading(stage, numbers[:joined], on_neurons):
                    parts.append(self._call_with(stage[-1], hidden, carried, shared))
                if on_keys is not None:
                    on_keys(stage[-1], numbers[:below], self.cache.kept)
                starting[stage[-1]] = starting[stage[-1]][count:]
            for layer, members in starting.items():
                if members:
                    above = range(layer, stage.stop)
                    with self._reading(above, [numbers[i] for i in members], on_neurons):
                        parts.append(enter(layer, members))
                    joined += len(members)
            hidden = self._joined(parts)
            carried = self._carried(stage[-1])
            if stage[-1] < len(self._between) and (added := self._between[stage[-1]]) is not None:
                hidden = hidden + added
        self._returned = None
        assert hidden is not None  # the walk starts at the layer of the first row
        return self.anatomy.last_logits(hidden, self.read)

    def _can_share(self, layer: int) -> bool:
        """Whether rows with edited heads may take part in the call of a layer on other rows.

        Not where the layer is called with, or returns, something else of each row than its hidden states.
        """
        anatomy, call = self.anatomy, self._calls[layer]
        if not self.ways.shared or not anatomy.one_stream or len(anatomy.stage_of(layer)) > 1:
            return False
        more = call.returned[1:] if isinstance(call.returned, tuple) else ()
        by_row = [value for value in by_row_only(call.args, call.kwargs) if not is_cache(value)]
        return not by_row and not any(isinstance(item, Tensor) for item in more)

    def _call_with(
        self, layer: int, hidden: Tensor, carried: Mapping[int, Tensor], edits: list[SiteEdit]
    ) -> Tensor:
        """Call a layer on rows from below and on rows whose heads are edited in it, in this order.

        The attention is called on the rows from below only; the others have its recorded output with the
        edit.
        """
        if not edits:
            return self.call(layer, hidden, carried=carried)
        attention, count = self.anatomy.attentions[layer], len(hidden)
        mixed, forward = self._mixed(layer, edits), attention.forward

        def attend(*args: Any, **kwargs: Any) -> Any:
            return with_more_rows(on_first_rows(forward, count, args, kwargs), mixed)

        with replaced_forward(attention, attend):
            rows = self._rows(self._calls[layer].x, len(edits))
            return self.call(layer, torch.cat([hidden, rows]), carried=carried)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Hidden states of several groups of rows as one batch."""
        return torch.cat(list(parts), dim=self.anatomy.token_dim - 1) if len(parts) > 1 else parts[0]

    def _carried(self, layer: int) -> dict[int, Tensor]:
        """What a layer returned beside its hidden states in the calls of this stage, as one batch.

        A few models hand such a tensor to the next layer, for example the tokens that sparse attention has
        chosen. By the `id` of the recorded tensor that it replaces.
        """
        recorded, calls = self._calls[layer].returned, self._returned or []
        found: dict[int, Tensor] = {}
        for i, item in enumerate(recorded[1:] if isinstance(recorded, tuple) else (), 1):
            # Rows that enter with a replaced attention get what it returned when it was recorded, once.
            if isinstance(item, Tensor) and all(len(output[i]) in (1, rows) for output, rows in calls):
                parts = [output[i].expand(rows, *output[i].shape[1:]) for output, rows in calls]
                found[id(item)] = torch.cat(parts)
        return found

    def _enter(self, layer: int, edits: list[SiteEdit]) -> Tensor:
        """The output of a layer for the rows that are edited in it: heads first, then neurons."""
        heads = [edit for edit in edits if edit.is_head]
        neurons = [edit for edit in edits if not edit.is_head]
        parts = [self._enter_heads(layer, heads)] if heads else []
        parts += [self._enter_neurons(layer, neurons)] if neurons else []
        return self._joined(parts)

    def _enter_heads(self, layer: int, edits: list[SiteEdit]) -> Tensor:
        """The layer's output with edited heads: only its output projection and the FFN run again."""
        call, mixed = self._calls[layer], self._mixed(layer, edits)
        below = range(self.anatomy.stage_of(layer).start, layer)
        with (
            self._attending_as_recorded(below, len(edits)),
            replaced_forward(self.anatomy.attentions[layer], returning(call.attended, mixed)),
        ):
            return self.call(layer, self._rows(call.x, len(edits)), attending=False)

    def _mixed(self, layer: int, edits: list[SiteEdit]) -> Tensor:
        """The recorded output of a layer's attention with the edit of each row."""
        edited = edit_recorded_heads(self._calls[layer].heads, edits, self.anatomy)
        return self._on_read(layer, self.anatomy.heads_in[layer].module, edited)

    def _enter_neurons(self, layer: int, edits: list[SiteEdit]) -> Tensor:
        """The layer's output with edited neurons: only its down projection runs again."""
        call, site = self._calls[layer], self.anatomy.neurons_in[layer]
        if not self.anatomy.has_plain_ffn(layer):
            return self._enter_experts(layer, edits)
        edited = edit_rows(self._rows(call.neurons, len(edits)), self._by_row(edits), self.anatomy)
        written = self._on_read(layer, site.module, edited)
        with (
            self._attending_as_recorded(self.anatomy.stage_of(layer), len(edits)),
            replaced_forward(self.anatomy.ffns[layer], lambda *_, **__: written),
        ):
            return self.call(layer, self._rows(call.x, len(edits)), narrow=False)

    def _enter_experts(self, layer: int, edits: list[SiteEdit]) -> Tensor:
        """The layer's output with edited neurons of experts: all but its attention runs again."""
        call, site = self._calls[layer], self.anatomy.neurons_in[layer]
        rows = RowEdits(self._by_row(edits), self.anatomy)
        stage = self.anatomy.stage_of(layer)
        with self._attending_as_recorded(stage, len(edits)), editing([(site, rows)]):
            return self.call(layer, self._rows(call.x, len(edits)), narrow=False)

    @contextmanager
    def _attending_as_recorded(self, layers: Sequence[int], count: int) -> Iterator[None]:
        """Replace the attention of some layers by its recorded output, repeated for `count` edits."""
        with ExitStack() as stack:
            for layer in layers:
                if not self.anatomy.heads_in[layer].width:
                    continue
                recorded = self._calls[layer].attended
                mixed = self._rows(tensor_of(recorded), count)
                stack.enter_context(
                    replaced_forward(self.anatomy.attentions[layer], returning(recorded, mixed))
                )
            yield

    def _rows(self, recorded: Tensor, count: int) -> Tensor:
        """A recorded tensor [1, tokens, width], or several streams, repeated for `count` edits."""
        sizes = [-1] * recorded.ndim
        sizes[0 if recorded.ndim == 3 else self.anatomy.token_dim - 1] = count
        return recorded.expand(sizes)

    def _by_row(self, edits: Sequence[SiteEdit]) -> list[tuple[int, SiteEdit]]:
        """The edit of each row."""
        return list(enumerate(edits))

    def _on_read(self, layer: int, module: nn.Module, x: Tensor) -> Tensor:
        """Apply a position-wise module; in the last layer, only to the positions that are read."""
        if layer < len(self._calls) - 1 or not self.ways.narrow:
            return tensor_of(module(x))
        return self._only_read(module, x)

    def _only_read(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a position-wise function to the positions that are read; the result is zero elsewhere."""
        return only_read(function, self.read, x)

    def call(
        self,
        layer: int,
        hidden: Tensor,
        narrow: bool = True,
        attending: bool = True,
        carried: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Call a decoder layer on hidden states [rows, tokens, hidden] with its recorded arguments.

        Recorded arguments whose `id` is in `carried` are replaced; see `_carried`.

        In the last layer, with `narrow`, the FFN and the attention's output projection compute only what is
        read. `attending` is false where the attention's output is replaced.
        """
        call = self._calls[layer]
        rows, instead = hidden.shape[self.anatomy.token_dim - 1], carried or {}
        args = [instead.get(id(value), self._argument(value, rows)) for value in call.args]
        kwargs = {
            name: instead.get(id(value), self._argument(value, rows, name))
            for name, value in call.kwargs.items()
        }
        with ExitStack() as stack:
            if narrow and self.ways.narrow and layer == len(self._calls) - 1:
                for module in self._narrow_modules(layer, attending):
                    stack.enter_context(self._narrowed(module))
            output = self.anatomy.layers[layer](hidden, *args, **kwargs)
        if self._returned is not None:
            self._returned.append((output, rows))
        return tensor_of(output)

    def _argument(self, value: Any, rows: int, name: str = "") -> Any:
        """A recorded argument of a layer, expanded to a number of rows."""
        if is_cache(value):
            return self.cache
        return argument_of_rows(value, rows, name, self.ways.broadcast)

    def _narrow_modules(self, layer: int, attending: bool) -> list[nn.Module]:
        """The position-wise modules of a layer that may compute the positions that are read alone."""
        plain = [self.anatomy.ffns[layer]] if self.anatomy.has_plain_ffn(layer) else []
        site = self.anatomy.heads_in[layer]
        return [*plain, site.module] if site.width and attending else plain

    @contextmanager
    def _narrowed(self, module: nn.Module) -> Iterator[None]:
        """Make a position-wise module compute only the positions that are read."""
        forward = module.forward
        with replaced_forward(module, lambda x: self._only_read(forward, x)):
            yield

    @contextmanager
    def _reading(
        self, layers: Sequence[int], rows: Sequence[int], on_neurons: NeuronReader | None
    ) -> Iterator[None]:
        """Pass the neurons of layers of one decoder layer, which is called in the block, to `on_neurons`."""
        with ExitStack() as stack:
            for layer in layers if on_neurons is not None else ():
                stack.enter_context(self._reading_layer(layer, rows, on_neurons))  # type: ignore[arg-type]
            yield

    @contextmanager
    def _reading_layer(self, layer: int, rows: Sequence[int], on_neurons: NeuronReader) -> Iterator[None]:
        if not self.anatomy.neurons_in[layer].width:
            yield
            zeros = self.base_logits.new_zeros(len(rows), len(self.base_logits), self.anatomy.shape.neurons)
            on_neurons(layer, torch.tensor(list(rows)), zeros)
            return
        parts: list[Tensor] = []  # edited heads and edited neurons pass through a layer in separate calls
        with uncompiled(), recording_calls(self.anatomy.neurons_in[layer], self.read, parts):
            yield
        on_neurons(layer, torch.tensor(list(rows)), self.anatomy.padded(torch.cat(parts)))

    def _added_after(self, layer: int) -> Tensor | None:
        if self.anatomy.layers[layer] is self.anatomy.layers[layer + 1]:
            return None
        before, after = self._calls[layer].output, self._calls[layer + 1].x
        if before is after or torch.equal(before, after.to(before.device)):
            return None
        return after - before.to(after.device)


def _difference(replay: Replay, inputs: Mapping[str, Any], full: FullPasses) -> str | None:
    """Why replay is not exact for this model, or None.

    Compared are the logits under edits of one head of the first, a middle and the last layer, and of a
    neuron.
    """
    trial = trial_edits(replay.anatomy.shape)
    expected = {rows.edits[0]: rows.logits[0] for rows in full.edited(trial)}
    try:
        found = list(replay.edited(trial))
        if replay.ways.ahead:
            found += _trial_ahead(replay, inputs, [edit for edit in trial if edit.is_head])
    except (AttributeError, HonesError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"its decoder layers cannot be re-run with a different batch size ({first_line(error)})"
    pairs = [(expected[edit], logits) for rows in found for edit, logits in zip(*rows, strict=True)]
    largest = max(float(logits.abs().max()) for logits in expected.values())
    worst = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max()) / largest
    if not worst <= ROUNDING[full.base_logits.dtype]:
        return f"replayed logits differ from those of full forwards by {worst:.1e} of the largest logit"
    return None


def _trial_ahead(replay: Replay, inputs: Mapping[str, Any], edits: Sequence[SiteEdit]) -> Iterator[Rows]:
    """The logits under edits of heads that run in the recording pass.

    Raises: TypeError where the model's layers do not allow it.
    """
    if not can_run_ahead(replay.anatomy):
        raise TypeError("a decoder layer has another form than one attention and one FFN")
    read = len(replay.base_logits)
    return AheadPasses(replay.anatomy, inputs, read, edits, False, lambda: replay).edited(edits)


def trial_edits(shape: ModelShape) -> list[SiteEdit]:
    """Edits by which replay is compared with hooked forwards, in ascending order of their layers.

    They are of one head of the first, a middle and the last layer that has heads, and of the first neuron
    of the last layer that has neurons.
    """
    headed = [layer for layer in range(shape.layers) if shape.heads_of(layer)]
    layers = sorted({headed[0], headed[len(headed) // 2], headed[-1]})
    last = max(layer for layer in range(shape.layers) if shape.neurons_of(layer))
    heads = replaced_by_mean([Head(layer, layer % shape.heads_of(layer)) for layer in layers])
    return sorted([*heads, SiteEdit(Neuron(last, 0), "mask")], key=lambda e: (e.site.layer, not e.is_head))


@contextmanager
def _recording_calls(anatomy: Anatomy, read: slice | None) -> Iterator[list[dict[str, Any]]]:
    """Record every layer's arguments, output, heads and neurons, and its attention's output."""
    calls: list[dict[str, Any]] = [{} for _ in anatomy.layers]

    def called(i: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            x = args[0] if args else rest.pop("hidden_states")
            calls[i] |= {"x": x, "args": args[1:], "kwargs": rest}

        return keep

    def returned(i: int, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[i][name] = tensor_of(output) if name == "output" else output
            if name == "output":
                calls[i]["returned"] = output

        return keep

    handles = []
    for i, layer in enumerate(anatomy.layers):
        handles.append(layer.register_forward_pre_hook(called(i), with_kwargs=True))
        handles.append(layer.register_forward_hook(returned(i, "output")))
        handles.append(anatomy.attentions[i].register_forward_hook(returned(i, "attended")))
    try:
        layers = range(len(calls))
        plain = [anatomy.neurons_in[i] for i in layers if anatomy.has_plain_ffn(i)]
        experts = [site for site in present(anatomy.neurons_in) if site not in plain]
        with recording([*present(anatomy.heads_in), *plain]) as inputs, recording(experts, read) as routed:
            yield calls
        nothing = calls[0]["x"].new_zeros(*calls[0]["x"].shape[:2], 0)
        for i, entry in enumerate(calls):
            entry["heads"] = inputs.get(anatomy.heads_in[i].name, nothing)
            name = anatomy.neurons_in[i].name
            entry["neurons"] = inputs.get(
                name, routed.get(name, nothing if read is None else nothing[:, read])
            )
    finally:
        for handle in handles:
            handle.remove()
