"""What prompts on one picture share is computed once: their next-token logits, plain and under many edits.

The candidates of a picture, and the questions on it, are equal up to where their words differ. An edit acts
at all positions, so an edited row has one prefix for all of them. The walk up the layers
(`hones_eval.engine.replay`) then takes two stretches along: for every row the prefix, which leaves its keys
and values in each layer, and behind it the prompts' own endings, as one batch, which attend to them.

No family's layer is known here either. Both passes are recorded as the model itself makes them when it goes
on from a cache; where that is not the pass over the whole prompt (attention in both directions, say), the
first group shows it, and prompts are measured one at a time from then on.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Head, Neuron
from hones_eval.engine.caches import KeptByLayer
from hones_eval.engine.passes import ROUNDING, FullPasses, RowLimit, SiteEdit, replaced_by_mean
from hones_eval.engine.prefix_segment import BehindPrefix, Stretch
from hones_eval.engine.prompts import ALONG_THE_PROMPT, shortened
from hones_eval.engine.replay import Replayer
from hones_eval.errors import first_line

Inputs = Mapping[str, Any]


class LastTokens(NamedTuple):
    """Logits [edits, members, read, vocabulary] at the end of some prompts of a group, by their places in it.

    Of the edits None is the unedited model; `shared` is the length of their shared prefix, 0 for none. Where
    less is asked for of a member than of another, it stands last.
    """

    members: list[int]
    edits: list[SiteEdit | None]
    logits: Tensor
    shared: int


class SharedReplayer:
    """Logits at the end of grouped prompts, by a shared prefix where that is exact for this model."""

    def __init__(self, replayer: Replayer) -> None:
        """Share with the replayer's model; prompts that share nothing are replayed one at a time."""
        self.replayer = replayer
        self.anatomy = replayer.anatomy
        self.inexact: str | None = None
        self._proven = False

    @torch.no_grad()
    def last_tokens(
        self, group: Sequence[Inputs], edits: Sequence[SiteEdit], reads: Sequence[int] | None = None
    ) -> Iterator[LastTokens]:
        """Logits at the end of every prompt (each a batch of one), unedited and under each edit, in parts.

        `reads` says how many positions are read of each, by default the last one. The first group that shares
        is also the proof: logits under a few edits must equal those of hooked forwards. If they do not,
        `inexact` says by how much, and nothing is shared from then on.
        """
        reads = [1] * len(group) if reads is None else reads
        length = 0 if self.inexact else shared_length(group, self.anatomy, reads)
        if length and not self._proven:
            self.inexact = self._difference(group, length, reads)
            self._proven = True
        if length and not self.inexact:
            yield from self._shared(group, length, reads).last_tokens(edits)
            return
        for member, (inputs, read) in enumerate(zip(group, reads, strict=True)):
            passes = self.replayer.record(inputs, read)
            yield LastTokens([member], [None], passes.base_logits[None, None], 0)
            for rows in passes.edited(edits):
                yield LastTokens([member], list(rows.edits), rows.logits[:, None], 0)

    def _shared(self, group: Sequence[Inputs], length: int, reads: Sequence[int]) -> "SharedPrefix":
        return SharedPrefix(self.anatomy, group, length, self.replayer.limit, max(reads))

    def _difference(self, group: Sequence[Inputs], length: int, reads: Sequence[int]) -> str | None:
        """Why sharing is not exact here, or None: a few edits, behind the shortest and the longest prompt."""
        trial = _trial(self.anatomy)
        order = sorted(range(len(group)), key=lambda i: group[i]["input_ids"].shape[1])
        ends = [order[0], order[-1]]
        full = [FullPasses(self.anatomy, group[i], reads[i]) for i in ends]
        expected: dict[tuple[int, SiteEdit | None], Tensor] = {}
        for i, one in zip(ends, full, strict=True):
            expected[i, None] = one.base_logits
            expected |= {(i, rows.edits[0]): rows.logits[0] for rows in one.edited(trial)}
        try:
            found = {
                (member, edit): logits[place, -reads[member] :]
                for part in self._shared(group, length, reads).last_tokens(trial)
                for edit, logits in zip(part.edits, part.logits, strict=True)
                for place, member in enumerate(part.members)
            }
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return f"its decoder cannot go on from a shared prefix ({first_line(error)})"
        largest = max(float(logits.abs().max()) for logits in expected.values())
        worst = max(float((found[key] - logits).abs().max()) for key, logits in expected.items()) / largest
        if not worst <= ROUNDING[full[0].base_logits.dtype]:
            return f"logits behind a shared prefix differ from those of the full forward by {worst:.1e}"
        return None


