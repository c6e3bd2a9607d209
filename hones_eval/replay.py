"""Restart the decoder at a layer, with many edits as the rows of one batch.

A change of a head in layer `l` leaves all layers below `l` as they were. So one pass over an example is
recorded, and every edited pass starts from there: walking up the layers once with a growing batch, the rows
of layer `l` join the rows of the layers below, until one unembedding reads them all. What is shared is never
computed twice: the vision tower, the layers below an edit, the attention of the edited layer itself, and in
the last layer the FFN of positions that nobody reads.

No family's layer is known here. A layer is called as it was called in the recorded pass; what the model adds
between layers (deep-stack features, say) is the recorded input of one minus the recorded output of the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hones_eval import edits
from hones_eval.anatomy import Anatomy
from hones_eval.attach import Edit, Site, editing, recording
from hones_eval.errors import HonesError
from hones_eval.sites import Head, Neuron

# Largest difference of logits, relative to their largest size, that rounding explains.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

# Called for every layer with the rows that passed it: layer, rows [rows], FFN activations [rows, read, I].
NeuronReader = Callable[[int, Tensor, Tensor], None]


class SiteEdit(NamedTuple):
    """One site, edited at every position: a head becomes the `mean` of the others or `zero`, a neuron is
    masked (`mask`), which is zero as well. The word also tells heads from neurons, whose tuples can be equal.
    """

    site: Head | Neuron
    how: Literal["mean", "zero", "mask"] = "mean"

    @property
    def is_head(self) -> bool:
        """Whether the site is a head."""
        return self.how != "mask"


def replaced_by_mean(heads: Sequence[Head]) -> list[SiteEdit]:
    """HONES's and V-SEAM's edit for each of some heads."""
    return [SiteEdit(head) for head in heads]


class Rows(NamedTuple):
    """Some of the edits asked for, and the logits [rows, read, vocabulary] under each of them."""

    edits: list[SiteEdit]
    logits: Tensor

    @property
    def heads(self) -> list[Head]:
        """The edited heads, where all edits are of heads."""
        return [edit.site for edit in self.edits if isinstance(edit.site, Head)]


class Passes(Protocol):
    """What `Replay` and the plain forward passes both offer for one example."""

    base_logits: Tensor

    def base_neurons(self) -> list[Tensor]:
        """FFN activations [read, I] of the unedited pass, one a layer."""

    def edited(self, edits: Sequence[SiteEdit], on_neurons: NeuronReader | None = None) -> Iterator[Rows]:
        """Logits under one edit at a time, in cuts of rows.

        `on_neurons` receives, for every layer at or above a row's edit, the row's place among `edits` and
        its FFN activations at the read positions; layers below an edit are those of `base_neurons`.
        """


class Replayer:
    """Makes `Passes` for examples, by replay where that is exact for this model, else by full forwards."""

    def __init__(self, anatomy: Anatomy, rows: int | None = None) -> None:
        """Replay at most `rows` edited passes at once; by default as many as the device does best with."""
        if rows is not None and rows < 1:
            raise HonesError(f"at least one row has to be replayed at once, not {rows}")
        self.anatomy = anatomy
        self._rows = rows
        self.inexact: str | None = None
        self._proven = False

    @torch.no_grad()
    def record(self, inputs: Mapping[str, Any], read: int) -> Passes:
        """One unedited pass over an example (a batch of one); the last `read` positions are read.

        The first example is also the proof: its replayed logits must equal those of the hooked forward. If
        they do not, `inexact` says by how much, and all passes are full forwards from then on.
        """
        if inputs["input_ids"].shape[0] != 1:
            raise HonesError("replay takes one example at a time: heads are the rows of its batch")
        if self.inexact is None:
            replay = Replay(self.anatomy, inputs, read, self.rows_for(inputs))
            if not self._proven:
                self.inexact = _difference(replay, FullPasses(self.anatomy, inputs, read))
                self._proven = True
            if self.inexact is None:
                return replay
        return FullPasses(self.anatomy, inputs, read)

    def rows_for(self, inputs: Mapping[str, Any]) -> int:
        """How many edited passes over these inputs are run at once."""
        if self._rows is not None:
            return self._rows
        tokens = int(inputs["input_ids"].shape[-1])
        return max(1, _tokens_at_once(self.anatomy) // tokens)


def _tokens_at_once(anatomy: Anatomy) -> int:
    """Tokens in one layer call: few on a CPU, to stay in its caches; on a GPU what memory holds."""
    weight = anatomy.unembedding
    if weight.device.type != "cuda":
        return 1024
    free, _ = torch.cuda.mem_get_info(weight.device)
    shape = anatomy.shape
    # The FFN's three widest tensors, and a dozen of the residual stream's width beside them.
    per_token = (3 * shape.neurons + 12 * shape.hidden) * weight.element_size()
    return max(1, int(0.5 * free) // per_token)


@dataclass(frozen=True, eq=False)
class _LayerCall:
    """How one decoder layer was called, and what came out: `x` and `output` are [1, tokens, hidden]."""

    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    heads: Tensor
    neurons: Tensor
    attended: Any


class Replay:
    """One recorded pass of one example, from which edited passes restart."""

    def __init__(self, anatomy: Anatomy, inputs: Mapping[str, Any], read: int, rows: int) -> None:
        """Run the unedited pass; the logits and activations of the last `read` positions can be read."""
        self.anatomy = anatomy
        self.read = slice(-read, None)
        self.rows = rows
        with _taping(anatomy) as tape:
            logits = anatomy.model(**inputs, use_cache=False).logits
        self._calls = [_LayerCall(**tape[i]) for i in range(len(anatomy.layers))]
        self._between = [self._added_after(i) for i in range(len(anatomy.layers) - 1)]
        self.base_logits: Tensor = logits[0, self.read]

    def base_neurons(self) -> list[Tensor]:
        """FFN activations [read, I] of the unedited pass, one a layer."""
        return [call.neurons[0, self.read] for call in self._calls]

    @torch.no_grad()
    def edited(self, edits: Sequence[SiteEdit], on_neurons: NeuronReader | None = None) -> Iterator[Rows]:
        """See `Passes.edited`."""
        # Within a layer heads come before neurons, so that each kind enters together.
        order = sorted(range(len(edits)), key=lambda i: (edits[i].site.layer, not edits[i].is_head))
        for start in range(0, len(order), self.rows):
            cut = order[start : start + self.rows]
            chosen = [edits[i] for i in cut]

            def enter(layer: int, members: list[int], chosen: list[SiteEdit] = chosen) -> Tensor:
                return self._enter(layer, [chosen[i] for i in members])

            layers = [edit.site.layer for edit in chosen]
            yield Rows(chosen, self.walk(layers, enter, cut, on_neurons))

    def walk(
        self,
        layers: Sequence[int],
        enter: Callable[[int, list[int]], Tensor],
        numbers: Sequence[int],
        on_neurons: NeuronReader | None = None,
    ) -> Tensor:
        """Walk up the layers once with a growing batch; logits [rows, read, vocabulary] at the top.

        Args:
            layers: for every row the layer that it starts at, ascending.
            enter: gives the output [members, tokens, hidden] of a layer for the rows that start there, from
                the layer and their places in `layers`.
            numbers: what `on_neurons` is to call each row.
            on_neurons: see `Passes.edited`.
        """
        hidden: Tensor | None = None
        joined = 0
        for layer in range(layers[0], len(self._calls)):
            parts = []
            if hidden is not None:
                with self._reading(layer, numbers[:joined], on_neurons):
                    parts.append(self.call(layer, hidden))
            members = [i for i, start in enumerate(layers) if start == layer]
            if members:
                with self._reading(layer, [numbers[i] for i in members], on_neurons):
                    parts.append(enter(layer, members))
                joined += len(members)
            hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
            if layer < len(self._between) and (added := self._between[layer]) is not None:
                hidden = hidden + added
        assert hidden is not None  # the walk starts at the layer of the first row
        return self.anatomy.logits(hidden[:, self.read])

    def _enter(self, layer: int, edits: list[SiteEdit]) -> Tensor:
        """Output of a layer for rows edited in it: heads first, then neurons."""
        heads = [edit for edit in edits if edit.is_head]
        neurons = [edit for edit in edits if not edit.is_head]
        parts = [self._enter_heads(layer, heads)] if heads else []
        parts += [self._enter_neurons(layer, neurons)] if neurons else []
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _enter_heads(self, layer: int, edits: list[SiteEdit]) -> Tensor:
        """The layer's attention is not run again: only the mixing of its edited heads is."""
        call, site = self._calls[layer], self.anatomy.heads_in[layer]
        edited = edit_rows(call.heads.expand(len(edits), -1, -1), list(enumerate(edits)), self.anatomy)
        mixed = self._on_read(layer, site.module, edited)
        with _standing_in(self.anatomy.attentions[layer], _returning(call.attended, mixed)):
            return self.call(layer, call.x.expand(len(edits), -1, -1))

    def _enter_neurons(self, layer: int, edits: list[SiteEdit]) -> Tensor:
        """Neither attention nor the FFN's first half are run again."""
        call, site = self._calls[layer], self.anatomy.neurons_in[layer]
        edited = edit_rows(call.neurons.expand(len(edits), -1, -1), list(enumerate(edits)), self.anatomy)
        written = self._on_read(layer, site.module, edited)
        attended = call.attended[0] if isinstance(call.attended, tuple) else call.attended
        with (
            _standing_in(self.anatomy.attentions[layer], _returning(call.attended, attended)),
            _standing_in(self.anatomy.ffns[layer], lambda *_, **__: written),
        ):
            return self.call(layer, call.x.expand(len(edits), -1, -1), narrow=False)

    def _on_read(self, layer: int, module: nn.Module, x: Tensor) -> Tensor:
        """A position-wise module; in the last layer only the positions that are read."""
        if layer < len(self._calls) - 1:
            return _tensor(module(x))
        return _on_last(module, x, -self.read.start)

    def call(self, layer: int, hidden: Tensor, narrow: bool = True) -> Tensor:
        """A decoder layer on other hidden states [rows, tokens, hidden], called as in the recorded pass."""
        call = self._calls[layer]
        kwargs = {name: _per_row(value, len(hidden)) for name, value in call.kwargs.items()}
        with ExitStack() as stack:
            if narrow and layer == len(self._calls) - 1:
                for module in (self.anatomy.ffns[layer], self.anatomy.heads_in[layer].module):
                    stack.enter_context(_narrowed(module, -self.read.start))
            return _tensor(self.anatomy.layers[layer](hidden, *call.args, **kwargs))

    @contextmanager
    def _reading(self, layer: int, rows: Sequence[int], on_neurons: NeuronReader | None) -> Iterator[None]:
        if on_neurons is None:
            yield
            return
        parts: list[Tensor] = []  # heads and neurons enter a layer one after the other

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            parts.append(args[0][:, self.read])

        handle = self.anatomy.neurons_in[layer].module.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()
        on_neurons(layer, torch.tensor(list(rows)), torch.cat(parts))

    def _added_after(self, layer: int) -> Tensor | None:
        before, after = self._calls[layer].output, self._calls[layer + 1].x
        if before is after or torch.equal(before, after.to(before.device)):
            return None
        return after - before.to(after.device)


