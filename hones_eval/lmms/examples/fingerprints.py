"""Hashes of the prompts and images of a task's examples, and groups of neighbors with the same images."""

from collections.abc import Callable

from hones_eval.core.artifact import ExampleSet, hash_of
from hones_eval.core.images import image_hash
from hones_eval.lmms.examples.shown import Shown

GROUP = 64
"""The most examples with the same images that are measured at once."""


class Fingerprints:
    """Hashes by example, computed when they are first asked for."""

    def __init__(self, count: int, shown: Callable[[int], Shown]) -> None:
        """Hash what `shown` returns for each of `count` examples."""
        self.count = count
        self._shown = shown
        self._known: dict[int, tuple[str, list[str]]] = {}

    def of(self, index: int) -> tuple[str, list[str]]:
        """The hash of an example's texts, and the hashes of its images."""
        if index not in self._known:
            texts, images = self._shown(index)
            self._known[index] = (hash_of(texts), [image_hash(image) for image in images])
        return self._known[index]

    def group(self, index: int) -> range:
        """The neighbors of an example that show the same images, itself included, in blocks of `GROUP`.

        Blocks are counted from the first neighbor, so they do not depend on which example is asked for: a
        resumed run measures the same groups as an uninterrupted one.
        """
        start = index
        while start and self._repeats(start):
            start -= 1
        start += (index - start) // GROUP * GROUP
        end = index + 1
        while end < min(self.count, start + GROUP) and self._repeats(end):
            end += 1
        return range(start, end)

    def share(self, rank: int, ranks: int) -> list[int]:
        """A rank's part of the examples; neighbors that show the same images stay together."""
        if ranks == 1:
            return list(range(self.count))
        groups: list[list[int]] = []
        for index in range(self.count):
            if index and self._repeats(index):
                groups[-1].append(index)
            else:
                groups.append([index])
        if len(groups) < ranks:  # every rank needs an example
            return list(range(rank, self.count, ranks))
        return [index for group in groups[rank::ranks] for index in group]

    def example_set(self, task: str, split: str, offset: int, doc_ids: list[int]) -> ExampleSet:
        """The identity of all examples: its hash covers task, split, documents, prompts and images."""
        prints = [self.of(index) for index in range(self.count)]
        parts = [task, split]
        for doc_id, (text_hash, image_hashes) in zip(doc_ids, prints, strict=True):
            parts += [str(doc_id), text_hash, *image_hashes]
        images = list(dict.fromkeys(image for _, hashes in prints for image in hashes))
        texts = list(dict.fromkeys(text for text, hashes in prints if not hashes))
        return ExampleSet(task, split, self.count, offset, hash_of(parts), doc_ids, images, texts)

    def _repeats(self, index: int) -> bool:
        """Whether an example shows the same images as the one before it, and at least one."""
        images = self.of(index)[1]
        return bool(images) and self.of(index - 1)[1] == images
