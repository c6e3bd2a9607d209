"""From folders to rows: reading, pairing, refusing, marking; nothing is lost for one bad file."""

import csv
import dataclasses
import html
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_logs
import numpy as np
import pytest
from make_logs import Questions, Steered, exact, item, provenance, write_run
from scipy.stats import false_discovery_control

from hones_eval.__main__ import main
from hones_eval.core.figure import BLUE
from hones_eval.errors import HonesError
from hones_eval.leaderboard import Board, build_board, make_board
from hones_eval.leaderboard.manifest import SharedRequests
from hones_eval.leaderboard.samples import read_rows, read_samples

BASE_DATE, DATE = "20260102_030405", "20260102_030505"
QUESTIONS = Questions.drawn(count=60)
BEFORE, AFTER = QUESTIONS.answers(0.6, 1), QUESTIONS.answers(0.8, 2)


def board_of(folder: Path, **options: Any) -> Board:
    return build_board([folder], resamples=199, **options)


def write_pair(folder: Path, questions: Questions = QUESTIONS, **options: Any) -> None:
    count = len(questions.golds)
    write_run(folder, questions, BEFORE[:count], date=BASE_DATE, **options)
    write_run(folder, questions, AFTER[:count], date=DATE, steered=Steered(), **options)


def reasons(board: Board) -> list[str]:
    return [reason for one in board.unranked for reason in one.reasons]


def test_a_pair_becomes_a_row(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (row,) = board_of(tmp_path).rows
    right = [
        [answer == gold for answer, gold in zip(one, QUESTIONS.golds, strict=True)] for one in (BEFORE, AFTER)
    ]
    gained = sum(after and not before for before, after in zip(*right, strict=True))
    lost = sum(before and not after for before, after in zip(*right, strict=True))
    assert (row.gained, row.lost, row.n) == (gained, lost, 60)
    assert row.baseline == pytest.approx(sum(right[0]) / 60)
    assert row.comparison.difference == pytest.approx((gained - lost) / 60)
    assert row.comparison.test is not None
    assert row.comparison.test.method == "McNemar exact"
    assert row.p_adjusted == row.comparison.test.p
    assert row.rank == 1


def test_everything_written_is_named_and_the_same_again(tmp_path: Path) -> None:
    write_pair(tmp_path / "logs")
    boards = [make_board([tmp_path / "logs"], tmp_path / name, resamples=199) for name in ("one", "two")]
    names = [[str(path.relative_to(tmp_path / name)) for path in board.written]
             for name, board in zip(("one", "two"), boards, strict=True)]  # fmt: skip
    assert names[0] == names[1]
    assert {"index.html", "leaderboard.csv", "leaderboard.md", "leaderboard.svg"} < set(names[0])
    for name in names[0]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(
        ["comparisons", "index.html", "leaderboard.csv", "leaderboard.md", "leaderboard.svg"]
    )


MAKE = """
import sys
from pathlib import Path
from hones_eval.leaderboard import make_board
out, *logs = map(Path, sys.argv[1:])
make_board(logs, out, resamples=199, images=False)
"""


def test_another_process_and_another_order_of_logs_give_the_same_bytes(tmp_path: Path) -> None:
    """Hashes of texts are other ones in every process, and order nothing."""
    anls = {"exact_match": exact, "anls": lambda answer, gold: 1.0 if answer == gold else 0.25}
    for k, task in enumerate(("shapes", "letters")):
        questions = Questions.drawn(task, per_image=2, seed=k)
        for date, steered in ((BASE_DATE, None), (DATE, Steered())):
            answers = questions.answers(0.8 if steered else 0.6, k)
            folder = tmp_path / f"logs{k}"
            write_run(folder, questions, answers, date=date, steered=steered, metrics=anls, media=True)
    for seed, logs in (("1", ("logs0", "logs1")), ("2", ("logs1", "logs0"))):
        env = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", MAKE, seed, *logs]
        subprocess.run(command, cwd=tmp_path, env=env, timeout=120, check=True)
    one, two = (
        {path.relative_to(tmp_path / seed): path.read_bytes() for path in (tmp_path / seed).rglob("*.*")}
        for seed in "12"
    )
    assert len(one) == 6
    assert one == two


def test_pages_of_an_earlier_board_go_and_other_files_stay(tmp_path: Path) -> None:
    write_pair(tmp_path / "logs")
    first = make_board([tmp_path / "logs"], tmp_path / "board", resamples=99, images=False)
    (old,) = (tmp_path / "board" / "comparisons").iterdir()
    old.rename(old.with_name("earlier.html"))
    kept = old.with_name("notes.html")
    kept.write_text("mine")
    again = make_board([tmp_path / "logs"], tmp_path / "board", resamples=99, images=False)
    assert again.written == first.written
    assert {path.name for path in old.parent.iterdir()} == {old.name, "notes.html"}


def test_questions_on_one_image_are_compared_by_image(tmp_path: Path) -> None:
    questions = Questions.drawn(count=60, per_image=3)
    write_pair(tmp_path, questions)
    (row,) = board_of(tmp_path).rows
    assert row.images == 20
    assert row.comparison.interval is not None
    assert row.comparison.interval.method == "BCa bootstrap and t over images"
    assert row.comparison.test is not None
    assert row.comparison.test.method == "sign flips of images"


def test_graded_scores_are_bootstrapped(tmp_path: Path) -> None:
    write_pair(tmp_path, metrics={"anls": lambda answer, gold: 1.0 if answer == gold else 0.25})
    (row,) = board_of(tmp_path).rows
    assert row.kind == "graded"
    assert row.comparison.interval is not None
    assert row.comparison.interval.method == "BCa bootstrap and t over examples"


def test_per_cent_is_reported_in_per_cent(tmp_path: Path) -> None:
    share = [100 * sum(map(exact, answers, QUESTIONS.golds)) / 60 for answers in (BEFORE, AFTER)]
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE, reported={"exact_match": share[0]})
    write_run(tmp_path, QUESTIONS, AFTER, date=DATE, steered=Steered(), reported={"exact_match": share[1]})
    (row,) = board_of(tmp_path).rows
    assert row.comparison.difference == pytest.approx(share[1] - share[0])
    assert row.comparison.interval is not None
    assert row.comparison.interval.low < share[1] - share[0] < row.comparison.interval.high
    assert row.comparison.interval.high > 2


