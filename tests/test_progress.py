"""What long commands say while they run: what they load, what a pass costs, and how far it is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hones_eval.__main__ import main
from hones_eval.notes import duration, note
from hones_eval.runs import progress
from hones_eval.toy import checkpoint_path

RANK = [
    *("rank", "--method", "hones", "--model", "hones_llava", "--tasks", "scenes_vqa_relation_discovery"),
    *("--model_args", f"pretrained={checkpoint_path()}", "--limit", "5"),
]


def lines_of_rank(out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    assert main([*RANK, *flags, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out
    starts = ("loading ", "loaded ", "reading ", "heads: ", "neurons: ", "race: ")
    return [line for line in captured.err.splitlines() if line.startswith(starts)]


def test_a_command_says_what_it_loads_and_nothing_of_short_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of_rank(tmp_path / "ranking", capsys)
    assert lines[0] == f"loading hones_llava (pretrained={checkpoint_path()})"
    assert re.fullmatch(r"loaded in \d+ s, on cpu: <hones_eval.Model .* 6 layers of 8 heads.*", lines[1])
    assert lines[2] == "reading the examples of scenes_vqa_relation_discovery"
    assert len(lines) == 3


def test_a_long_pass_says_its_cost_its_progress_and_its_best_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "LONG", 0.0)
    lines = lines_of_rank(tmp_path / "ranking", capsys, "--json")
    heads = [line for line in lines if line.startswith("heads: ")]
    best = r"best heads so far \d\.\d, \d\.\d, \d\.\d, \d\.\d, \d\.\d"
    assert len(heads) == 4, "three steps of progress and one line of cost, and none after the last"
    assert re.fullmatch(rf"heads: 1 of 5 examples, [\d.e-]+ s each, about \d+ s left; {best}", heads[0])
    cost = "48 head passes per example; --budget 0.1 or --race 0.05 take fewer"
    assert re.fullmatch(rf"heads: 5 examples at [\d.e-]+ s each \({cost}\), about \d+ s left", heads[2])
    assert not [line for line in lines if line.startswith("neurons: ")], "neurons took a pass of their own"
    # The last line of the heads names those that the ranking has, measured on one example less.
    assert heads[3].startswith("heads: 4 of 5 examples")


def test_a_race_counts_its_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    lines = lines_of_rank(tmp_path / "ranking", capsys, "--race", "0.05", "--limit", "40", "--heads", "4")
    assert [line for line in lines if re.match(r"race: 1 of \d+ stages of examples, ", line)]


def test_only_the_first_process_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    note("second")
    monkeypatch.setenv("LOCAL_RANK", "0")
    note("first \x1b[31m")
    assert capsys.readouterr().err == "first \u27e8U+001B\u27e9[31m\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (720, "12 min"), (7800, "2 h 10 min")]
)
def test_time_spans_are_given_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_process_of_its_own_says_at_once_what_it_imports(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hones_eval", *RANK[:-4], "--model_args", "pretrained=nowhere"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith(("rank: ", "loading "))]
    assert lines == [
        "rank: importing torch, transformers and lmms-eval",
        "loading hones_llava (pretrained=nowhere)",
    ]
