"""The card's figures come from lmms-eval's samples files, and its intervals are right."""

import json
from pathlib import Path
from typing import get_args

import pytest
from scipy.stats import binomtest
from torchmetrics.functional.text import bleu_score

from hones_eval.errors import HonesError
from hones_eval.toy import card, scoring
from hones_eval.toy.documents import Task, documents


def write_samples(logs: Path, wrong: int, variant: str = "plain", name: str = "") -> None:
    """Gold answers, but for the first `wrong` of each task."""
    for task in get_args(Task):
        made = documents(task, variant, "test", 40)  # type: ignore[arg-type]
        lines = [
            {"doc_id": i, "target": d.answer, "filtered_resps": "?" if i < wrong else d.answer}
            for i, d in enumerate(made)
        ]
        text = "".join(json.dumps(line) + "\n" for line in reversed(lines))
        (logs / f"1_samples_scenes_{task}{name}.jsonl").write_text(text)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (450, 500), (500, 500)])
def test_wilson_intervals_are_those_of_scipy(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert card.wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_gold_answers_make_a_card_of_ones(tmp_path: Path) -> None:
    write_samples(tmp_path, wrong=0)
    rows = card.figures(tmp_path, "")
    assert {row.value for row in rows} == {1.0}
    assert all(row.low <= row.value <= row.high + 1e-12 for row in rows)
    by_name = {row.name: row.n for row in rows}
    assert by_name["vqa_attribute, color"] == 8
    assert by_name["retrieval, NDCG@5"] == 4


def test_wrong_answers_lower_every_figure(tmp_path: Path) -> None:
    write_samples(tmp_path, wrong=30, variant="edited", name="_edited")
    rows = {row.name: row for row in card.figures(tmp_path, "_edited")}
    assert rows["ocr, exact match"].value == pytest.approx(10 / 40)
    assert rows["retrieval, NDCG@5"].value == pytest.approx(1 / 4)
    assert rows["grounding, mean IoU"].value == pytest.approx(10 / 40)
    assert 0 < rows["caption, BLEU-4"].value < 0.5


def test_summed_counts_give_corpus_bleu() -> None:
    made = documents("caption", "plain", "test", 30)
    said = [made[i].answer if i % 3 else made[i - 1].answer + " and more" for i in range(30)]
    expected = float(bleu_score(said, [d.references for d in made], n_gram=4))
    assert 0.1 < expected < 0.95
    assert scoring.bleu4(said, [d.references for d in made]) == pytest.approx(expected, abs=1e-6)
    assert scoring.bleu4(["nothing of it"], [made[0].references]) == 0
    assert scoring.bleu4([""], [made[0].references]) == 0


def test_samples_of_other_scenes_and_missing_ones_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        HonesError, match=r"no samples of scenes_ocr under .*; run lmms-eval with --log_samples"
    ):
        card.read_samples(tmp_path, "ocr", "")
    line = {"doc_id": 0, "target": "something else", "filtered_resps": "BAK"}
    (tmp_path / "1_samples_scenes_ocr.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(HonesError, match="another version of the scenes"):
        card.read_samples(tmp_path, "ocr", "")


def test_the_learning_curve_is_drawn_from_the_shipped_log(tmp_path: Path) -> None:
    card.draw_curve(Path(card.__file__).parent / "training_log.csv", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
