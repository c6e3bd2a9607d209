"""Next-token logits of prompts that share an image, with their shared prefix computed once.

The candidates of one image, the questions about it and the choices of one question are equal up to the first
token that differs. An edit acts at all positions, so one edited pass over the shared prefix serves all
prompts of the group. The walk up the layers (see `hones_eval.engine.replay`) therefore carries two segments
per edit: the prefix, which leaves its keys and values in each layer, and the prompts' own endings as one
batch, which attend to those keys and values.

Nothing is known about a family's layers here either. Both segments are recorded while the model itself
continues from its cache. In some models that is not the same as one pass over the whole prompt, for example
where prompts are attended to in both directions. The first group of prompts is compared with plain forwards
and shows this; prompts are then measured one at a time.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.sites import Neuron
from hones_eval.engine.caches import KeptByLayer
from hones_eval.engine.encoders import same_value
from hones_eval.engine.passes import ROUNDING, FullPasses, RowLimit, SiteEdit
from hones_eval.engine.prefix_segment import AfterPrefix, PrefixSegment
from hones_eval.engine.prompts import ALONG_THE_PROMPT, shortened
from hones_eval.engine.replay import Replayer, trial_edits
from hones_eval.errors import EditError, first_line

Inputs = Mapping[str, Any]


class LastTokens(NamedTuple):
    """Logits [edits, members, read, vocabulary] at the end of some prompts of a group.

    `members` are the prompts' indices in the group. An edit of None is the unedited model. `shared` is the
    length of the shared prefix, 0 for none. Members that read fewer positions than others have them last.
    """

    members: list[int]
    edits: list[SiteEdit | None]
    logits: Tensor
    shared: int


class SharedReplayer:
    """Logits at the end of grouped prompts, from a shared prefix where that is exact for this model."""

    def __init__(self, replayer: Replayer) -> None:
        """Use the replayer's model; prompts without a shared prefix are replayed one at a time."""
        self.replayer = replayer
        self.anatomy = replayer.anatomy
        tracker = replayer.tracker
        self.inexact: str | None = None if tracker is None else f"scope={tracker.scope}"
        self._proven = False

    @torch.no_grad()
    def last_tokens(
        self, group: Sequence[Inputs], edits: Sequence[SiteEdit], reads: Sequence[int] | None = None
    ) -> Iterator[LastTokens]:
        """Yield the logits at the end of every prompt (each a batch of one), unedited and under each edit.

        `reads` is the number of positions to read per prompt, by default 1. The first group that shares a
        prefix is also the proof: its logits under a few edits must equal those of hooked forwards. If they do
        not, `inexact` says by how much, and later groups do not share.
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
        """Why sharing is not exact for this model, or None; the shortest and the longest prompt tell."""
        trial = _trial(self.anatomy)
        order = sorted(range(len(group)), key=lambda i: group[i]["input_ids"].shape[1])
        ends = [order[0], order[-1]]
        full = [FullPasses(self.anatomy, group[i], reads[i]) for i in ends]
        expected: dict[tuple[int, SiteEdit | None], Tensor] = {}
        for i, passes in zip(ends, full, strict=True):
            expected[i, None] = passes.base_logits
            expected |= {(i, rows.edits[0]): rows.logits[0] for rows in passes.edited(trial)}
        try:
            found = {
                (member, edit): logits[place, -reads[member] :]
                for part in self._shared(group, length, reads).last_tokens(trial)
                for edit, logits in zip(part.edits, part.logits, strict=True)
                for place, member in enumerate(part.members)
            }
        except (
            AttributeError,
            EditError,
            IndexError,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            return f"its decoder cannot continue from a shared prefix ({first_line(error)})"
        largest = max(float(logits.abs().max()) for logits in expected.values())
        worst = max(float((found[key] - logits).abs().max()) for key, logits in expected.items()) / largest
        if not worst <= ROUNDING[full[0].base_logits.dtype]:
            return f"logits after a shared prefix differ from those of full forwards by {worst:.1e}"
        return None


def _trial(anatomy: Anatomy) -> list[SiteEdit]:
    """Heads of the first, a middle and the last layer, and neurons of the first and the last."""
    shape = anatomy.shape
    first = min(layer for layer in range(shape.layers) if shape.neurons_of(layer))
    return [*trial_edits(shape), SiteEdit(Neuron(first, 0), "mask")]


def shared_length(group: Sequence[Inputs], anatomy: Anatomy, reads: Sequence[int] | None = None) -> int:
    """The number of tokens, image tokens included, that a group shares at the start; 0 for none.

    The positions that are read, at least one per prompt, are never shared, and all image tokens are.
    """
    reads = [1] * len(group) if reads is None else reads
    first = group[0]
    same = all(_same_images(first, other) for other in group[1:])
    whole = all(bool(inputs.get("attention_mask", torch.ones(1)).all()) for inputs in group)
    # Cross-attention reads states that a cache does not hold in the way that prefixes need.
    if len(group) < 2 or not same or not whole or anatomy.reads_states:
        return 0
    length = min(inputs["input_ids"].shape[1] - read for inputs, read in zip(group, reads, strict=True))
    for name in ALONG_THE_PROMPT & first.keys():
        for other in group[1:]:
            differs = (first[name][0, :length] != other[name][0, :length]).nonzero()
            length = min(length, int(differs[0])) if len(differs) else length
    own = [inputs["input_ids"][:, length:] for inputs in group]
    config: Any = anatomy.model.config
    image_tokens = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    return 0 if any(bool((ids == token).any()) for ids in own for token in image_tokens if token) else length


def _same_images(first: Inputs, other: Inputs) -> bool:
    """Whether everything but the prompt is equal: pixels, grids and whatever else belongs to the images."""
    if first.keys() != other.keys() or first["input_ids"].shape[0] != 1 or other["input_ids"].shape[0] != 1:
        return False
    return all(same_value(first[name], other[name]) for name in first.keys() - ALONG_THE_PROMPT)


class SharedPrefix:
    """The recorded passes of one group: over the shared prefix, and over each prompt's own ending."""

    def __init__(
        self, anatomy: Anatomy, group: Sequence[Inputs], length: int, limit: RowLimit, read: int = 1
    ) -> None:
        """Run the unedited model over the first `length` tokens, then over the endings from its cache.

        The last `read` positions of each ending are read.
        """
        self.anatomy, self.limit, self.length = anatomy, limit, length
        own = [inputs["input_ids"][:, length:] for inputs in group]
        shared = shortened(group[0], length)
        self._prefix = PrefixSegment(anatomy, [length])
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
        for chunk, parts in self.limit.chunks(order, tokens, lambda chunk: (chunk, self._walk(chunk))):
            for members, logits in zip(self._members, parts, strict=True):
                yield LastTokens(members, list(chunk), logits, self.length)

    def _walk(self, edits: Sequence[SiteEdit]) -> list[Tensor]:
        """Walk up the layers once, rows joining at their edit's layer.

        Returns: logits [rows, members, read, vocabulary] per chunk of members.
        """
        for segment in (self._prefix, *self._endings):
            segment.hidden = None
        top = self.anatomy.shape.layers - 1
        for layer in range(edits[0].site.layer, top + 1):
            joining = [edit for edit in edits if edit.site.layer == layer]
            kept = KeptByLayer()
            # The prefix is not read at the last layer: only its keys and values are needed there.
            self._prefix.step(layer, kept, joining if layer < top else [])
            for ending in self._endings:
                ending.step(layer, AfterPrefix(kept, self._reach[layer]), joining)
        return [ending.logits() for ending in self._endings]


