"""Logits along a target that is not the model's answer, from the states of the pass that checks the answer.

The pass over prompt and answer (see `hones_eval.engine.decoding`) has already computed the prompt under every
edit. A target leaves the answer at some token: the first that differs. Everything up to there is read from
that pass. What follows, the target's own tokens, is a branch. Its rows attend to the keys and values that
the pass left for the prompt, so the prompt is not run a second time.

The branch walks up the layers as the endings of a shared prefix do (`hones_eval.engine.prefix_segment`): the
edit of a row acts in it too, and the layers below an edit are not run. The unedited branch is recorded while
the model itself continues from a cache that holds the recorded keys and values.

Whether that equals a pass over prompt and target is not assumed: `Branching` compares the first branch of a
model with plain hooked forwards, and says so if targets have to be replayed from the start.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.caches import KeptByLayer, KeysValues
from hones_eval.engine.continuation import KeptKeys, candidates
from hones_eval.engine.passes import ROUNDING, FullPasses, Passes, RowLimit, Rows, SiteEdit
from hones_eval.engine.prefix_segment import AfterPrefix, PrefixSegment
from hones_eval.engine.replay import Replay, trial_edits
from hones_eval.errors import EditError, HonesError, first_line


class AlongTarget:
    """Logits from which every token of a target is read: along the answer, then along the branch."""

    def __init__(self, passes: Passes, read: int, branch: "Branch | None") -> None:
        """Read the target's first `read` tokens from `passes`, and the others from `branch`."""
        self.passes, self._read, self._branch = passes, read, branch
        own = [] if branch is None else [branch.base_logits[0]]
        self.base_logits = torch.cat([passes.base_logits[:read], *own])
        """Unedited logits [target, vocabulary]."""

    def of(self, rows: Rows, kept: KeptKeys | None) -> Rows:
        """The logits [rows, target, vocabulary] of rows that the pass has just replayed.

        `kept` holds their keys and values; it is only needed for a branch.
        """
        logits = rows.logits[:, : self._read]
        if self._branch is None:
            return Rows(rows.edits, logits)
        assert kept is not None
        return Rows(rows.edits, torch.cat([logits, self._branch.under(rows.edits, kept)], dim=1))


class Branch(PrefixSegment):
    """The recorded pass over tokens that follow the beginning of a replayed sequence."""

    def __init__(self, model: PreTrainedModel, replay: Replay, length: int, tokens: Sequence[int]) -> None:
        """Run the unedited model over `tokens` after the first `length` tokens of `replay`; all are read.

        The replay has to be recorded with `keep`, and `model` is one of `continuation.candidates`.
        """
        super().__init__(replay.anatomy, [len(tokens)], read=len(tokens))
        assert replay.keys_values is not None
        self.ways, self._shared = replay.ways, length
        cache: Any = _cache_of(replay.anatomy, replay.keys_values, length)
        self._reach = [layer.keys.shape[-2] for layer in cache.layers]  # less than all where windows slide
        ids = torch.tensor([list(tokens)], device=replay.anatomy.device)
        self.run(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True))

    @torch.no_grad()
    def under(self, edits: Sequence[SiteEdit], kept: KeptKeys) -> Tensor:
        """Logits [rows, tokens, vocabulary] under each edit.

        Args:
            edits: ascending by layer, as the replay has just run them.
            kept: the keys and values that these rows left.
        """

        def run(chunk: Sequence[int]) -> Tensor:
            return self._walk(edits, chunk, kept)

        limit = RowLimit(len(edits), self.tokens)
        return torch.cat(list(limit.chunks(range(len(edits)), self.tokens, run)))

    def _walk(self, edits: Sequence[SiteEdit], rows: Sequence[int], kept: KeptKeys) -> Tensor:
        """Walk up the layers once with some consecutive rows, which join at their edit's layer."""
        self.hidden = None
        for layer in range(edits[rows[0]].site.layer, self.anatomy.shape.layers):
            past = KeptByLayer()
            if self.hidden is not None:
                past.kept = kept.of_rows(layer, rows[0], len(self.hidden), self._shared)
            joining = [edits[row] for row in rows if edits[row].site.layer == layer]
            self.step(layer, AfterPrefix(past, self._reach[layer]), joining)
        return self.logits()[:, 0]