def test_lower_is_better_turns_the_verdict(tmp_path: Path) -> None:
    write_pair(
        tmp_path, metrics={"errors": lambda answer, gold: float(answer != gold)}, higher_is_better=False
    )
    (row,) = board_of(tmp_path).rows
    assert row.comparison.difference < 0
    assert row.gain is not None
    assert row.gain > 0
    assert (row.gained or 0) > (row.lost or 0)


TASK = """\
task: shapes
dataset_path: parquet
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
metric_list:
  - metric: f1
    aggregation: !function utils.f1
    higher_is_better: true
"""
UTILS = """\
def f1(items):
    hits = sum(one["prediction"] == one["ground_truth"] == "yes" for one in items)
    wrong = sum((one["prediction"] == "yes") != (one["ground_truth"] == "yes") for one in items)
    return 2 * hits / (2 * hits + wrong) if hits else 0.0
"""


def f1(answers: list[str]) -> float:
    hits = sum(answer == gold == "yes" for answer, gold in zip(answers, QUESTIONS.golds, strict=True))
    wrong = sum(answer != gold for answer, gold in zip(answers, QUESTIONS.golds, strict=True))
    return 2 * hits / (2 * hits + wrong)


def write_f1(folder: Path, wrong_by: float = 0.0) -> None:
    for answers, steered, date in ((BEFORE, None, BASE_DATE), (AFTER, Steered(), DATE)):
        reported = {"f1": f1(answers) + wrong_by}
        write_run(
            folder, QUESTIONS, answers, steered=steered, date=date, metrics={"f1": item}, reported=reported
        )


def test_corpus_metrics_are_recomputed_by_the_task(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "shapes.yaml").write_text(TASK)
    (tmp_path / "task" / "utils.py").write_text(UTILS)
    write_f1(tmp_path / "logs")
    (row,) = build_board([tmp_path / "logs"], resamples=199, include_path=tmp_path / "task").rows
    assert row.kind == "corpus"
    assert row.comparison.difference == pytest.approx(f1(AFTER) - f1(BEFORE))
    assert row.comparison.interval is not None
    assert row.comparison.interval.method.endswith("metric recomputed")
    write_f1(tmp_path / "other", wrong_by=0.01)
    (row,) = build_board([tmp_path / "other"], resamples=199, include_path=tmp_path / "task").rows
    assert row.comparison.interval is None
    assert "not the reported" in row.comparison.note


@pytest.mark.parametrize("raised", ["ValueError", "RuntimeError", "errors.HonesError"])
def test_a_corpus_metric_that_raises_on_a_resample_costs_only_its_interval(
    tmp_path: Path, raised: str
) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "shapes.yaml").write_text(TASK)
    head, body = UTILS.split("\n", 1)
    repeated = (
        f"    if len({{id(one) for one in items}}) < len(items):\n        raise {raised}('drawn twice')\n"
    )
    (tmp_path / "task" / "utils.py").write_text(
        f"from hones_eval import errors\n\n\n{head}\n{repeated}{body}"
    )
    write_f1(tmp_path / "logs")
    (row,) = build_board([tmp_path / "logs"], resamples=99, include_path=tmp_path / "task").rows
    assert row.comparison.difference == pytest.approx(f1(AFTER) - f1(BEFORE))
    assert row.comparison.interval is None
    assert row.comparison.note == "no interval: the metric is undefined on some resamples"


def test_a_corpus_metric_of_an_unknown_task_has_no_interval(tmp_path: Path) -> None:
    write_f1(tmp_path)
    (row,) = board_of(tmp_path).rows
    assert row.comparison.interval is None
    assert row.verdict == "not judged"
    assert row.comparison.note.startswith("no per-example value, no interval: lmms-eval knows no task shapes")
    assert row.comparison.difference == pytest.approx(f1(AFTER) - f1(BEFORE))


def test_holm_is_over_the_board_and_ranks_within_a_metric(tmp_path: Path) -> None:
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE)
    for k, right in enumerate((0.65, 0.95, 0.8)):
        steered = Steered(f"steerings/{k}", f"{k}" * 64)
        write_run(
            tmp_path, QUESTIONS, QUESTIONS.answers(right, 9), steered=steered, date=f"20260102_03060{k}"
        )
    rows = board_of(tmp_path).rows
    assert [row.rank for row in rows] == [1, 2, 3]
    assert [row.gain for row in rows] == sorted((row.gain for row in rows), key=lambda gain: -(gain or 0))
    smallest = min(rows, key=lambda row: row.comparison.test.p if row.comparison.test else 2)
    assert smallest.comparison.test is not None
    assert smallest.p_adjusted == pytest.approx(min(1, 3 * smallest.comparison.test.p))


def test_benjamini_hochberg_by_option(tmp_path: Path) -> None:
    """Four gains of which Holm keeps fewer than Benjamini-Hochberg; every file names the correction."""
    write_run(tmp_path / "logs", QUESTIONS, QUESTIONS.answers(0.0, 1), date=BASE_DATE)
    for k, gained in enumerate((8, 7, 6, 6)):
        answers = [
            gold if index < gained else "no" if gold == "yes" else "yes"
            for index, gold in enumerate(QUESTIONS.golds)
        ]
        steered = Steered(f"steerings/{k}", f"{k}" * 64)
        write_run(tmp_path / "logs", QUESTIONS, answers, steered=steered, date=f"20260102_03060{k}")
    strict = build_board([tmp_path / "logs"])
    assert main(["leaderboard", str(tmp_path / "logs"), "--correction", "benjamini_hochberg", "--out",
                 str(tmp_path / "board")]) == 0  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "board" / "leaderboard.csv").open()))
    p = np.array([float(row["p"]) for row in rows])
    found = [float(row["p_benjamini_hochberg"]) for row in rows]
    assert found == pytest.approx(false_discovery_control(p).tolist())
    assert [row["verdict"] for row in rows] == ["better"] * 4
    assert [row.verdict for row in strict.rows].count("better") == 2
    for name in ("leaderboard.md", "index.html"):
        text = (tmp_path / "board" / name).read_text(encoding="utf-8")
        assert "p (Benjamini-Hochberg)" in text
        assert "Holm" not in text