class FullPasses:
    """The same answers by one hooked forward a head: slow, exact for every model, and the reference."""

    def __init__(self, anatomy: Anatomy, inputs: Mapping[str, Any], read: int) -> None:
        """Run the unedited pass; see `Replay`."""
        self.anatomy = anatomy
        self.inputs = inputs
        self.read = slice(-read, None)
        with recording(anatomy.neurons_in, self.read) as neurons:
            self.base_logits: Tensor = self._forward()
        self._neurons = [neurons[site.name][0] for site in anatomy.neurons_in]

    def base_neurons(self) -> list[Tensor]:
        """FFN activations [read, I] of the unedited pass, one a layer."""
        return self._neurons

    @torch.no_grad()
    def edited(self, edits: Sequence[SiteEdit], on_neurons: NeuronReader | None = None) -> Iterator[Rows]:
        """See `Passes.edited`."""
        for number, edit in enumerate(edits):
            with (
                editing(list(site_edits(self.anatomy, [edit]))),
                recording(self.anatomy.neurons_in, self.read) as neurons,
            ):
                logits = self._forward()
            if on_neurons is not None:
                for layer in range(edit.site.layer, self.anatomy.shape.layers):
                    on_neurons(layer, torch.tensor([number]), neurons[self.anatomy.neurons_in[layer].name])
            yield Rows([edit], logits[None])

    def _forward(self) -> Tensor:
        logits: Tensor = self.anatomy.model(**self.inputs, use_cache=False).logits
        return logits[0, self.read]


