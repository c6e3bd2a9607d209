"""The head edit of a pass: makes the edits of chosen heads, and prepares them for each example."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import hash_of
from hones_eval.core.head_edits import head_edit
from hones_eval.core.hooks import recording
from hones_eval.core.sites import Head
from hones_eval.engine.passes import OtherExample, SiteEdit, present
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example, TaskExamples


class HeadReplacement:
    """Replaces heads by one registered edit.

    An edit that takes values from another example needs `prepare` before every example. Which other example
    that is depends on the seed and on the images of the example alone. So examples that show the same images,
    which are measured together, share it; and so do runs with other numbers of processes.
    """

    def __init__(
        self, name: str, anatomy: Anatomy, examples: Sequence[Example] | TaskExamples, seed: int = 0
    ) -> None:
        """Use the edit called `name`.

        Raises: HonesError when the edit is unknown, not position-free, or needs a second example that is
        missing.
        """
        self.name, self.edit = name, head_edit(name)
        self.anatomy, self.examples, self.seed = anatomy, examples, seed
        self.other = OtherExample() if self.edit.needs_other else None
        self._prepared: list[str] | None = None
        if self.other is not None and len(examples) < 2:
            raise HonesError(f"--edit {name} takes values from another example: raise --limit to 2 or more")

    @classmethod
    def by_mean(cls, anatomy: Anatomy) -> "HeadReplacement":
        """Mean replacement, which needs no other example (HONES 1)."""
        return cls("mean", anatomy, [])

    def of(self, heads: Sequence[Head]) -> list[SiteEdit]:
        """The edit of each of some heads."""
        return [SiteEdit(head, self.name, self.other) for head in heads]

    def prepare(self, example: Example) -> None:
        """Get what the edit needs for an example. Does nothing for edits that need no other example."""
        if self.other is None or self._prepared == example.content:
            return
        other = self.donor(example)
        with recording(present(self.anatomy.heads_in), slice(-1, None)) as kept, torch.no_grad():
            self.anatomy.model(**other.inputs, use_cache=False)
        self.other.heads = [self._heads(layer, kept) for layer in range(self.anatomy.shape.layers)]
        for layer, heads in enumerate(self.other.heads):
            if not bool(torch.isfinite(heads).all()):
                raise HonesError(f"{other.where}: the head outputs of layer {layer} are not finite")
        self._prepared = list(example.content)

    def replacement(self, layer: int, x: Tensor) -> Tensor:
        """The replacements [..., heads, width] of the head outputs `x` of a layer."""
        return self.edit.replacement(x, None if self.other is None else self.other.heads[layer])

    def donor(self, example: Example) -> Example:
        """A random example with other images (other text, if it has none), or else any other example."""
        seed = int(hash_of([str(self.seed), *example.content])[:8], 16)
        order = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(seed)).tolist()
        for index in order:
            other = self.examples[index]
            if other.content != example.content:
                return other
        return next(self.examples[index] for index in order if index != example.index)

    def _heads(self, layer: int, kept: Mapping[str, Tensor]) -> Tensor:
        """A layer's recorded head outputs [heads, width]; empty where the layer has no heads."""
        site = self.anatomy.heads_in[layer]
        if not site.width:
            return torch.zeros(0, 0)
        heads: Tensor = kept[site.name][0, 0].unflatten(-1, (self.anatomy.shape.heads_of(layer), -1))
        return heads