def test_questions_without_images_are_judged_one_by_one(tmp_path: Path) -> None:
    """A manifest records no image for any of them; that is not one image that all of them share."""
    write_pair(tmp_path, dataclasses.replace(QUESTIONS, images=()))
    (row,) = board_of(tmp_path).rows
    assert row.images is None
    assert row.units == 60
    assert row.comparison.test is not None
    assert row.comparison.test.method == "McNemar exact"


def test_a_gain_is_blue_in_plots_also_where_lower_is_better(tmp_path: Path) -> None:
    errors = {"errors": lambda answer, gold: float(answer != gold)}
    write_pair(tmp_path, metrics=errors, higher_is_better=False)
    board = board_of(tmp_path)
    assert board.rows[0].comparison.difference < 0
    (axes,) = board.plot().axes
    assert axes.lines[1].get_color() == BLUE


def test_only_runs_of_one_model_and_learning_rate_are_pooled(tmp_path: Path) -> None:
    """Steerings that differ in their seed are no draws of one thing if anything else differs too."""
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE)
    write_run(tmp_path, QUESTIONS, BEFORE, date="20260102_030406", more_args=",dtype=bfloat16")
    for k, (rate, more) in enumerate(((0.1, ""), (0.1, ",dtype=bfloat16"), (0.2, ""))):
        made = provenance("shapes_discovery") | {"seed": k}
        made["settings"] = {"how": "learned", "learning_rate": rate, "seed": k}
        steered = Steered(f"steerings/{k}", f"{k}" * 64, provenance=made)
        write_run(tmp_path, QUESTIONS, AFTER, steered=steered, date=f"20260102_03060{k}", more_args=more)
    board = board_of(tmp_path)
    assert len(board.rows) == 3
    assert not board.pooled


def test_a_pooled_interval_agrees_with_its_test(tmp_path: Path) -> None:
    """Few examples change, so that the bootstrap interval excludes zero although the test finds nothing."""
    write_run(tmp_path, QUESTIONS, QUESTIONS.answers(0.0, 1), date=BASE_DATE)
    for k in range(2):
        answers = [*QUESTIONS.golds[:5], *QUESTIONS.answers(0.0, 1)[5:]]
        steered = Steered(f"steerings/{k}", f"{k}" * 64, provenance=provenance("shapes") | {"seed": k})
        write_run(tmp_path, QUESTIONS, answers, steered=steered, date=f"20260102_03060{k}")
    (pooled,) = board_of(tmp_path).pooled
    assert pooled.comparison.test is not None
    assert pooled.comparison.test.p > 0.05
    assert pooled.comparison.interval is not None
    assert pooled.comparison.interval.low <= 0


def test_seeds_of_one_steering_are_pooled(tmp_path: Path) -> None:
    """Three seeds of a random bank, none significant alone, and another factor, which is another thing."""
    logs = tmp_path / "logs"
    write_run(logs, QUESTIONS, QUESTIONS.answers(0.0, 1), date=BASE_DATE)
    wrong = QUESTIONS.answers(0.0, 1)
    columns = []
    for k, (start, factor) in enumerate(((0, 2.0), (4, 2.0), (8, 2.0), (0, 3.0))):
        right = range(start, start + 4)
        answers = [
            gold if i in right else no
            for i, (gold, no) in enumerate(zip(QUESTIONS.golds, wrong, strict=True))
        ]
        made = provenance("shapes_discovery") | {"seed": k}
        made["settings"] = {"how": "fixed", "factor": factor}
        steered = Steered(f"steerings/{k}", f"{k}" * 64, provenance=made)
        write_run(logs, QUESTIONS, answers, steered=steered, date=f"20260102_03060{k}")
        columns.append([float(i in right) for i in range(len(answers))])
    assert main(["leaderboard", str(logs), "--out", str(tmp_path / "board"), "--json"]) == 0
    board = build_board([logs])
    (pooled,) = board.pooled
    mean = np.mean(columns[:3], axis=0)
    assert len(pooled.members) == 3
    assert pooled.comparison.difference == pytest.approx(mean.mean())
    # Twelve examples gain a third each: of the 2^12 sign patterns two are as far from zero.
    assert pooled.comparison.test is not None
    assert pooled.comparison.test.p == pytest.approx(2 / 2**12, abs=2e-3)
    assert pooled.verdict == "better"
    assert {row.verdict for row in board.rows} == {"no clear difference"}
    assert "## Pooled over seeds" in (tmp_path / "board" / "leaderboard.md").read_text()
    page = (tmp_path / "board" / "index.html").read_text()
    assert "Pooled over seeds" in page


def test_under_ten_examples_there_is_no_verdict(tmp_path: Path) -> None:
    few = Questions.drawn(count=9)
    write_run(tmp_path, few, few.answers(0.0, 1), date=BASE_DATE)
    write_run(tmp_path, few, few.answers(1.0, 1), steered=Steered(), date="20260102_030600")
    (row,) = build_board([tmp_path]).rows
    assert row.comparison.test is not None
    assert row.comparison.test.p < 0.05
    assert (row.verdict, row.p_adjusted) == ("not judged", None)
    assert "too few for a verdict: 9 independent examples" in row.comparison.note


def test_an_interval_excludes_zero_only_where_its_test_does(tmp_path: Path) -> None:
    """Five graded gains of 40: the bootstrap interval excludes zero, sign flips give p = 1/16."""
    graded = {"anls": lambda answer, gold: 0.5 if answer == gold else 0.25}
    none = QUESTIONS.answers(0.0, 1)
    some = [
        gold if k < 5 else answer for k, (gold, answer) in enumerate(zip(QUESTIONS.golds, none, strict=True))
    ]
    write_run(tmp_path, QUESTIONS, none, date=BASE_DATE, metrics=graded)
    write_run(tmp_path, QUESTIONS, some, steered=Steered(), date="20260102_030600", metrics=graded)
    (row,) = build_board([tmp_path]).rows
    assert row.comparison.test is not None
    assert row.comparison.interval is not None
    assert row.comparison.test.p > 0.05
    assert row.comparison.interval.low == 0


