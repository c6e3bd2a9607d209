"""Detects runs that were evaluated on the examples used to choose their steering."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hones_eval.leaderboard.reading import Run
from hones_eval.leaderboard.samples import Integers


def reused_examples(run: Run) -> tuple[str, ...]:
    """One line for each way in which a run reuses examples that its steering was chosen on.

    Images are compared by hash, if the run's manifest and the steering's provenance record them; examples
    of the same task and split by `doc_id`.
    """
    if run.steering is None or not run.samples:
        return ()
    samples = next(iter(run.samples.values()))
    sets = run.steering.example_sets
    lines = []
    used = {str(image) for chosen in sets for image in chosen.get("image_hashes") or ()}
    if samples.images is not None and used:
        count = sum(any(image in used for image in shown) for shown in samples.images)
        if count:
            lines.append(
                f"{count:,} of {len(samples):,} examples show images that were used to choose this steering"
            )
    reused = np.zeros(len(samples), dtype=bool)
    for chosen in sets:
        if _same_split(chosen, run):
            reused |= _among(samples.doc_ids, chosen)
    count = int(reused.sum())
    if count:
        lines.append(f"{count:,} of {len(samples):,} examples were used to choose this steering")
    return tuple(lines)


def _same_split(chosen: Mapping[str, Any], run: Run) -> bool:
    return chosen.get("task") == run.task and chosen.get("split") in (run.split, "", None)


def _among(doc_ids: Integers, chosen: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Which documents are in a set of examples, listed or given as a range."""
    if listed := chosen.get("doc_ids"):
        return np.isin(doc_ids, np.array(listed, dtype=np.int64))
    offset, count = int(chosen.get("offset") or 0), int(chosen.get("count") or 0)
    return np.asarray((doc_ids >= offset) & (doc_ids < offset + count))
