"""The page of a command's result: its answer, the figures and tables of the folder, and no foreign markup."""

import csv
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hones_eval.__main__ import main
from hones_eval.api.verification import Verification
from hones_eval.commands import rank
from hones_eval.core import figure
from hones_eval.core.notebook import html_table
from hones_eval.core.ranking import Ranking
from hones_eval.pages import run
from hones_eval.pages.parts import HeatMap, Table
from hones_eval.pages.run import write_run_page
from hones_eval.pages.story import Step, write_story
from hones_eval.reports import figures
from hones_eval.toy import checkpoint_path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MODEL = ["--model", "hones_llava", "--model_args", f"pretrained={checkpoint_path()}"]
HOSTILE = "<img src=x onerror=alert(1)></style><script>alert(2)</script>\u202e\x1b[31m"


class Parsed(HTMLParser):
    """Counts tags, and collects text and links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.text, self.links = list[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pages") / "ranking"
    tasks = ["--tasks", "scenes_vqa_relation_discovery", "--limit", "4", "--heads", "4"]
    assert main(["rank", "--method", "atp", *MODEL, *tasks, "--out", str(out)]) == 0
    return out


def test_a_ranking_is_shown_with_its_own_numbers(ranked: Path) -> None:
    ranking = Ranking.load(ranked)
    page = (ranked / "index.html").read_text()
    parsed = Parsed(page)
    text = " ".join(" ".join(parsed.text).split())
    (first, score), *_ = ranking.top_heads(1)
    assert f"Heads {first.layer}.{first.head}," in text
    assert f"{score:.4g}" in text
    assert f"layer {first.layer}, head {first.head}: {score:+.4g}" in text
    assert parsed.tags["rect"] == 48
    assert parsed.tags["table"] == 3
    assert "hones-eval rank --method atp --model hones_llava" in text
    assert "--out FOLDER" in text
    assert str(ranked) not in page, "the same work in another folder gives the same page"


def test_what_does_not_change_the_result_is_not_on_the_page(ranked: Path, tmp_path: Path) -> None:
    tasks = ["--tasks", "scenes_vqa_relation_discovery", "--limit=4", "--heads", "4"]
    ways = ["--devices", "1", "--resume", f"--out={tmp_path}", "--num_nodes=1"]
    assert main(["rank", *ways, "--method", "atp", *MODEL, *tasks]) == 0
    page, other = ((folder / "index.html").read_text() for folder in (tmp_path, ranked))
    assert "hones-eval rank --out FOLDER --method atp" in page
    assert "devices" not in page
    assert page.split("How it was made")[0] == other.split("How it was made")[0]


def test_a_comparison_links_to_the_pages_of_its_rankings(
    ranked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = ranked.parent / "other", ranked.parent / "compared"
    shutil.copytree(ranked, other)
    assert main(["compare", str(ranked), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"see {out / 'index.html'}"
    page = (out / "index.html").read_text()
    links = Parsed(page).links
    assert {"../ranking/index.html", "../other/index.html"} <= set(links)
    assert all(not link.startswith(("/", "http")) for link in links)
    assert Parsed(page).tags["img"] == len([*out.glob("*.png"), *out.glob("figures/*.png")])


def page_of(folder: Path, **changed: Any) -> str:
    given: dict[str, Any] = {
        "command": "rank",
        "made_by": "hones-eval rank",
        "lines": ["the answer"],
        "headline": "It is so",
        "settings": {"seed": 0},
    }
    return write_run_page(folder, **given | changed).read_text()


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    plain = {"name": "a", "score": 1.0}
    (tmp_path / "scores.csv").write_text("name,score\na,1\n")
    harmless = page_of(tmp_path, tables=[Table("Heads", [plain])])
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([[f"name{HOSTILE}", "score"], [HOSTILE, "1"]])
    hostile = page_of(
        tmp_path,
        made_by=HOSTILE,
        lines=[HOSTILE],
        headline=HOSTILE,
        settings={"tasks": HOSTILE},
        tables=[Table(HOSTILE, [{"name": HOSTILE, "score": 1.0}])],
    )
    tags = {tag: count for tag, count in Parsed(hostile).tags.items() if tag != "wbr"}
    assert tags == {tag: count for tag, count in Parsed(harmless).tags.items() if tag != "wbr"}
    assert "\u202e" not in hostile
    assert "\x1b" not in hostile


def test_text_from_outside_stays_text_in_the_story_of_a_job(tmp_path: Path) -> None:
    def story(text: str) -> str:
        chart = HeatMap(text, [[1.0, -1.0]], text, text, neutral=0.5)
        step = Step(text, text, [text], text, tmp_path / "ranking" / "index.html", [chart])
        return write_story(tmp_path, title=text, answer=text, lead=text, steps=[step]).read_text()

    hostile = story(HOSTILE)
    assert Parsed(hostile).tags == Parsed(story("plain")).tags
    assert "\u202e" not in hostile
    assert "\x1b" not in hostile
    assert "ranking/index.html" in Parsed(hostile).links


def test_text_from_outside_stays_text_in_notebooks(ranked: Path) -> None:
    """The HTML of a ranking, a verification, and a board's rows is made of the same tags for any text."""

    def verification(text: str) -> str:
        drop = {"value": 0.1, "low": None, "high": None}
        bank = {"metric": 0.5, "metric_drop": drop, "relative_drop": drop}
        content = {
            "metric": text,
            "sites": text,
            "examples": {"count": 1},
            "baseline": {"metric": 0.6},
            "bank_sizes": {text: 1},
            "banks": {text: bank},
            "beyond_random": {text: {"metric": drop}},
            "random": {"metric": {"drop_mean": 0.0, "drop_largest": 0.0}},
            "warnings": [text],
        }
        return Verification(content)._repr_html_()

    ranking = Ranking.load(ranked)
    renamed = replace(ranking.provenance, examples=(replace(ranking.provenance.examples[0], task=HOSTILE),))
    pairs = [
        (verification(HOSTILE), verification("plain")),
        (html_table([{HOSTILE: [HOSTILE, 1.0]}], HOSTILE), html_table([{"plain": ["plain", 1.0]}], "plain")),
        (replace(ranking, provenance=renamed)._repr_html_(), ranking._repr_html_()),
    ]
    for hostile, harmless in pairs:
        assert Parsed(hostile).tags == Parsed(harmless).tags
        assert not [part for part in ("<img", "\u202e", "\x1b") if part in hostile]