def test_a_p_value_that_no_draw_reached_says_so_where_it_decides_nothing(tmp_path: Path) -> None:
    anls = {"anls": lambda answer, gold: 1.0 if answer == gold else 0.25}
    none, every = QUESTIONS.answers(0.0, 1), QUESTIONS.answers(1.0, 1)
    write_run(tmp_path, QUESTIONS, none, date=BASE_DATE, metrics=anls)
    for k in range(3):
        steered = Steered(f"s/{k}", f"{k}")
        write_run(tmp_path, QUESTIONS, every, steered=steered, date=f"20260102_03060{k}", metrics=anls)
    for resamples, said in ((39, True), (199, False)):
        rows = build_board([tmp_path], resamples=resamples).rows
        assert len(rows) == 3
        assert all(("no random draw differed this much" in row.comparison.note) == said for row in rows)
        assert all((row.verdict == "better") != said for row in rows)


def test_works_without_manifests(tmp_path: Path) -> None:
    write_run(tmp_path, QUESTIONS, BEFORE, model="llava_hf", manifest=False, date=BASE_DATE)
    write_run(tmp_path, QUESTIONS, AFTER, steered=Steered(strength=0.5), manifest=False, date=DATE)
    (row,) = board_of(tmp_path).rows
    steering = row.pair.steered.steering
    assert steering is not None
    assert (steering.path, steering.digest, steering.strength) == ("steerings/one", None, 0.5)


Change = Callable[[Path], None]


def write_other(folder: Path, **options: Any) -> None:
    write_run(folder, QUESTIONS, BEFORE, date=BASE_DATE)
    write_run(folder, options.pop("questions", QUESTIONS), AFTER, steered=Steered(), date=DATE, **options)


OTHER_QUESTIONS = Questions("shapes", ["Other?", *QUESTIONS.texts[1:]], QUESTIONS.golds, QUESTIONS.images)
OTHER_PICTURES = Questions(
    "shapes", QUESTIONS.texts, QUESTIONS.golds, QUESTIONS.images[1:] + QUESTIONS.images[:1]
)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"questions": OTHER_QUESTIONS},
            r"question or the gold answer differs for 1 examples \(first: doc_id 0\)",
        ),
        ({"questions": OTHER_PICTURES}, r"prompt or the image differs for \d+ examples"),
        ({"base": "tiny/other"}, "the base name is tiny/other here and tiny/llava in the baseline"),
        ({"more_args": ",dtype=float16"}, "the model arguments differ: dtype"),
        ({"config": {"gen_kwargs": "temperature=1"}}, "gen_kwargs is .*temperature=1.* here"),
    ],
)
def test_runs_that_differ_are_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    write_other(tmp_path, **options)
    board = board_of(tmp_path)
    assert not board.rows
    assert re.search(reason, " ".join(reasons(board)))


def test_runs_of_other_weights_at_one_path_are_not_compared(tmp_path: Path) -> None:
    """A checkpoint that was swapped between the runs must not be credited to the steering."""
    first, second = "sha256-float32-aa", "sha256-float32-bb"
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE, weights=first)
    write_run(tmp_path, QUESTIONS, AFTER, steered=Steered(), date=DATE, weights=second)
    board = board_of(tmp_path)
    assert not board.rows
    assert reasons(board) == [f"the weights at tiny/llava differ: {second} here and {first} in the baseline"]
    write_run(tmp_path, QUESTIONS, BEFORE, date="20260102_030406", weights=second)
    (row,) = board_of(tmp_path).rows
    assert row.pair.baseline.base.weights == second


@pytest.mark.parametrize(
    ("made_for", "weights", "note"),
    [
        ("tiny/llava", None, ""),
        ("tiny/llava", "sha256-float32-aa", ""),
        ("a/copy", "sha256-float32-aa", ""),
        ("tiny/llava", "sha256-bfloat16-bb", ""),
        ("other/llava", None, "made for other/llava, and the base model here is tiny/llava"),
        ("tiny/llava", "sha256-float32-bb", "made for other weights of tiny/llava"),
    ],
)
def test_a_steering_made_for_another_base_model_is_noted(
    tmp_path: Path, made_for: str, weights: str | None, note: str
) -> None:
    source = provenance("shapes") | {"base_model": made_for, "weights": weights}
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE, weights="sha256-float32-aa")
    steered = Steered(provenance=source)
    write_run(tmp_path, QUESTIONS, AFTER, steered=steered, date=DATE, weights="sha256-float32-aa")
    board = board_of(tmp_path)
    (row,) = board.rows
    assert any("steering was made for" in line for line in row.notes) == bool(note)
    assert note in " ".join(row.notes)
    assert note in " ".join(board.warnings)


def test_other_examples_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE)
    write_run(tmp_path, QUESTIONS, AFTER[:50], steered=Steered(), date=DATE, limit=50)
    assert reasons(board_of(tmp_path)) == ["examples differ: 10 only in the baseline, 0 only here"]


def test_a_steered_run_without_baseline_is_told_the_way_out(tmp_path: Path) -> None:
    write_run(tmp_path, QUESTIONS, AFTER, steered=Steered())
    (reason,) = reasons(board_of(tmp_path))
    assert (
        "no baseline run of tiny/llava on shapes: run the same lmms-eval command without steering=" in reason
    )


def test_devices_and_other_seeds_do_not_stop_a_pair(tmp_path: Path) -> None:
    write_other(tmp_path, more_args=",device=cuda:1", seeds=(7, 1234, 1234, 1234))
    (row,) = board_of(tmp_path).rows
    assert any("seeds differ" in note for note in row.notes)


def test_a_baseline_with_the_same_seeds_comes_first(tmp_path: Path) -> None:
    for k, seed in enumerate((7, 0)):
        write_run(tmp_path, QUESTIONS, BEFORE, date=f"20260102_03040{k}", seeds=(seed, 1, 1, 1))
    write_run(tmp_path, QUESTIONS, AFTER, steered=Steered(), date=DATE, seeds=(7, 1, 1, 1))
    (row,) = board_of(tmp_path).rows
    assert row.pair.baseline.seeds == (7, 1, 1, 1)


