"""Activation patching (V-SEAM 2): passes over an edited input with clean activations put back.

A patch in layer `l` changes nothing in the layers below. Patched passes are therefore replayed as edits are
(see `hones_eval.engine.replay`): each is a row that joins the walk at layer `l` of the edited input's
recorded pass. A patch of an attention or FFN output replaces the recorded output of that block, which then
does not run. `FullPatches` does the same with one hooked forward per patch; the first pair of inputs compares
the two.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.hooks import replaced_forward, uncompiled
from hones_eval.engine.activations import Part, activations, complete, outputs_of
from hones_eval.engine.calling import returning, tensor_of
from hones_eval.engine.passes import ROUNDING, RowLimit
from hones_eval.engine.replay import Replay, Replayer
from hones_eval.errors import HonesError, first_line


class Patch(NamedTuple):
    """Activations at `sources` of the clean input, put back at `positions` of the edited input.

    Part `stream` is the residual stream that enters layer `layer`, or the final norm for `layer == L`; the
    output of block `l` in V-SEAM's code is the stream at `l + 1`. Parts `attention` and `ffn` are the outputs
    of that layer's attention and FFN.
    """

    part: Part
    layer: int
    positions: tuple[int, ...]
    sources: tuple[int, ...]


class PatchedRows(NamedTuple):
    """Indices of some of the requested patches, and the last position's logits [rows, vocabulary]."""

    places: list[int]
    logits: Tensor


class Patches(Protocol):
    """The patched passes of one pair of inputs, as `PatchReplay` and `FullPatches` provide them."""

    clean_logits: Tensor
    edited_logits: Tensor

    def patched(self, patches: Sequence[Patch]) -> Iterator[PatchedRows]:
        """Yield the last position's logits under each patch alone, several at a time and in any order."""


class Patcher:
    """Makes `Patches` for pairs of inputs, by replay where that is exact, else by full forwards."""

    def __init__(self, anatomy: Anatomy, rows: int | None = None) -> None:
        """Run at most `rows` patched passes at once; by default as many as suit the device."""
        self.anatomy = anatomy
        self.inexact: str | None = None
        self._replayer = Replayer(anatomy, rows)
        self._proven = False

    @torch.no_grad()
    def record(self, clean: Mapping[str, Any], edited: Mapping[str, Any]) -> Patches:
        """Record one pass over each of two inputs (batches of one).

        The first pair is also the proof: logits under patches of every part must equal those of hooked
        forwards. If they do not, `inexact` says by how much, and all later passes are full forwards.
        """
        for inputs in (clean, edited):
            if inputs["input_ids"].shape[0] != 1:
                raise HonesError(
                    "patching takes one pair of inputs at a time, because the rows of its batch are patches"
                )
        if self.inexact is None:
            replay = PatchReplay(self.anatomy, clean, edited, self._replayer.limit)
            if not self._proven:
                self.inexact = _difference(replay, FullPatches(self.anatomy, clean, edited))
                self._proven = True
            if self.inexact is None:
                return replay
        return FullPatches(self.anatomy, clean, edited)


class PatchReplay(Replay):
    """Patched passes as rows of one batch, from one recorded pass over each of the two inputs."""

    def __init__(
        self, anatomy: Anatomy, clean: Mapping[str, Any], edited: Mapping[str, Any], limit: RowLimit
    ) -> None:
        """Run and record the passes over both inputs."""
        self.clean = activations(anatomy, clean)
        with outputs_of(anatomy.ffns) as written:
            super().__init__(anatomy, edited, 1, limit)
        self._written = complete(written)
        self.clean_logits = self.clean.logits
        self.edited_logits = self.base_logits[0]

    @torch.no_grad()
    def patched(self, patches: Sequence[Patch]) -> Iterator[PatchedRows]:
        """See `Patches.patched`."""
        depth, last = len(self._calls), self._calls[0].x.shape[1] - 1
        # After the last layer's attention, only a patch at the last position can change what is read.
        unread = [i for i, patch in enumerate(patches) if _is_unread(patch, depth, last)]
        if unread:
            yield PatchedRows(unread, self.edited_logits.expand(len(unread), -1))
        on_top = [i for i, patch in enumerate(patches) if patch.layer == depth and i not in set(unread)]
        if on_top:
            sources = [patches[i].sources[patches[i].positions.index(last)] for i in on_top]
            yield PatchedRows(on_top, self.anatomy.logits(self.clean.streams[-1][0, sources]))
        rest = set(range(len(patches))) - {*unread, *on_top}
        order = sorted(rest, key=lambda i: (patches[i].layer, patches[i].part))

        def run(chunk: Sequence[int]) -> PatchedRows:
            return PatchedRows(list(chunk), self._walk_patched([patches[i] for i in chunk], list(chunk)))

        yield from self.limit.chunks(order, self.length, run)

    def _walk_patched(self, patches: list[Patch], numbers: list[int]) -> Tensor:
        def enter(layer: int, members: list[int]) -> Tensor:
            parts = groupby([patches[i] for i in members], key=lambda patch: patch.part)
            groups = [self._enter_part(part, layer, list(same)) for part, same in parts]
            return torch.cat(groups) if len(groups) > 1 else groups[0]

        return self.walk([patch.layer for patch in patches], enter, numbers)[:, -1]

    def _enter_part(self, part: Part, layer: int, patches: list[Patch]) -> Tensor:
        """The output [rows, tokens, hidden] of a layer for rows with patches of one of its parts."""
        call = self._calls[layer]
        attended, x = tensor_of(call.attended), call.x.expand(len(patches), -1, -1)
        recorded = {"stream": call.x, "attention": attended, "ffn": self._written[layer]}[part]
        patched = _put_back(recorded, self.clean.of(part)[layer], patches)
        if part == "stream":
            return self.call(layer, patched)
        attention, ffn = self.anatomy.attentions[layer], self.anatomy.ffns[layer]
        if part == "attention":
            with replaced_forward(attention, returning(call.attended, patched)):
                return self.call(layer, x, attending=False)
        with (
            replaced_forward(attention, returning(call.attended, attended)),
            replaced_forward(ffn, lambda *_, **__: patched),
        ):
            return self.call(layer, x, narrow=False)