def test_the_colors_of_figures_have_one_meaning() -> None:
    """Blue for gains, orange for losses, white for 0; one side where nothing is negative."""

    def color(values: list[float], value: float, *, loss: bool = False) -> str:
        colors = figure.colors_of(values, loss=loss)
        return to_hex(colors["cmap"]((value - colors["vmin"]) / (colors["vmax"] - colors["vmin"])))

    assert color([-1, 1], 1) == color([-1, 1], -1, loss=True) == color([0, 1], 1) == figure.BLUE
    assert color([-1, 1], -1) == color([-1, 1], 1, loss=True) == color([0, 1], 1, loss=True) == figure.ORANGE
    assert color([-1, 1], 0) == color([0, float("nan")], 0) == "#ffffff"
    assert figure.colors_of([0.2, 0.6])["vmin"] == 0
    assert figure.is_dark(1.0, figure.colors_of([0, 1]))
    assert not figure.is_dark(1.0, figure.colors_of([0, 1], loss=True))
    assert not figure.is_dark(0.1, figure.colors_of([0, 1]))
    assert not {figure.BLUE, figure.ORANGE} & set(figure.KINDS)


def test_a_matrix_of_many_tasks_is_not_wider_than_a_page() -> None:
    names = [f"task {k}" for k in range(18)]
    values = np.eye(18)
    assert figures.matrix(values, names, names, "overlap", "Jaccard").get_size_inches()[0] <= 13
    drawn = figures.matrices({"a": values, "b": values, "c": values}, names, names, "gain")
    assert drawn.get_size_inches()[0] <= 13


def test_a_ranking_without_a_head_that_matters_says_so(ranked: Path) -> None:
    ranking = Ranking.load(ranked)
    assert ranking.head_scores is not None
    task = ranking.provenance.examples[0].task
    for scores in (ranking.head_scores * 0, -ranking.head_scores.abs()):
        answer = rank.answer_of(replace(ranking, head_scores=scores), ranked)
        assert answer.headline == f"No head matters for {task} on these examples"
    assert rank.answer_of(ranking, ranked).headline.startswith("Heads ")


def test_a_chart_keeps_hostile_names_as_text_and_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    chart = HeatMap(HOSTILE, [[1.0, None], [-2.0, 0.0]], HOSTILE, "head")
    parsed = Parsed(page_of(tmp_path, charts=[chart]))
    assert parsed.tags["rect"] == 3
    assert parsed.tags["script"] == 1
    assert parsed.tags["img"] == 0


def test_numbers_of_neurons_are_shown_whole(tmp_path: Path) -> None:
    """A neuron is one of ten thousands: with four figures it would be another one."""
    page = page_of(tmp_path, tables=[Table("Neurons", [{"layer": 31, "neuron": 11007, "score": 0.123456}])])
    assert re.findall(r'data-value="[^"]*"><span class="text">([^<]*)<', page) == ["31", "11007", "0.1235"]


def test_links_lead_to_folders_with_any_name_and_long_settings_are_no_folder(tmp_path: Path) -> None:
    source, out = tmp_path / "a #1 50%?", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    page_of(source)
    settings = {"ranking": source, "model_args": "pretrained=" + "x" * 5000}
    assert "../a%20%231%2050%25%3F/index.html" in Parsed(page_of(out, settings=settings)).links
    step = Step("Which?", "These", page=source / "index.html")
    story = write_story(tmp_path, title="a", answer="b", lead="c", steps=[step]).read_text()
    assert "a%20%231%2050%25%3F/index.html" in Parsed(story).links


def test_long_tables_are_cut_and_large_figures_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scores.csv").write_text("head,score\n" + "".join(f"{i},{i / 7}\n" for i in range(600)))
    (tmp_path / "gains.png").write_bytes(b"\x89PNG" + bytes(100))
    page = page_of(tmp_path)
    assert "The first 500 of 600 rows; all of them are in" in page
    assert Parsed(page).tags["tr"] == 501
    assert Parsed(page).tags["img"] == 1
    assert page == page_of(tmp_path)
    monkeypatch.setattr(run, "IMAGE_BYTES", 100)
    assert Parsed(page_of(tmp_path)).tags["img"] == 0


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to open the page in")
def test_tables_sort_in_a_browser_and_the_page_fits_a_phone(ranked: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test the pages")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto((ranked / "index.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        column = (
            "[...document.querySelector('table').tBodies[0].rows].map(r => Number(r.cells[2].dataset.value))"
        )
        before = page.evaluate(column)
        page.locator("table >> nth=0 >> th >> nth=2 >> button").click()
        page.locator("table >> nth=0 >> th >> nth=2 >> button").click()
        assert page.evaluate(column) == sorted(before)
        with page.expect_download() as download:
            page.locator("button[data-download] >> nth=0").click()
        saved = Path(download.value.path()).read_text().splitlines()
        assert saved[0] == "layer,head,score"
        assert len(saved) == 49
        browser.close()
    assert not complaints, json.dumps(complaints)