def test_errors_and_missing_examples_keep_a_run_off_the_ranking(tmp_path: Path) -> None:
    write_pair(tmp_path)
    error = {"task": "shapes", "doc_id": 3, "error": "RuntimeError: out of memory"}
    write_run(tmp_path, QUESTIONS, AFTER, steered=Steered("s/a", "a"), date="20260102_040000", errors=[error])
    write_run(tmp_path, QUESTIONS, AFTER[:30], steered=Steered("s/b", "b"), date="20260102_050000")
    empty = [""] * 60
    write_run(tmp_path, QUESTIONS, empty, steered=Steered("s/c", "c"), date="20260102_060000")
    board = board_of(tmp_path)
    assert len(board.rows) == 1
    text = " ".join(reasons(board))
    assert "generation raised: doc_id 3: RuntimeError: out of memory" in text
    assert "incomplete: 30 of 60 examples" in text
    assert "every answer is empty" in text


def test_a_steering_that_changes_nothing_is_noted(tmp_path: Path) -> None:
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE)
    write_run(tmp_path, QUESTIONS, BEFORE, steered=Steered(), date=DATE)
    (row,) = board_of(tmp_path).rows
    assert "the steering changed no answer" in row.notes
    assert row.verdict == "no clear difference"


@pytest.mark.parametrize(
    ("key", "values", "reason"),
    [
        (
            "base_model",
            [{"id": "tiny/llava", "revision": "a1"}, {"id": "tiny/llava", "revision": "b2"}],
            "the base revision is b2 here and a1 in the baseline",
        ),
        (
            "base_wrapper",
            ["llava_hf", "llava_onevision"],
            "the base wrapper is llava_onevision here and llava_hf in the baseline",
        ),
    ],
)
def test_a_base_of_another_revision_or_wrapper_is_refused(
    tmp_path: Path, key: str, values: list[object], reason: str
) -> None:
    write_pair(tmp_path)
    for path, value in zip(sorted(tmp_path.rglob("hones_manifest_*")), values, strict=True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    board = board_of(tmp_path)
    assert not board.rows
    assert reasons(board) == [reason]


def test_several_models_and_seeds_are_each_compared_with_their_own(tmp_path: Path) -> None:
    """Two models, each with a baseline and a steering of two seeds: four rows, ranked within a model."""
    for m, base in enumerate(("tiny/one", "tiny/two")):
        for s in (0, 7):
            options: dict[str, Any] = {"base": base, "seeds": (s, 1, 1, 1)}
            before, after = QUESTIONS.answers(0.5, 10 * m + s), QUESTIONS.answers(0.7, 10 * m + s + 1)
            write_run(tmp_path, QUESTIONS, before, date=f"20260102_0304{m}{s}", **options)
            steered = Steered(provenance=provenance("shapes"))
            write_run(tmp_path, QUESTIONS, after, date=f"20260102_0305{m}{s}", steered=steered, **options)
    board = make_board([tmp_path], tmp_path / "out", resamples=99, images=False)
    assert not board.unranked
    found = [(row.pair.steered.base.name, row.pair.steered.seeds[0], row.rank) for row in board.rows]
    assert {(base, seed) for base, seed, _ in found} == {
        (base, seed) for base in ("tiny/one", "tiny/two") for seed in (0, 7)
    }
    assert sorted((base, rank) for base, _, rank in found) == [
        (base, rank) for base in ("tiny/one", "tiny/two") for rank in (1, 2)
    ]
    for row in board.rows:
        assert row.pair.baseline.base == row.pair.steered.base
        assert row.pair.baseline.seeds == row.pair.steered.seeds
    listed = list(csv.DictReader((tmp_path / "out" / "leaderboard.csv").open()))
    assert len({(row["base"], row["steering"]) for row in listed}) == 4
    assert all(f"seed {seed}" in " ".join(row["steering"] for row in listed) for seed in (0, 7))
    index = (tmp_path / "out" / "index.html").read_text()
    assert '<select data-filter="base">' in index


def test_reused_examples_are_counted_and_flagged(tmp_path: Path) -> None:
    seen = make_logs._hashes(QUESTIONS.images[:7])
    by_image = Steered("s/a", "a", provenance=provenance("elsewhere", images=seen))
    by_id = provenance("shapes", ids=range(5)) | {}
    by_id["examples"][0]["split"] = "test"
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE)
    write_run(tmp_path, QUESTIONS, AFTER, steered=by_image, date="20260102_040000")
    write_run(
        tmp_path, QUESTIONS, AFTER, steered=Steered("s/b", "b", provenance=by_id), date="20260102_050000"
    )
    clean = Steered("s/c", "c", provenance=provenance("shapes", ids=range(5)))  # the discovery split
    write_run(tmp_path, QUESTIONS, AFTER, steered=clean, date="20260102_060000")
    flags = {
        row.pair.steered.steering.path: row.flags
        for row in board_of(tmp_path).rows
        if row.pair.steered.steering
    }
    assert flags["s/a"] == ("7 of 60 examples show images that were used to choose this steering",)
    assert flags["s/b"] == ("5 of 60 examples were used to choose this steering",)
    assert flags["s/c"] == ()


def test_truncated_results_cost_only_themselves(tmp_path: Path) -> None:
    write_pair(tmp_path)
    path = write_run(tmp_path, QUESTIONS, AFTER, steered=Steered("s/b", "b"), date="20260102_040000")
    path.write_bytes(path.read_bytes()[:300])
    board = board_of(tmp_path)
    assert len(board.rows) == 1
    (line,) = board.unreadable
    assert "20260102_040000_results.json" in line
    assert "truncated or not JSON" in line


@pytest.mark.parametrize(
    "change",
    [
        {"configs": {"shapes": "what?"}},
        {"results": {"shapes": [1, 2]}},
        {"n-samples": {"shapes": 3}},
        {"config": {"model": "hones_llava", "model_args": 7, "offset": "x"}},
        {"results": []},
        {"config": {"model": "hones_llava", "model_args": "pretrained=x", "limit": math.inf}},
        {"results": {"shapes": {"exact_match,none": 10**400}}},
    ],
)
def test_results_of_another_shape_cost_only_themselves(tmp_path: Path, change: dict[str, Any]) -> None:
    write_pair(tmp_path)
    path = write_run(tmp_path, QUESTIONS, AFTER, steered=Steered("s/b", "b"), date="20260102_040000")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    board = board_of(tmp_path)
    assert len(board.rows) == 1
    (line,) = board.unreadable
    assert "20260102_040000_results.json: not " in line


