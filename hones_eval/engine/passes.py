"""Edited forward passes of one example: their interface, and its plain implementation by hooked forwards.

`SiteEdit` names one edit, `Passes` is the interface, and `FullPasses` implements it with one hooked forward
per edit, which is exact for every model. `hones_eval.engine.replay` implements the same interface faster and
is checked against `FullPasses`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from hones_eval.core import edits
from hones_eval.core.anatomy import ROUNDING as ROUNDING
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.experts import Routed
from hones_eval.core.head_edits import head_edit, replace_heads_in_rows
from hones_eval.core.hooks import Edit, Site, recording
from hones_eval.core.scope import ScopeTracker, editing_in
from hones_eval.core.sites import Head, Neuron
from hones_eval.errors import HonesError

T = TypeVar("T")
Result = TypeVar("Result")

# Called per layer: the layer, the numbers of the rows that passed it [rows], FFN activations [rows, read, I].
NeuronReader = Callable[[int, Tensor, Tensor], None]


class OtherExample:
    """Head outputs at the last prompt token of another example, for edits that need them.

    The holder is compared by identity, and is filled anew for every example: so the same `SiteEdit` serves a
    whole pass, and tells which edit a row belongs to.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.heads: list[Tensor] = []
        """Per layer [heads, width]."""


class SiteEdit(NamedTuple):
    """An edit of one site at every position.

    `how` is `mask`, which sets a neuron to zero, or the name of a head edit (see
    `hones_eval.core.head_edits`): `mean` replaces a head by the mean of the layer's other heads, and `zero`
    sets a head to zero. `how` also tells heads from neurons, because `Head` and `Neuron` tuples can be equal.
    `other` holds what a head edit needs of another example.
    """

    site: Head | Neuron
    how: str = "mean"
    other: OtherExample | None = None

    @property
    def is_head(self) -> bool:
        """Whether the site is a head."""
        return self.how != "mask"


def replaced_by_mean(heads: Sequence[Head]) -> list[SiteEdit]:
    """Mean replacement of each of some heads, the edit of HONES 1 and V-SEAM 3."""
    return [SiteEdit(head) for head in heads]


class Rows(NamedTuple):
    """Some of the requested edits, and the logits [rows, read, vocabulary] under each."""

    edits: list[SiteEdit]
    logits: Tensor

    @property
    def heads(self) -> list[Head]:
        """The edited heads, where all edits are of heads."""
        return [edit.site for edit in self.edits if isinstance(edit.site, Head)]


class Passes(Protocol):
    """The unedited and edited passes of one example, as `Replay` and `FullPasses` provide them."""

    base_logits: Tensor

    def base_neurons(self) -> list[Tensor]:
        """FFN activations [read, I] of the unedited pass, by layer."""

    def edited(self, edits: Sequence[SiteEdit], on_neurons: NeuronReader | None = None) -> Iterator[Rows]:
        """Yield the logits under each edit alone, several edits at a time.

        `on_neurons` receives, for every layer at or above a row's edit, the index of the row's edit in
        `edits` and the FFN activations at the read positions. Below an edit they equal `base_neurons`.
        """


def check_finite(passes: Passes, where: str) -> None:
    """Raise HonesError with the first layer whose FFN activations are not finite, if the logits are not.

    `where` names the example.
    """
    if bool(torch.isfinite(passes.base_logits).all()):
        return
    _refuse(dict(enumerate(passes.base_neurons())), where)


def refuse_not_finite(anatomy: Anatomy, inputs: Mapping[str, Any], where: str) -> NoReturn:
    """Run one pass of the model as it is now, and raise HonesError as `check_finite` does."""
    sites = present(anatomy.neurons_in)
    with recording(sites) as kept, torch.no_grad():
        anatomy.model(**inputs, use_cache=False)
    layers = {site.name: layer for layer, site in enumerate(anatomy.neurons_in)}
    _refuse({layers[site.name]: kept[site.name] for site in sites}, where)


def _refuse(neurons: Mapping[int, Tensor], where: str) -> NoReturn:
    """Raise HonesError with the first layer, of activations by layer, that is not finite."""
    for layer, z in neurons.items():
        if not bool(torch.isfinite(z).all()):
            raise HonesError(f"{where}: the FFN activations of layer {layer} are not finite")
    raise HonesError(f"{where}: the model's logits are not finite")