def _trial(anatomy: Anatomy) -> list[SiteEdit]:
    """Heads of the first, a middle and the last layer, and neurons of the first and the last."""
    shape = anatomy.shape
    layers = sorted({0, shape.layers // 2, shape.layers - 1})
    heads = replaced_by_mean([Head(layer, layer % shape.heads) for layer in layers])
    return [*heads, *(SiteEdit(Neuron(layer, 0), "mask") for layer in sorted({0, shape.layers - 1}))]


def shared_length(group: Sequence[Inputs], anatomy: Anatomy, reads: Sequence[int] | None = None) -> int:
    """How many tokens all prompts of a group have in common in front, pictures included; 0 for none.

    What is read of a prompt, at least one token, is its own, and nothing of its own stands for a picture.
    """
    reads = [1] * len(group) if reads is None else reads
    first = group[0]
    same = all(_same_beside_the_prompt(first, other) for other in group[1:])
    whole = all(bool(inputs.get("attention_mask", torch.ones(1)).all()) for inputs in group)
    if len(group) < 2 or not same or not whole:
        return 0
    length = min(one["input_ids"].shape[1] - read for one, read in zip(group, reads, strict=True))
    for name in ALONG_THE_PROMPT & first.keys():
        for other in group[1:]:
            differs = (first[name][0, :length] != other[name][0, :length]).nonzero()
            length = min(length, int(differs[0])) if len(differs) else length
    own = [inputs["input_ids"][:, length:] for inputs in group]
    config: Any = anatomy.model.config
    pictures = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    return 0 if any(bool((ids == token).any()) for ids in own for token in pictures if token) else length


def _same_beside_the_prompt(one: Inputs, other: Inputs) -> bool:
    if one.keys() != other.keys() or one["input_ids"].shape[0] != 1 or other["input_ids"].shape[0] != 1:
        return False
    return all(_equal(one[name], other[name]) for name in one.keys() - ALONG_THE_PROMPT)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)


class SharedPrefix:
    """The recorded passes of one group: over what it shares, and over its prompts' own endings."""

    def __init__(
        self, anatomy: Anatomy, group: Sequence[Inputs], length: int, limit: RowLimit, read: int = 1
    ) -> None:
        """Run the unedited model over the first `length` tokens, and on from there over the endings.

        The last `read` positions of each ending are read.
        """
        self.anatomy, self.limit, self.length = anatomy, limit, length
        own = [inputs["input_ids"][:, length:] for inputs in group]
        shared = shortened(group[0], length)
        self._prefix = Stretch(anatomy, [length])
        cache = self._prefix.run(lambda: anatomy.model(**shared, use_cache=True)).past_key_values
        self._reach = [layer.keys.shape[-2] for layer in cache.layers]  # less than all where windows slide
        order = sorted(range(len(own)), key=lambda i: own[i].shape[1])
        self._members = list(_chunks(order, limit.rows(own[order[-1]].shape[1])))
        self._endings = [_endings(anatomy, [own[i] for i in chunk], cache, read) for chunk in self._members]

    @torch.no_grad()
    def last_tokens(self, edits: Sequence[SiteEdit]) -> Iterator[LastTokens]:
        """See `SharedReplayer.last_tokens`."""
        for members, ending in zip(self._members, self._endings, strict=True):
            yield LastTokens(members, [None], ending.base_logits[None], self.length)
        order = sorted(edits, key=lambda edit: (edit.site.layer, not edit.is_head))
        tokens = self.length + max(ending.tokens for ending in self._endings)
        for cut, parts in self.limit.cuts(order, tokens, lambda cut: (cut, self._walk(cut))):
            for members, logits in zip(self._members, parts, strict=True):
                yield LastTokens(members, list(cut), logits, self.length)

    def _walk(self, edits: Sequence[SiteEdit]) -> list[Tensor]:
        """Up the layers once: rows join at their edit's layer. Logits [rows, members, read, V] a chunk."""
        for stretch in (self._prefix, *self._endings):
            stretch.hidden = None
        top = self.anatomy.shape.layers - 1
        for layer in range(edits[0].site.layer, top + 1):
            joining = [edit for edit in edits if edit.site.layer == layer]
            kept = KeptByLayer()
            # Nobody reads the prefix at the top: only its keys and values there are needed.
            self._prefix.step(layer, kept, joining if layer < top else [])
            for ending in self._endings:
                ending.step(layer, BehindPrefix(kept, self._reach[layer]), joining)
        return [ending.logits() for ending in self._endings]


def _chunks(order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Neighbours together, in as few chunks as the size allows, of about equal size."""
    count = -(-len(order) // size)
    for part in range(count):
        yield list(order[part * len(order) // count : (part + 1) * len(order) // count])


def _endings(anatomy: Anatomy, own: Sequence[Tensor], cache: Cache, read: int) -> Stretch:
    """Record the model as it goes on from the prefix over some endings, padded on the right."""
    lengths = [ids.shape[1] for ids in own]
    batch = torch.cat([_padded(ids, max(lengths)) for ids in own])

    def go_on(ids: Tensor) -> Any:
        past = copy.deepcopy(cache)
        past.batch_repeat_interleave(len(ids))
        return anatomy.model(input_ids=ids, past_key_values=past, use_cache=True)

    stretch = Stretch(anatomy, lengths, padded=max(lengths), read=read)
    stretch.run(lambda: go_on(batch))
    if len(own) > 1:  # masks and positions, which all endings share, are those of a batch of one
        one = Stretch(anatomy, lengths[-1:], padded=max(lengths), read=read)
        one.run(lambda: go_on(batch[-1:]))
        stretch.called_like(one)
    return stretch


def _padded(ids: Tensor, length: int) -> Tensor:
    # Padding comes after what is read, so that no ending sees any.
    return torch.cat([ids, ids[:, -1:].expand(-1, length - ids.shape[1])], dim=1)