def test_truncated_samples_mark_the_run(tmp_path: Path) -> None:
    write_pair(tmp_path)
    path = write_run(tmp_path, QUESTIONS, AFTER, steered=Steered("s/b", "b"), date="20260102_040000")
    samples = path.with_name("20260102_040000_samples_shapes.jsonl")
    samples.write_bytes(samples.read_bytes()[:-40])
    board = board_of(tmp_path)
    assert len(board.rows) == 1
    assert any("1 lines that are not samples (first: line 60)" in one for one in reasons(board))
    assert any("incomplete: 59 of 60" in one for one in reasons(board))


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"target": "x"}', '{"doc_id": Infinity}', f'{{"doc_id": {10**30}}}', "[" * 200_000, "\x00"],
)
def test_a_line_that_is_no_sample_marks_the_run(tmp_path: Path, line: str) -> None:
    write_pair(tmp_path)
    path = write_run(tmp_path, QUESTIONS, AFTER, steered=Steered("s/b", "b"), date="20260102_040000")
    with path.with_name("20260102_040000_samples_shapes.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    board = board_of(tmp_path)
    assert len(board.rows) == 1
    assert any("1 lines that are not samples (first: line 62)" in one for one in reasons(board))


def test_lines_that_were_read_before_are_the_same_samples(tmp_path: Path) -> None:
    """Files that share lines, in another order and between new ones, with a metric more and a long line."""
    write_pair(tmp_path)
    paths = sorted(tmp_path.rglob("*_samples_*.jsonl"))
    lines = paths[0].read_text().splitlines()
    long = json.dumps(json.loads(lines[7]) | {"input": "x" * 20_000})
    mixed = tmp_path / "x_samples_mixed.jsonl"
    mixed.write_text("\n".join([*reversed(lines[8:]), long, *paths[1].read_text().splitlines()[:7]]))
    for path, metrics in [
        (paths[0], ["exact_match"]),
        (mixed, ["exact_match"]),
        (mixed, ["other", "exact_match"]),
    ]:
        (found,), problems = read_samples(path, metrics)
        kept = sorted(map(json.loads, path.read_text().splitlines()), key=lambda one: one["doc_id"])
        assert not problems
        assert found.doc_ids.tolist() == [one["doc_id"] for one in kept]
        assert found.values["exact_match"].tolist() == [one["exact_match"] for one in kept]
        assert found.answers.tolist() == [hash(answer_of(one)) for one in kept]
        assert list(read_rows(found, range(len(kept)))) == kept
        if "other" in metrics:
            assert np.isnan(found.values["other"]).all()


def answer_of(sample: dict[str, Any]) -> str:
    answer = sample["filtered_resps"]
    return answer if isinstance(answer, str) else json.dumps(answer)


def test_samples_without_results_and_results_without_samples(tmp_path: Path) -> None:
    write_pair(tmp_path)
    first = write_run(tmp_path, QUESTIONS, AFTER, steered=Steered("s/b", "b"), date="20260102_040000")
    first.unlink()
    second = write_run(tmp_path, QUESTIONS, AFTER, steered=Steered("s/c", "c"), date="20260102_050000")
    second.with_name("20260102_050000_samples_shapes.jsonl").unlink()
    board = board_of(tmp_path)
    assert len(board.rows) == 1
    assert any("samples without a results file" in one for one in board.unreadable)
    assert any("run lmms-eval with --log_samples" in one for one in reasons(board))


def test_duplicate_runs_count_once(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_run(tmp_path, QUESTIONS, QUESTIONS.answers(0.9, 4), steered=Steered(), date="20260102_040000")
    board = board_of(tmp_path)
    (row,) = board.rows
    assert row.pair.steered.date == "20260102_040000"
    assert reasons(board) == ["a newer run of the same thing is used: tiny__llava/20260102_040000 shapes"]
    twice = build_board([tmp_path, tmp_path / "tiny__llava"], resamples=199)
    assert twice.runs == board.runs


def test_two_runs_in_one_file_are_told_apart_from_none(tmp_path: Path) -> None:
    write_pair(tmp_path)
    for answers in (AFTER, BEFORE):
        write_run(tmp_path, QUESTIONS, answers, steered=Steered("s/b", "b"), date="20260102_040000")
    board = board_of(tmp_path)
    assert len(board.rows) == 1
    assert any(
        "60 examples more than once: two runs were written to one file" in one for one in reasons(board)
    )


@pytest.mark.parametrize("value", ["abc", None, math.nan, "1e999", {"score": "x"}])
def test_a_metric_that_is_not_a_number_marks_its_row(tmp_path: Path, value: object) -> None:
    def broken(answer: str, gold: str) -> Any:
        return value if answer == "no" else 1.0

    metrics = {"exact_match": exact, "broken": broken}
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE, metrics=metrics, reported={"broken": 0.5})
    write_run(
        tmp_path, QUESTIONS, AFTER, steered=Steered(), date=DATE, metrics=metrics, reported={"broken": 0.6}
    )
    rows = {row.metric.name: row for row in board_of(tmp_path).rows}
    assert rows["exact_match"].rank == 1
    assert rows["broken"].verdict == "not judged"
    assert (
        "interval" in rows["broken"].comparison.note or "not a number for" in rows["broken"].comparison.note
    )


@pytest.mark.parametrize("value", ["N/A", math.nan, math.inf, [1, 2], None])
def test_a_reported_value_that_is_not_a_number_marks_its_row(tmp_path: Path, value: object) -> None:
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE)
    write_run(tmp_path, QUESTIONS, AFTER, steered=Steered(), date=DATE, reported={"exact_match": value})
    (row,) = board_of(tmp_path).rows
    assert (row.rank, row.verdict) == (None, "not judged")
    assert row.comparison.note == "the reported value is not a number"
    make_board([tmp_path], tmp_path / "out", resamples=199)
    assert "the reported value is not a number" in (tmp_path / "out" / "leaderboard.csv").read_text()