class FullPasses:
    """Edited passes by one hooked forward per edit: slow, exact for every model, the reference for replay."""

    def __init__(
        self,
        anatomy: Anatomy,
        inputs: Mapping[str, Any],
        read: int,
        tracker: ScopeTracker | None = None,
    ) -> None:
        """Run the unedited pass; the last `read` positions are read, and all but the first are an answer's.

        `tracker` knows the tokens that edits act on; by default all.
        """
        self._tracker, self._answer = tracker, read - 1
        self.anatomy = anatomy
        self.inputs = inputs
        self.read = slice(-read, None)
        with recording(present(anatomy.neurons_in), self.read) as neurons:
            self.base_logits: Tensor = self._forward()
        self._neurons = [recorded_neurons(anatomy, i, neurons, read)[0] for i in range(anatomy.shape.layers)]

    def base_neurons(self) -> list[Tensor]:
        """FFN activations [read, I] of the unedited pass, by layer."""
        return self._neurons

    @torch.no_grad()
    def edited(self, edits: Sequence[SiteEdit], on_neurons: NeuronReader | None = None) -> Iterator[Rows]:
        """See `Passes.edited`."""
        for number, edit in enumerate(edits):
            with (
                editing_in(self._tracker, list(site_edits(self.anatomy, [edit])), self._answer),
                recording(present(self.anatomy.neurons_in), self.read) as neurons,
            ):
                logits = self._forward()
            if on_neurons is not None:
                for layer in range(edit.site.layer, self.anatomy.shape.layers):
                    z = recorded_neurons(self.anatomy, layer, neurons, logits.shape[0])
                    on_neurons(layer, torch.tensor([number]), z)
            yield Rows([edit], logits[None])

    def _forward(self) -> Tensor:
        logits: Tensor = self.anatomy.model(**self.inputs, use_cache=False).logits
        return logits[0, self.read]


def present(sites: Sequence[Site]) -> list[Site]:
    """The sites of layers that have one: some layers have no heads, or no neurons."""
    return [site for site in sites if site.width]


def recorded_neurons(anatomy: Anatomy, layer: int, kept: Mapping[str, Tensor], read: int) -> Tensor:
    """Recorded FFN activations [rows, read, I] of a layer, with zeros for neurons that it lacks."""
    site = anatomy.neurons_in[layer]
    if not site.width:
        dtype, device = anatomy.unembed.weight.dtype, anatomy.device
        return torch.zeros(1, read, anatomy.shape.neurons, dtype=dtype, device=device)
    return anatomy.padded(kept[site.name])


@torch.no_grad()
def last_activations(anatomy: Anatomy, inputs: Mapping[str, Any], count: int) -> tuple[Tensor, Tensor]:
    """Activations at the last tokens of one prompt, float64 on the CPU; 0 where a layer lacks the site.

    Returns: those of heads [count, L, H, d] and of neurons [count, L, I].
    """
    shape = anatomy.shape
    with recording(present([*anatomy.heads_in, *anatomy.neurons_in]), slice(-count, None)) as kept:
        anatomy.model(**inputs, use_cache=False)
    heads = torch.zeros(count, shape.layers, shape.heads, shape.head_width, dtype=torch.float64)
    for layer, site in enumerate(anatomy.heads_in):
        own, width = shape.heads_of(layer), shape.head_width_of(layer)
        if site.width and own:
            heads[:, layer, :own, :width] = kept[site.name][0].double().cpu().view(count, own, width)
    neurons = [
        recorded_neurons(anatomy, layer, kept, count)[0].double().cpu() for layer in range(shape.layers)
    ]
    return heads, torch.stack(neurons, dim=1)


def site_edits(anatomy: Anatomy, edits: Sequence[SiteEdit]) -> Iterator[tuple[Site, Edit]]:
    """Edits for hooks on a batch of rows: `edits[i]` acts in row `i` only; one hook per linear layer."""
    return edits_of_rows(anatomy, list(enumerate(edits)))


def edits_of_rows(anatomy: Anatomy, edits: Sequence[tuple[int, SiteEdit]]) -> Iterator[tuple[Site, Edit]]:
    """The same for edits given as (row, edit); rows without an edit are unchanged."""
    places = sorted({(edit.site.layer, edit.is_head) for _, edit in edits})
    for layer, is_head in places:
        here = [(i, e) for i, e in edits if (e.site.layer, e.is_head) == (layer, is_head)]
        site = (anatomy.heads_in if is_head else anatomy.neurons_in)[layer]
        yield site, RowEdits(here, anatomy)


