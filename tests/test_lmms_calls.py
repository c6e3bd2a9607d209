"""Aggregations of lmms-eval's own tasks, called more often than lmms-eval does."""

from pathlib import Path

import numpy as np
import pytest
from lmms_eval.tasks.mme.utils import mme_aggregate_results
from lmms_eval.tasks.ocrbench.utils import ocrbench_aggregate_accuracy

from hones_eval.lmms.calls import aggregate
from hones_eval.stats.corpus import compare_corpus


def test_an_aggregation_leaves_no_sums_and_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = [{"question_type": "Doc-oriented VQA", "score": score} for score in (1, 0, 1)]
    assert [aggregate(ocrbench_aggregate_accuracy, items) for _ in range(3)] == [0.002] * 3
    assert not list(tmp_path.iterdir())


def test_mme_pairs_questions_by_image() -> None:
    def answers(right: list[int]) -> list[dict[str, object]]:
        return [
            {"question_id": f"{k // 2}.jpg", "category": "color", "score": float(score)}
            for k, score in enumerate(right)
        ]

    before, after = answers([1, 0, 1, 1, 0, 0, 1, 0]), answers([1, 1, 1, 1, 0, 1, 1, 1])
    found = compare_corpus(mme_aggregate_results, before, after, np.arange(8) // 2, resamples=200, most=200)
    assert found.difference == pytest.approx(mme_aggregate_results(after) - mme_aggregate_results(before))
    assert found.interval is not None
    assert found.test is not None