def test_numbers_that_numpy_printed_are_numbers(tmp_path: Path) -> None:
    write_pair(tmp_path, metrics={"match": lambda answer, gold: str(answer == gold)}, reported={"match": 0.5})
    board = board_of(tmp_path)
    (row,) = board.rows
    assert set(np.unique(row.pair.steered.samples["none"].values["match"])) == {0.0, 1.0}


@pytest.mark.parametrize(
    "damage",
    ["not json", '{"format": "other"}', '{"format": "hones-eval run manifest"}', "[" * 200_000, "\x00"],
)
def test_a_broken_manifest_is_a_line_and_no_more(tmp_path: Path, damage: str) -> None:
    write_pair(tmp_path)
    for path in tmp_path.rglob("hones_manifest_*"):
        path.write_text(damage)
    board = board_of(tmp_path)
    assert len(board.rows) == 1
    assert len(board.unreadable) == 2


def test_files_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    """As some editors on Windows write them."""
    write_pair(tmp_path)
    plain = board_of(tmp_path)
    for path in tmp_path.rglob("*.json*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = board_of(tmp_path)
    assert marked.warnings == plain.warnings
    ((row,), (expected,)) = marked.rows, plain.rows
    assert (row.baseline, row.steered, row.n) == (expected.baseline, expected.steered, expected.n)
    assert row.verdict == expected.verdict
    assert not marked.unranked


def test_manifests_that_repeat_each_other_are_told_apart(tmp_path: Path) -> None:
    """Requests that read as those of the manifest before are not decoded again; any other are."""
    write_pair(tmp_path)
    paths = sorted(tmp_path.rglob("hones_manifest_*"))
    contents = [json.loads(path.read_text()) for path in paths]
    changed = json.loads(json.dumps(contents[0]["requests"]))
    changed["shapes"]["7"]["prompt_sha256"] = "0" * 64
    nested = contents[0] | {"nested": {"requests": contents[0]["requests"]}, "requests": changed}
    hidden = {"nested": {"requests": contents[0]["requests"]}} | contents[0] | {"requests": changed}
    for indent in (None, 1):
        shared = SharedRequests()
        for content in (contents[0], contents[1], nested, contents[0], hidden, contents[1], contents[0]):
            assert shared.decode(json.dumps(content, indent=indent)) == content


def test_a_run_that_raised_and_left_no_results(tmp_path: Path) -> None:
    write_pair(tmp_path)
    error = {"task": "shapes", "doc_id": 3, "error": "RuntimeError: boom"}
    path = write_run(
        tmp_path, QUESTIONS, AFTER, steered=Steered("s/x", "x"), date="20260102_040000", errors=[error]
    )
    (manifest,) = tmp_path.rglob("hones_manifest_77_20260102_040000*")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"results": None}))
    path.unlink()
    path.with_name("20260102_040000_samples_shapes.jsonl").unlink()
    board = board_of(tmp_path)
    assert any("the run failed (doc_id 3: RuntimeError: boom)" in one for one in board.unreadable)
    assert len(board.rows) == 1


@pytest.mark.parametrize(
    ("limit", "offset", "answered", "complete"),
    [(None, 0, 60, True), (-1, 0, 60, True), (20, 0, 20, True), (20, 0, 19, False), (0.5, 0, 30, True),
     (100, 0, 60, True), (None, 10, 50, True), (20, 50, 10, True), (20, 50, 9, False)],
)  # fmt: skip
def test_limit_and_offset_say_how_many_examples_there_should_be(
    tmp_path: Path, limit: float | None, offset: int, answered: int, complete: bool
) -> None:
    write_run(tmp_path, QUESTIONS, BEFORE[:answered], limit=limit, config={"offset": offset})
    found = reasons(board_of(tmp_path))
    assert any(one.startswith("incomplete") for one in found) is not complete


def test_filters_of_one_task_are_rows_of_their_own(tmp_path: Path) -> None:
    """lmms-eval writes a block of samples for each filter into one file, and does not say which is which."""
    strict = QUESTIONS.answers(0.3, 5)
    for answers, steered, date in ((BEFORE, None, BASE_DATE), (AFTER, Steered(), DATE)):
        write_run(tmp_path, QUESTIONS, strict, steered=steered, date=date)
        path = write_run(tmp_path, QUESTIONS, answers, steered=steered, date=date)
        content = json.loads(path.read_text())
        found = [sum(map(exact, one, QUESTIONS.golds)) / 60 for one in (strict, answers)]
        names = ("exact_match,strict", "exact_match,flexible")
        content["results"]["shapes"] = dict(zip(names, found, strict=True))
        path.write_text(json.dumps(content))
    rows = {row.metric.filter: row for row in board_of(tmp_path).rows}
    assert set(rows) == {"strict", "flexible"}
    assert (rows["strict"].gained, rows["strict"].lost) == (0, 0)
    assert (rows["flexible"].gained or 0) > 0