class RowEdits:
    """The edits of one linear layer's input, each in its own row of the batch."""

    def __init__(self, chosen: Sequence[tuple[int, SiteEdit]], anatomy: Anatomy) -> None:
        """Make the edits `chosen`, as (row, edit), all of one layer and of one kind of site."""
        self._chosen, self._anatomy = list(chosen), anatomy
        if chosen[0][1].how == "mask":
            self.routed = self._masked

    def __call__(self, x: Tensor) -> Tensor:
        """See `edit_rows`."""
        return edit_rows(x, self._chosen, self._anatomy)

    def _masked(self, part: Routed) -> Tensor:
        """Set masked neurons to zero where their row's tokens are routed to their expert."""
        width = part.values.shape[-1]
        wanted = [(row, edit.site[1] - part.start) for row, edit in self._chosen]
        here = [
            (row, *divmod(number, width)) for row, number in wanted if 0 <= number < part.expert_count * width
        ]
        if not here:
            return part.values
        rows, experts, columns = torch.tensor(here, device=part.values.device).T[..., None]
        hit = (part.rows == rows) & (part.experts == experts)  # [edits, pairs]
        edit, pair = torch.nonzero(hit).T
        return part.values.index_put((pair, columns[edit, 0]), part.values.new_zeros(()))


def edit_rows(x: Tensor, chosen: Sequence[tuple[int, SiteEdit]], anatomy: Anatomy) -> Tensor:
    """Apply each row's own edit to the input [rows, tokens, width] of one linear layer."""
    layer = chosen[0][1].site.layer
    for how, other in dict.fromkeys((edit.how, edit.other) for _, edit in chosen):
        these = [(row, edit.site[1]) for row, edit in chosen if (edit.how, edit.other) == (how, other)]
        rows, sites = torch.tensor(these, device=x.device).T
        if how == "mask":
            x = edits.zero_neurons_in_rows(x, rows, sites)
        else:
            values = other.heads[layer] if other is not None else None
            heads = anatomy.shape.heads_of(layer)
            x = replace_heads_in_rows(x, rows, sites, heads, head_edit(how), values)
    return x


def edit_recorded_heads(x: Tensor, edits: Sequence[SiteEdit], anatomy: Anatomy) -> Tensor:
    """Apply each of some edits of heads of one layer to a recorded input [sequences, tokens, width].

    Every replacement is computed once, and not once per edit.

    Returns: [edits * sequences, tokens, width], with the sequences of one edit next to each other.
    """
    layer = edits[0].site.layer
    split: Tensor = x.unflatten(-1, (anatomy.shape.heads_of(layer), -1))
    edited: Tensor = split.repeat(len(edits), 1, 1, 1).unflatten(0, (len(edits), -1))
    for how, other in dict.fromkeys((edit.how, edit.other) for edit in edits):
        these = [(i, e.site[1]) for i, e in enumerate(edits) if (e.how, e.other) == (how, other)]
        numbers, chosen = torch.tensor(these, device=x.device).T
        values = other.heads[layer] if other is not None else None
        replacement = head_edit(how).replacement(split, values)
        edited[numbers, :, :, chosen] = replacement[:, :, chosen].movedim(2, 0)
    return edited.flatten(0, 1).flatten(-2)


class RowLimit:
    """The number of edited passes that run at once: a fixed number of rows, or a budget of tokens."""

    def __init__(self, rows: int | None, tokens: int) -> None:
        """`rows` takes precedence over `tokens`, the number of tokens of all rows together."""
        if rows is not None and rows < 1:
            raise HonesError(f"the number of rows to replay at once must be at least 1, not {rows}")
        self._rows, self._tokens = rows, tokens

    def rows(self, length: int) -> int:
        """The number of rows at once when each has `length` tokens; at least one."""
        return max(1, self._tokens // length) if self._rows is None else self._rows

    def chunks(
        self, items: Sequence[T], length: int, run: Callable[[Sequence[T]], Result]
    ) -> Iterator[Result]:
        """Call `run` on one chunk of the items after another, and yield its results.

        A chunk that does not fit into memory is halved and tried again, and later chunks stay as small.
        Raises: HonesError when a single item does not fit into memory.
        """
        start = 0
        while start < len(items):
            chunk = items[start : start + self.rows(length)]
            try:
                result = run(chunk)
            except torch.OutOfMemoryError as error:
                self._halve(len(chunk), length, error)
                continue
            yield result
            start += len(chunk)

    def _halve(self, rows: int, length: int, error: torch.OutOfMemoryError) -> None:
        if rows == 1:
            raise HonesError(
                f"one edited pass of {length} tokens does not fit into the device's memory"
            ) from error
        if self._rows is None:
            self._tokens = rows // 2 * length
        else:
            self._rows = rows // 2
        torch.cuda.empty_cache()
