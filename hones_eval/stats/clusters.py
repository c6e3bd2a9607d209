"""Clusters: examples that share an image, which are not independent of each other."""

from collections.abc import Sequence

import numpy as np

from hones_eval.stats.paired import Integers


def by_images(images: Sequence[Sequence[str]]) -> Integers:
    """A number per example [n], in the order of appearance; examples that share an image have the same one.

    An example with several images belongs to the cluster of each of them, so it joins these clusters. An
    example without an image shares none, and is a cluster of its own.

    Args:
        images: the images of each example, as hashes or other names.

    Examples:
        >>> by_images([["x"], ["y"], ["x"], [], []]).tolist()
        [0, 1, 0, 2, 3]
        >>> by_images([["x"], ["y"], ["z"], ["y", "x"]]).tolist()
        [0, 0, 1, 0]
    """
    owner: dict[str, int] = {}
    earlier = list(range(len(images)))
    """An example of the same cluster that is not later; the first of a cluster has itself."""

    def first(place: int) -> int:
        while earlier[place] != place:
            earlier[place] = earlier[earlier[place]]  # halves the path of the next search
            place = earlier[place]
        return place

    for place, shown in enumerate(images):
        for image in shown:
            ends = first(owner.setdefault(image, place)), first(place)
            earlier[max(ends)] = min(ends)
    numbers: dict[int, int] = {}
    found = [numbers.setdefault(first(place), len(numbers)) for place in range(len(images))]
    return np.array(found, dtype=np.int64)