def test_a_folder_full_of_damage_costs_the_good_rows_nothing(tmp_path: Path) -> None:
    """Every kind of damage in one folder: the good row is as it would be alone, and each has its line."""
    write_pair(tmp_path / "good")
    (alone,) = board_of(tmp_path / "good").rows
    logs = tmp_path / "all"
    write_pair(logs)
    paths = {}
    for k, kind in enumerate(("results", "samples", "orphan", "twice", "hostile", "manifest")):
        hostile = ["<script>x</script>\x07\u202e" + "A" * 1_000_000] * 60
        answers = hostile if kind == "hostile" else AFTER
        date = f"20260102_0400{k:02d}"
        paths[kind] = write_run(logs, QUESTIONS, answers, steered=Steered(f"s/{kind}", kind), date=date)
    write_run(logs, QUESTIONS, BEFORE, steered=Steered("s/twice", "twice"), date="20260102_040003")
    older = write_run(logs, QUESTIONS, BEFORE, steered=Steered(), date="20260101_000000")
    paths["results"].write_bytes(paths["results"].read_bytes()[:200])
    samples = paths["samples"].with_name("20260102_040001_samples_shapes.jsonl")
    samples.write_bytes(samples.read_bytes()[:-30])
    paths["orphan"].unlink()
    (manifest,) = paths["manifest"].parent.glob("hones_manifest_77_20260102_040005*")
    manifest.write_text('{"format": "hones-eval run manifest"')
    number = write_run(logs, QUESTIONS, AFTER, steered=Steered("s/nan", "nan"), date="20260102_040009")
    content = json.loads(number.read_text())
    content["results"]["shapes"]["exact_match,none"] = math.nan
    number.write_text(json.dumps(content))

    board = make_board([logs], tmp_path / "out", resamples=199, images=False)
    rows = {row.pair.steered.steering.path: row for row in board.rows if row.pair.steered.steering}
    assert set(rows) == {"steerings/one", "s/hostile", "s/nan", "s/manifest"}
    good = rows["steerings/one"]
    assert good.comparison == alone.comparison
    assert (good.gained, good.lost, good.n) == (alone.gained, alone.lost, alone.n)
    assert rows["s/nan"].verdict == "not judged"
    for name in ("index.html", "leaderboard.md"):
        text = html.unescape((tmp_path / "out" / name).read_text()).replace("\\", "")
        for line in (
            "20260102_040000_results.json: truncated or not JSON",
            "20260102_040001_samples_shapes.jsonl has 1 lines that are not samples (first: line 60)",
            "20260102_040002_samples_shapes.jsonl: samples without a results file",
            "60 examples more than once: two runs were written to one file",
            "hones_manifest_77_20260102_040005_shapes_rank0.json is not valid JSON",
            "a newer run of the same thing is used",
        ):
            assert line in text, (name, line)
    assert older.name.removesuffix("_results.json") in (tmp_path / "out" / "leaderboard.csv").read_text()


def test_a_single_results_file_can_be_given(tmp_path: Path) -> None:
    write_pair(tmp_path)
    files = sorted(tmp_path.rglob("*_results.json"))
    board = build_board(files, resamples=199)
    assert len(board.rows) == 1
    assert board.rows[0].pair.steered.has_manifest


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(HonesError, match="does not exist"):
        make_board([tmp_path / "none"], tmp_path / "out")
    with pytest.raises(HonesError, match="run lmms-eval with --log_samples --output_path DIR"):
        make_board([tmp_path], tmp_path / "out")
    write_pair(tmp_path)
    with pytest.raises(HonesError, match="--resamples 38: a 95 % interval needs 39 or more"):
        make_board([tmp_path], tmp_path / "out", resamples=38)
    with pytest.raises(HonesError, match="none is not a folder"):
        make_board([tmp_path], tmp_path / "out", include_path=tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_baselines_alone_are_told_the_way_out(tmp_path: Path) -> None:
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE)
    board = make_board([tmp_path], tmp_path / "out", resamples=199)
    (line,) = board.warnings
    assert "none of these runs is steered" in line
    for name in ("index.html", "leaderboard.md"):
        text = (tmp_path / "out" / name).read_text()
        assert line.capitalize() in text
        assert "the reasons are below" not in text


def test_the_csv_has_every_row_and_no_formula(tmp_path: Path) -> None:
    steered = Steered("=cmd|' /C calc'!A0", "f" * 64)
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE)
    write_run(tmp_path, QUESTIONS, AFTER, steered=steered, date=DATE)
    write_run(tmp_path, QUESTIONS, AFTER[:10], steered=Steered("s/b", "b"), date="20260102_040000")
    board = make_board([tmp_path], tmp_path / "out", resamples=199)
    rows = list(csv.DictReader((tmp_path / "out" / "leaderboard.csv").open()))
    assert [row["verdict"] for row in rows] == [board.rows[0].verdict, "left out"]
    assert float(rows[0]["difference"]) == pytest.approx(board.rows[0].comparison.difference)
    assert not any(value.startswith(("=", "@")) for row in rows for value in row.values())
    assert rows[0]["interval_method"] == "Bonett-Price"


@pytest.mark.parametrize(
    ("count", "better", "told"),
    [
        (
            9,
            True,
            "That cannot be told: the only row could not be judged "
            "(too few for a verdict: 9 independent examples)",
        ),
        (1, True, "That cannot be told: the only row could not be judged (only one example)"),
        (10, True, "Yes: 1 better, 0 worse, 0 unclear, 0 not judged"),
        (10, False, "No: 0 better, 1 worse, 0 unclear, 0 not judged"),
    ],
)
def test_the_answer_of_a_board_does_not_say_no_where_nothing_could_be_judged(
    tmp_path: Path, count: int, better: bool, told: str
) -> None:
    questions = Questions("shapes", [f"Question {k}?" for k in range(count)], ["yes"] * count)
    answers = [["no"] * count, ["yes"] * count][:: 1 if better else -1]
    write_run(tmp_path, questions, answers[0], date=BASE_DATE, manifest=False)
    write_run(tmp_path, questions, answers[1], date=DATE, steered=Steered(), manifest=False)
    assert build_board([tmp_path]).answer.removeprefix("Did it help? ").rstrip(".") == told


def test_short_forms_of_a_board_for_notebooks(tmp_path: Path) -> None:
    """Text from logs stays text in the HTML, and every form has the answer."""
    steered = Steered(path="steerings/<b>x<|b>")
    write_run(tmp_path, QUESTIONS, BEFORE, date=BASE_DATE)
    write_run(tmp_path, QUESTIONS, AFTER, date=DATE, steered=steered)
    board = build_board([tmp_path])
    (row,) = board.rows
    assert board.answer.startswith("Did it help? ")
    assert repr(board) == f"<hones_eval.Board of 1 row from 2 runs. {board.answer}>"
    page = board._repr_html_()
    assert html.escape(board.answer) in page
    assert page.count("<tr>") == 2
    assert "<b>" not in page
    (record,) = board.to_pandas().to_dict("records")
    assert record["difference"] == row.comparison.difference
    assert record["verdict"] == row.verdict
    assert board.plot()._repr_png_().startswith(b"\x89PNG")
    figure = board.plot()
    assert " ".join(figure.get_suptitle().split()) == board.answer
    (axes,) = figure.axes
    interval = row.comparison.interval
    assert interval is not None
    assert axes.lines[0].get_xdata().tolist() == [interval.low, interval.high]