def site_edits(anatomy: Anatomy, edits: Sequence[SiteEdit]) -> Iterator[tuple[Site, Edit]]:
    """For hooks on a batch of rows: edit `edits[i]` in row `i` alone, one hook a linear layer."""
    places = sorted({(edit.site.layer, edit.is_head) for edit in edits})
    for layer, is_head in places:
        here = [(i, e) for i, e in enumerate(edits) if (e.site.layer, e.is_head) == (layer, is_head)]
        site = (anatomy.heads_in if is_head else anatomy.neurons_in)[layer]
        yield site, partial(edit_rows, chosen=here, anatomy=anatomy)


def edit_rows(x: Tensor, chosen: Sequence[tuple[int, SiteEdit]], anatomy: Anatomy) -> Tensor:
    """The input [rows, tokens, width] of one linear layer with each row's own edit, of one kind of site."""
    for how in ("mean", "zero", "mask"):
        these = [(row, edit.site[1]) for row, edit in chosen if edit.how == how]
        if not these:
            continue
        rows, sites = torch.tensor(these, device=x.device).T
        if how == "mask":
            x = edits.zero_neurons_in_rows(x, rows, sites)
        elif how == "mean":
            x = edits.replace_heads_by_mean_in_rows(x, rows, sites, anatomy.shape.heads)
        else:
            x = edits.zero_heads_in_rows(x, rows, sites, anatomy.shape.heads)
    return x


