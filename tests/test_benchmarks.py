"""lmms-eval's own tasks, unmodified, from the hub to a ranking and to a row of the leaderboard.

Data sets of the real columns and types come from the loopback (`benchmark_data`), the model is the embedded
one, and everything runs through the front doors: the `lmms-eval` command, `hones-eval rank` and
`hones-eval leaderboard`. What is found is written into docs/benchmarks.md, or compared with it.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_data
import pytest
from hub import serving
from lmms_runs import (
    HONES_EVAL,
    answers,
    environment,
    manifest,
    prompts,
    run_command,
    run_each,
    write_steering,
)

from hones_eval.__main__ import main
from hones_eval.toy import checkpoint_path
from hones_eval.toy.captions import captions

TABLE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
REWRITE = "HONES_EVAL_REWRITE_DOCS"
METHODS = ("hones", "vseam")
GENERATION = "max_new_tokens=12"
TASKS = (
    *("vqav2_val", "gqa", "textvqa_val", "docvqa_val", "pope", "mme", "scienceqa_img"),
    *("coco2014_cap_val", "flickr30k_test", "nocaps_val"),
    *("refcoco_bbox_rec_val", "refcoco_bbox_val", "ocrbench", "mmmu_val", "seedbench_ppl"),
)
pytestmark = pytest.mark.skipif(
    not shutil.which("java"), reason="lmms-eval's caption metrics tokenize with java"
)

DESCRIBED = [captions(scene) for scene in benchmark_data.SCENES]
GOLDS = {
    "vqav2_val": ("green", ["purple", "dark"], 1.0),
    "gqa": ("green", ["purple"], 1.0),
    "textvqa_val": ("zus", ["fug", "sign"], 1.0),
    "docvqa_val": ("ZUS", ["FUG", "fug"], 1.0),
    "pope": ("yes", ["no"], 1.0),
    "mme": ("Yes", ["No"], 400.0),
    "scienceqa_img": ("B", ["C"], 1.0),
    "coco2014_cap_val": (" ".join(DESCRIBED[0]), DESCRIBED[1], 1.0),
    "flickr30k_test": (" ".join(DESCRIBED[0]), DESCRIBED[1], 1.0),
    "nocaps_val": (" ".join(DESCRIBED[0]), DESCRIBED[1], 1.0),
    "refcoco_bbox_rec_val": ("[0.594, 0.062, 0.969, 0.438]", ["[0.594, 0.062, 0.969, 0.438]"], 1.0),
    "refcoco_bbox_val": (
        "the striped green star the large star",
        ["the purple triangle", "the small triangle"],
        1.0,
    ),
    "ocrbench": ("ZUS", ["FUG"], benchmark_data.COUNT / 1000),
    "mmmu_val": ("B", ["C"], 1.0),
    "seedbench_ppl": ("green", ["purple"], 1.0),
}
"""The target of the first example, the references of the second, and the metric of gold answers to all."""
FIND_GOLDS = """
import json, sys
from hones_eval.lmms.answers.choices import preferring
from hones_eval.lmms.examples import TaskExamples, load_lmm
def answer(one):
    asked = one.details
    return preferring(asked.gold, len(asked.offered)) if asked else one.references[0]
lmm = load_lmm("hones_llava", f"pretrained={sys.argv[1]}")
found = {}
for name in sys.argv[2:]:
    examples = TaskExamples(lmm, name, model_name="hones_llava")
    made = [examples[i] for i in range(len(examples))]
    golds = [examples.score(i, answer(one)) for i, one in enumerate(made)]
    found[name] = [made[0].target, made[1].references, examples.aggregate(golds)]
