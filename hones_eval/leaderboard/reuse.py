"""Whether a run was measured on examples that had chosen its steering."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hones_eval.leaderboard.reading import Run


def reused_examples(run: Run) -> tuple[str, ...]:
    """A line for each way in which a run's examples are among those that its steering was chosen on.

    Pictures are compared by hash, where the run's manifest and the steering's provenance have them; examples
    of the same task and split by `doc_id`.
    """
    if run.steering is None or not run.samples:
        return ()
    samples = next(iter(run.samples.values()))
    sets = run.steering.example_sets
    lines = []
    used = {str(one) for chosen in sets for one in chosen.get("image_hashes") or ()}
    if samples.pictures is not None and used:
        count = sum(any(picture in used for picture in shown) for shown in samples.pictures)
        if count:
            lines.append(f"{count:,} of {len(samples):,} examples show pictures that chose this steering")
    ids = {doc for chosen in sets if _same_split(chosen, run) for doc in _doc_ids(chosen)}
    count = int(np.isin(samples.doc_ids, list(ids)).sum())
    if count:
        lines.append(f"{count:,} of {len(samples):,} examples chose this steering")
    return tuple(lines)


def _same_split(chosen: Mapping[str, Any], run: Run) -> bool:
    return chosen.get("task") == run.task and chosen.get("split") in (run.split, "", None)


def _doc_ids(chosen: Mapping[str, Any]) -> set[int]:
    if listed := chosen.get("doc_ids"):
        return {int(one) for one in listed}
    offset, count = int(chosen.get("offset") or 0), int(chosen.get("count") or 0)
    return set(range(offset, offset + count))