class FullPatches:
    """Patched passes by one hooked forward per patch: slow, and exact for every model."""

    def __init__(self, anatomy: Anatomy, clean: Mapping[str, Any], edited: Mapping[str, Any]) -> None:
        """Run both passes; see `PatchReplay`."""
        self.anatomy, self.inputs = anatomy, edited
        self.clean = activations(anatomy, clean)
        self.clean_logits = self.clean.logits
        self.edited_logits = self._forward()

    @torch.no_grad()
    def patched(self, patches: Sequence[Patch]) -> Iterator[PatchedRows]:
        """See `Patches.patched`."""
        for place, patch in enumerate(patches):
            clean = self.clean.of(patch.part)[patch.layer]
            with _patching(self.anatomy, patch, clean):
                yield PatchedRows([place], self._forward()[None])

    @torch.no_grad()
    def _forward(self) -> Tensor:
        logits: Tensor = self.anatomy.model(**self.inputs, use_cache=False).logits
        return logits[0, -1]


def _is_unread(patch: Patch, depth: int, last: int) -> bool:
    on_top = patch.layer == depth if patch.part == "stream" else patch.layer == depth - 1
    return on_top and last not in patch.positions


def _put_back(edited: Tensor, clean: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Repeat a tensor [1, tokens, width] of the edited pass for every patch, and apply the patches."""
    rows = edited.repeat(len(patches), 1, 1)
    for row, patch in zip(rows, patches, strict=True):
        row[list(patch.positions)] = clean[0, list(patch.sources)].to(row)
    return rows


@contextmanager
def _patching(anatomy: Anatomy, patch: Patch, clean: Tensor) -> Iterator[None]:
    """Apply one patch by a hook while the block lasts."""

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_put_back(args[0], clean, [patch]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _put_back(kwargs["hidden_states"], clean, [patch])}

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return returning(output, _put_back(tensor_of(output), clean, [patch]))()

    if patch.part == "stream":
        module = [*anatomy.layers, anatomy.final_norm][patch.layer]
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        modules = anatomy.attentions if patch.part == "attention" else anatomy.ffns
        handle = modules[patch.layer].register_forward_hook(on_output)
    try:
        with uncompiled():
            yield
    finally:
        handle.remove()


def _difference(replay: PatchReplay, full: FullPatches) -> str | None:
    """Why replay is not exact for this model, or None.

    Compared are patches of every part at the last two tokens of the first and the last layer.
    """
    depth, last = len(replay.anatomy.layers), full.inputs["input_ids"].shape[1] - 1
    source = replay.clean.streams[0].shape[1] - 1
    near = range(min(2, last + 1, source + 1))
    ends: dict[Part, tuple[int, int]] = {
        "stream": (0, depth),
        "attention": (0, depth - 1),
        "ffn": (0, depth - 1),
    }
    patches = [
        Patch(part, layer, (last - back,), (source - back,))
        for part, layers in ends.items()
        for layer in layers
        for back in near
    ]
    expected = torch.cat([rows.logits for rows in full.patched(patches)])
    found = torch.full_like(expected, torch.nan)
    try:
        for rows in replay.patched(patches):
            found[rows.places] = rows.logits
    except (RuntimeError, TypeError, ValueError) as error:
        return f"its decoder layers cannot be re-run with a different batch size ({first_line(error)})"
    except HonesError as error:  # logits that cannot be repeated for other hidden states
        return first_line(error)
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= ROUNDING[expected.dtype]:
        return f"replayed logits differ from those of full forwards by {worst:.1e} of the largest logit"
    return None
