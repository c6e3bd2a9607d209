"""Detects runs that were evaluated on the examples used to choose their steering."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hones_eval.leaderboard.reading import Run


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
    ids = {doc for chosen in sets if _same_split(chosen, run) for doc in _doc_ids(chosen)}
    count = int(np.isin(samples.doc_ids, list(ids)).sum())
    if count:
        lines.append(f"{count:,} of {len(samples):,} examples were used to choose this steering")
    return tuple(lines)


def _same_split(chosen: Mapping[str, Any], run: Run) -> bool:
    return chosen.get("task") == run.task and chosen.get("split") in (run.split, "", None)


def _doc_ids(chosen: Mapping[str, Any]) -> set[int]:
    if listed := chosen.get("doc_ids"):
        return {int(doc_id) for doc_id in listed}
    offset, count = int(chosen.get("offset") or 0), int(chosen.get("count") or 0)
    return set(range(offset, offset + count))