def _cache_of(anatomy: Anatomy, recorded: Sequence[KeysValues], length: int) -> DynamicCache:
    """The model's own cache after the first `length` tokens of a recorded pass."""
    config: Any = anatomy.decoder.config
    cache = DynamicCache(config=config)
    for layer, (keys, values) in enumerate(recorded):
        cache.update(keys[:, :, :length], values[:, :, :length], layer)
    return cache


class Branching:
    """Makes branches for one model, once the first of them is shown to be exact."""

    def __init__(self, anatomy: Anatomy) -> None:
        """Branch from replays of this model."""
        self.anatomy = anatomy
        self.inexact: str | None = None
        """Why targets are replayed from the start, where a branch is not exact; else None."""
        self._model: PreTrainedModel | None = None

    def along(
        self,
        passes: Passes,
        answer: Sequence[int],
        target: Sequence[int],
        can_branch: bool,
        inputs: Callable[[], Mapping[str, Any]],
    ) -> AlongTarget | None:
        """Read `target` along a pass over a prompt and `answer`; None where that is not possible.

        Args:
            passes: the pass, which reads every position from which a token of `answer` is chosen.
            answer: the token ids of the answer; the last is not part of the pass.
            target: the token ids of the target.
            can_branch: whether `passes` is a replay with keys and values where the model expects them.
            inputs: makes the model's inputs of prompt and target, for the proof.
        """
        read = covered(answer, target)
        if read == len(target):
            return AlongTarget(passes, read, None)
        if not can_branch or self.inexact is not None:
            return None
        assert isinstance(passes, Replay)
        length, own = passes.length - len(answer) + read, target[read - 1 : -1]
        if self._model is None:
            self._prove(passes, length, own, inputs())
        return None if self._model is None else _along(self._model, passes, length, own, read)

    def _prove(self, replay: Replay, length: int, own: Sequence[int], inputs: Mapping[str, Any]) -> None:
        """Find the model that continues exactly from a replayed prompt; `inexact` says why there is none."""
        trial = trial_edits(self.anatomy.shape)
        read = length - replay.length + len(replay.base_logits)
        full = FullPasses(self.anatomy, inputs, read + len(own))
        expected = torch.cat([full.base_logits[None], *(rows.logits for rows in full.edited(trial))])
        reasons: list[str] = []
        for model in candidates(self.anatomy):
            try:
                along = _along(model, replay, length, own, read)
                found = torch.cat([along.base_logits[None], *_rows_along(along, replay, trial)])
            except (
                AttributeError,
                EditError,
                HonesError,
                IndexError,
                KeyError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                reasons.append(f"its decoder cannot branch from a replayed prompt ({first_line(error)})")
                continue
            worst = float((found - expected).abs().max() / expected.abs().max())
            if worst <= ROUNDING[expected.dtype]:
                self._model = model
                return
            reasons.append(
                f"logits after a replayed prompt differ from those of full forwards by {worst:.1e}"
            )
        self.inexact = "; ".join(reasons)


def _along(model: PreTrainedModel, replay: Replay, length: int, own: Sequence[int], read: int) -> AlongTarget:
    return AlongTarget(replay, read, Branch(model, replay, length, own))


def _rows_along(along: AlongTarget, replay: Replay, edits: Sequence[SiteEdit]) -> Iterator[Tensor]:
    kept = KeptKeys(replay)
    for rows in replay.edited(edits, on_keys=kept):
        yield along.of(rows, kept).logits


def covered(answer: Sequence[int], target: Sequence[int]) -> int:
    """The number of a target's first tokens that are read from the positions that choose `answer`.

    The token at which the target leaves the answer is one of them: it is read where the answer's own token
    is chosen.

    Examples:
        >>> covered([7, 8, 2], [7, 8]), covered([7, 8, 2], [7, 9, 9]), covered([7], [7, 8, 9])
        (2, 2, 1)
    """
    same = 0
    for ours, theirs in zip(answer, target, strict=False):
        if ours != theirs:
            break
        same += 1
    return min(same + 1, len(answer), len(target))