def _chunks(order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut a sequence into as few chunks as `size` allows, all of about the same length."""
    count = -(-len(order) // size)
    for part in range(count):
        yield list(order[part * len(order) // count : (part + 1) * len(order) // count])


def _endings(anatomy: Anatomy, own: Sequence[Tensor], cache: Cache, read: int) -> PrefixSegment:
    """Record the model continuing from the prefix over some endings, padded on the right."""
    lengths = [ids.shape[1] for ids in own]
    batch = torch.cat([_padded(ids, max(lengths)) for ids in own])

    def continued(ids: Tensor) -> Any:
        past = copy.deepcopy(cache)
        past.batch_repeat_interleave(len(ids))
        return anatomy.model(input_ids=ids, past_key_values=past, use_cache=True)

    segment = PrefixSegment(anatomy, lengths, padded=max(lengths), read=read)
    segment.run(lambda: continued(batch))
    if len(own) > 1:  # masks and positions are the same for all endings: take those of a batch of one
        single = PrefixSegment(anatomy, lengths[-1:], padded=max(lengths), read=read)
        single.run(lambda: continued(batch[-1:]))
        segment.called_like(single)
    return segment


def _padded(ids: Tensor, length: int) -> Tensor:
    # Padding comes after the positions that are read, so no ending attends to it.
    return torch.cat([ids, ids[:, -1:].expand(-1, length - ids.shape[1])], dim=1)
