"""Edited forward passes of one example, one site at a time: what is asked for, and the plain way to get it.

`hones_eval.engine.replay` gives the same faster; the plain way is exact for every model, and its reference.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from hones_eval.core import edits
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import Edit, Site, editing, recording
from hones_eval.core.sites import Head, Neuron
from hones_eval.errors import HonesError

T = TypeVar("T")
Result = TypeVar("Result")

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


def check_finite(passes: Passes, where: str) -> None:
    """Raise HonesError with the first layer whose FFN activations are not finite, if the logits are not.

    `where` names the example.
    """
    if bool(torch.isfinite(passes.base_logits).all()):
        return
    _refuse(passes.base_neurons(), where)


def refuse_not_finite(anatomy: Anatomy, inputs: Mapping[str, Any], where: str) -> NoReturn:
    """Raise HonesError as `check_finite` does, for the model as it is now, by a pass of its own."""
    with recording(anatomy.neurons_in) as kept, torch.no_grad():
        anatomy.model(**inputs, use_cache=False)
    _refuse([kept[site.name] for site in anatomy.neurons_in], where)


def _refuse(neurons: Sequence[Tensor], where: str) -> NoReturn:
    for layer, z in enumerate(neurons):
        if not bool(torch.isfinite(z).all()):
            raise HonesError(f"{where}: the FFN activations of layer {layer} are not finite")
    raise HonesError(f"{where}: the model's logits are not finite")


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


class RowLimit:
    """How many edited passes run at once: a number of rows, or what a number of tokens has room for."""

    def __init__(self, rows: int | None, tokens: int) -> None:
        """`rows` wins over `tokens`, the tokens of all rows together."""
        if rows is not None and rows < 1:
            raise HonesError(f"at least one row has to be replayed at once, not {rows}")
        self._rows, self._tokens = rows, tokens

    def rows(self, length: int) -> int:
        """Rows at once when each has `length` tokens; at least one."""
        return max(1, self._tokens // length) if self._rows is None else self._rows

    def cuts(self, items: Sequence[T], length: int, run: Callable[[Sequence[T]], Result]) -> Iterator[Result]:
        """`run` on one cut of the items after the other; a cut that memory cannot hold is run in halves.

        Later cuts then stay as small. Raises: HonesError when memory cannot hold a single item.
        """
        start = 0
        while start < len(items):
            cut = items[start : start + self.rows(length)]
            try:
                result = run(cut)
            except torch.OutOfMemoryError as error:
                self._halve(len(cut), length, error)
                continue
            yield result
            start += len(cut)

    def _halve(self, rows: int, length: int, error: torch.OutOfMemoryError) -> None:
        if rows == 1:
            raise HonesError(f"the device's memory cannot hold one edited pass of {length} tokens") from error
        if self._rows is None:
            self._tokens = rows // 2 * length
        else:
            self._rows = rows // 2
        torch.cuda.empty_cache()