print(json.dumps(found))
"""


class Work(NamedTuple):
    """Where everything was written: `baseline` and `steered` logs, `board`, and a folder for each ranking."""

    folder: Path
    rows: list[dict[str, str]]
    golds: dict[str, Any]

    def ranking(self, task: str, method: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / f"{task}-{method}" / "ranking.json").read_text())
        return content

    def results(self, run: str) -> dict[str, Any]:
        (file,) = (self.folder / run).glob(f"*/{manifest(self.folder / run)['results']}")
        content: dict[str, Any] = json.loads(file.read_text())["results"]
        return content


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_steering(checkpoint_path(), folder / "steering", seed=1, spread=1.0)
    with serving(benchmark_data.repositories()) as url:
        evaluate(folder, url, "baseline", "")
        evaluate(folder, url, "steered", ",steering=steering")
        rank(folder, url)
        golds = find_golds(folder, url)
    board = folder / "board"
    assert main(["leaderboard", str(folder / "baseline"), str(folder / "steered"), "--out", str(board)]) == 0
    with (board / "leaderboard.csv").open() as file:
        yield Work(folder, list(csv.DictReader(file)), golds)


def evaluate(folder: Path, url: str, logs: str, more: str) -> None:
    model = ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}{more}"]
    tasks = ["--tasks", ",".join(TASKS), "--gen_kwargs", GENERATION]
    done = run_command([*model, *tasks, "--log_samples", "--output_path", logs], folder, url)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def rank(folder: Path, url: str) -> None:
    model = ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}"]
    generation = ["--gen_kwargs", GENERATION]
    commands = [
        ["rank", "--method", method, *model, "--tasks", task, *generation, "--out", f"{task}-{method}"]
        for task in TASKS
        for method in METHODS
    ]
    for command, ended in zip(commands, run_each(HONES_EVAL, commands, folder, url), strict=True):
        assert ended.status == 0, f"{command}: {ended.stderr[-3000:]}"


def find_golds(folder: Path, url: str) -> dict[str, Any]:
    program = [sys.executable, "-c", FIND_GOLDS, str(checkpoint_path()), *TASKS]
    env = environment(folder, url)
    done = subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / "submissions").exists()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("task", TASKS)
def test_gold_answers_are_right_by_the_tasks_own_scoring(task: str, work: Work) -> None:
    target, references, metric = GOLDS[task]
    assert work.golds[task][:2] == [target, references]
    assert work.golds[task][2] == pytest.approx(metric, rel=5e-3)  # boxes are words of three decimals


@pytest.mark.parametrize("task", TASKS)
def test_steered_runs_ask_the_same(task: str, work: Work) -> None:
    baseline, steered = work.folder / "baseline", work.folder / "steered"
    assert prompts(steered, task) == prompts(baseline, task)
    assert manifest(steered)["requests"][task] == manifest(baseline)["requests"][task]


def test_steered_runs_answer_otherwise(work: Work) -> None:
    """But for a few tasks, whose four short answers a mild steering of the embedded model leaves."""
    assert sum(changed(work, task) for task in TASKS) >= len(TASKS) - 3


def changed(work: Work, task: str) -> bool:
    return answers(work.folder / "steered", task) != answers(work.folder / "baseline", task)


@pytest.mark.parametrize("task", TASKS)
def test_discovery_measures_what_lmms_eval_reports(task: str, work: Work) -> None:
    """The unedited metric of a ranking is the one that the command gave for the same examples."""
    ranking = work.ranking(task, "hones")
    report, metric = ranking["report"], ranking["settings"]["metric"]
    if task != "mmmu_val":  # it guesses at random where an answer names no choice
        assert report["base_metric"] == pytest.approx(
            work.results("baseline")[task][f"{metric},none"], abs=1e-9
        )
    assert report["replay"] == work.ranking(task, "vseam")["report"]["replay"] == "exact"
    assert report["examples"] == len(answers(work.folder / "baseline", task))


def test_a_question_may_show_several_images(work: Work) -> None:
    shown = manifest(work.folder / "baseline")["requests"]["mmmu_val"]
    assert [len(shown[str(i)]["image_sha256"]) for i in range(4)] == [1, 2, 3, 1]


def test_right_answers_of_ocrbench_count_once(work: Work) -> None:
    """Its aggregation adds to a dict of its module: measured again and again, it must not grow."""
    unedited = work.ranking("ocrbench", "hones")["report"]["base_metric"]
    assert 0 < unedited <= benchmark_data.COUNT / 1000


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_row_with_a_paired_statistic(task: str, work: Work) -> None:
    tested = [row for row in rows_of(work, task) if row["test"]]
    assert tested
    assert all(row["p"] for row in tested)
    metric = work.ranking(task, "hones")["settings"]["metric"]
    assert metric in {row["metric"] for row in tested}


def rows_of(work: Work, task: str) -> list[dict[str, str]]:
    return [row for row in work.rows if row["task"] == task]


HEAD = f"""\
# Benchmarks

lmms-eval's own tasks, unmodified: a baseline and a steered run by the `lmms-eval` command, `hones-eval rank`
by both methods, and the row that `hones-eval leaderboard` makes of the two runs. `tests/test_benchmarks.py`
finds the figures of this page, with the embedded model and tiny data sets whose columns and types are those
of the real ones (`{REWRITE}=1` rewrites this page; otherwise the test compares).

- **target**: where the gold answer is from, proven by scoring it: an adapter of `hones_eval/lmms/targets.py`,
  the task's own `doc_to_target`, or a column that was proposed. Rankings name it
- **metric**: the task's first that is a number, which `rank` measures by default; `--metric` takes any other
- **rank**: heads measured by replay, neurons by what they write; the metric without an edit is the one that
  `lmms-eval` reports, except for MMMU, which guesses at random where an answer names no choice; here each
  example guesses the same every time
- **steered run**: the same prompts and images as the baseline, and other answers
- **row**: how many of the task's metrics are compared, of how many; the second table says how

| task | target | metric | rank hones | rank vseam | steered run | row |
|---|---|---|---|---|---|---|
"""
STATISTICS = """
## Statistics
Intervals here are over a handful of examples: from 100 on, plain BCa. What is grouped by image shares
images between questions.

| task | metric | test | interval | where there is none |
|---|---|---|---|---|
"""


def test_the_table_in_the_docs_is_what_was_found(work: Work) -> None:
    page = "".join([HEAD, *(line(work, task) for task in TASKS), STATISTICS, *statistics(work)])
    if os.environ.get(REWRITE):
        TABLE.write_text(page, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == page, f"{REWRITE}=1 rewrites it"


def line(work: Work, task: str) -> str:
    settings = work.ranking(task, "hones")["settings"]
    rows = rows_of(work, task)
    tested = sum(bool(row["test"]) for row in rows)
    cells = [task, settings["target"].replace("*", "\\*"), settings["metric"]]
    cells += [f"yes ({work.ranking(task, method)['report']['examples']} examples)" for method in METHODS]
    steered = "yes" if changed(work, task) else "yes, and it changed no answer here"
    return f"| {' | '.join([*cells, steered, f'{tested} of {len(rows)}'])} |\n"


def statistics(work: Work) -> Iterator[str]:
    """Metrics of a task that are compared alike share a line."""
    for task in TASKS:
        alike: dict[tuple[str, str, str], list[str]] = {}
        for row in rows_of(work, task):
            alike.setdefault(how(row), []).append(row["metric"])
        for (test, interval, reason), metrics in alike.items():
            yield f"| {task} | {', '.join(metrics)} | {test} | {interval} | {reason} |\n"


def how(row: Mapping[str, str]) -> tuple[str, str, str]:
    reason = "" if row["interval_method"] else row["notes"].split("no interval: ")[-1]
    return row["test"] or "none", row["interval_method"] or "none", reason