def _difference(replay: Replay, full: FullPasses) -> str | None:
    """Why replay is not exact here, or None: one head of the first, a middle and the last layer."""
    shape = replay.anatomy.shape
    heads = sorted({Head(layer, layer % shape.heads) for layer in (0, shape.layers // 2, shape.layers - 1)})
    trial = [*replaced_by_mean(heads), SiteEdit(Neuron(shape.layers - 1, 0), "mask")]
    expected = torch.cat([rows.logits for rows in full.edited(trial)])
    try:
        found = torch.cat([rows.logits for rows in replay.edited(trial)])
    except (RuntimeError, TypeError, ValueError) as error:
        return f"its decoder layers cannot be called with other rows ({str(error).splitlines()[0]})"
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= ROUNDING[expected.dtype]:
        return f"replayed logits differ from those of the full forward by {worst:.1e} of the largest"
    return None


@contextmanager
def _taping(anatomy: Anatomy) -> Iterator[list[dict[str, Any]]]:
    """Record how every layer is called, its output, its heads, and its attention's output."""
    tape: list[dict[str, Any]] = [{} for _ in anatomy.layers]

    def called(i: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            x = args[0] if args else rest.pop("hidden_states")
            tape[i] |= {"x": x, "args": args[1:], "kwargs": rest}

        return keep

    def returned(i: int, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tape[i][name] = _tensor(output) if name == "output" else output

        return keep

    handles = []
    for i, layer in enumerate(anatomy.layers):
        handles.append(layer.register_forward_pre_hook(called(i), with_kwargs=True))
        handles.append(layer.register_forward_hook(returned(i, "output")))
        handles.append(anatomy.attentions[i].register_forward_hook(returned(i, "attended")))
    try:
        with recording([*anatomy.heads_in, *anatomy.neurons_in]) as inputs:
            yield tape
        for i, entry in enumerate(tape):
            entry["heads"] = inputs[anatomy.heads_in[i].name]
            entry["neurons"] = inputs[anatomy.neurons_in[i].name]
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another function in place of a module's forward, for one block."""
    attributes = vars(module)
    own = attributes.get("forward")  # accelerate puts a wrapped forward on the instance
    attributes["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own


def _returning(recorded: Any, first: Tensor) -> Callable[..., Any]:
    """A forward that returns what was recorded, with another first tensor."""
    result = (first, *recorded[1:]) if isinstance(recorded, tuple) else first
    return lambda *_, **__: result


@contextmanager
def _narrowed(module: nn.Module, last: int) -> Iterator[None]:
    """A position-wise module that computes only the last positions; the others come out as zeros."""
    forward = module.forward
    with _standing_in(module, lambda x: _on_last(forward, x, last)):
        yield


def _on_last(function: Callable[[Tensor], Tensor], x: Tensor, last: int) -> Tensor:
    narrow = function(x[:, -last:])
    wide = narrow.new_zeros(*x.shape[:-1], narrow.shape[-1])
    wide[:, -last:] = narrow
    return wide


def _per_row(value: Any, rows: int) -> Any:
    # Flash attention takes a mask [batch, tokens], which does not broadcast over rows as 4-D masks do.
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == 1 and value.dtype != torch.long:
        return value.expand(rows, -1)
    return value


def _tensor(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first
