"""The pages: what hostile text can do on them (nothing), and how they work in a browser."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from make_logs import Questions, Steered, provenance, save_steering, write_run

from hones_eval.__main__ import main
from hones_eval.leaderboard import make_board
from hones_eval.leaderboard.text import LONGEST, cell, plain_cell, shown, shown_answer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "'\"><svg onload=\"document.title='owned'\">",
    "{{ 7 * 7 }}{% raw %}",
    "</textarea></dl></ul><h1>owned</h1>",
    "javascript:document.title='owned'",
    "\u202eright to left\u202c and \u2066isolated\u2069",
    "null \x00 bell \x07 escape \x1b[31m delete \x7f",
    "A" * 1_000_000,
    "lone \ud800 surrogate",
    "&lt;b&gt; | pipe ` tick \\ slash\nnew line",
]


class Page(HTMLParser):
    """What a browser would make of a page: its scripts, its event handlers, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.handlers: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        values = dict(attributes)
        if tag == "script":
            self.scripts.append(values.get("type") or "code")
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def hostile_logs(folder: Path) -> None:
    count = len(HOSTILE)
    questions = Questions("shapes", HOSTILE, ["yes"] * count)
    write_run(folder, questions, HOSTILE, date="20260102_030405", manifest=False)
    named = Steered(path="<script>document.title='owned'</script>/<b>bold</b>", digest="d" * 64)
    write_run(folder, questions, ["yes"] * count, steered=named, date="20260102_030505", manifest=False)
    bad = replace(questions, task="<img src=x onerror=alert(1)>"[:20].replace("/", ""))
    write_run(folder, bad, HOSTILE, steered=named, date="20260102_030605", manifest=False)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "steering").mkdir()
    # Lone surrogates cannot be in UTF-8: JSON carries them as escapes.
    kept = json.dumps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "dumps", lambda obj, **options: kept(obj, **options | {"ensure_ascii": True}))
        hostile_logs(folder / "logs")
    make_board([folder / "logs"], folder / "board", resamples=99, images=False)
    return folder / "board"


def test_nothing_from_data_is_markup(hostile: Path) -> None:
    pages = [Page(path) for path in sorted(hostile.rglob("*.html"))]
    assert len(pages) == 2
    for page in pages:
        assert page.scripts in (["code"], ["application/json", "code"])
        assert not page.handlers
        assert page.tags.count("h1") == 1
        assert all(
            re.match(r"(data:image/jpeg;base64,|comparisons/[\w.-]+$|\.\./index\.html|#)", one)
            for one in page.loads
        )


def test_hostile_text_is_shown_as_text(hostile: Path) -> None:
    (path,) = (hostile / "comparisons").iterdir()
    page = Page(path)
    for text in (HOSTILE[0], HOSTILE[4], "⟨U+202E⟩right to left", "bell ⟨U+0007⟩", "lone ⟨U+D800⟩ surrogate"):
        assert text in page.text
    assert "… (1,000,000 characters)" in page.text
    assert path.stat().st_size < 200_000
    raw = path.read_bytes()
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", raw)
    assert "\u202e" not in raw.decode()


def test_hostile_names_do_not_break_the_tables(hostile: Path) -> None:
    lines = (hostile / "leaderboard.md").read_text().splitlines()
    (row,) = [line for line in lines if "shapes" in line and line.startswith("|")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 11
    assert not re.search(r"(?<!\\)<", row.replace("&lt;", ""))


def test_the_readme_image_is_a_drawing(hostile: Path, board: Path) -> None:
    for folder, rows in ((hostile, 1), (board, 6)):
        root = ElementTree.parse(folder / "leaderboard.svg").getroot()
        kinds = [element.tag.rpartition("}")[2] for element in root.iter()]
        assert set(kinds) <= {"svg", "title", "style", "rect", "text", "line", "circle"}
        assert kinds.count("circle") == rows


@pytest.mark.parametrize("text", HOSTILE)
def test_shown_text_is_short_and_printable(text: str) -> None:
    found = shown(text)
    assert len(found) < LONGEST + 300
    assert all(one.isprintable() or one == "\n" for one in found)
    found.encode()


def test_cells_are_inert() -> None:
    assert cell("a|b <i> *c*\nd") == r"a\|b \<i\> \*c\* d"
    assert plain_cell("=1+1") == "'=1+1"
    assert plain_cell("-0.5") == "-0.5"
    assert plain_cell("") == ""


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium to test the pages in a browser")
    api = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright to test the pages in a browser"
    )
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, three steerings, images, a reachable steering folder, and a run that is left out.

    The folder of the logs is beside it.
    """
    folder = tmp_path_factory.mktemp("board")
    digest = save_steering(folder / "steerings" / "one")
    date = 20260102_030400
    for seed, (task, count) in enumerate((("shapes", 120), ("letters", 80))):
        questions = Questions.drawn(task, count, seed=seed)
        before = questions.answers(0.5, 3)
        date += 1
        write_run(folder / "logs", questions, before, date=dated(date), media=True)
        for k, right in enumerate((0.95, 0.5, 0.52)):
            steered = Steered("steerings/one", digest) if k == 0 else Steered(f"steerings/{k}", f"{k}" * 64)
            how = ("fixed", "grid", "random")[k]
            steered = replace(steered, provenance=provenance("shapes", how=how))
            date += 1
            write_run(
                folder / "logs",
                questions,
                questions.answers(right, 40 + k),
                steered=steered,
                date=dated(date),
            )
    write_run(
        folder / "logs", questions, before[:5], steered=Steered("s/half", "h" * 64), date="20260102_040000"
    )
    make_board([folder / "logs"], folder / "board", resamples=499, images=False)
    return folder / "board"


def dated(number: int) -> str:
    return f"{number // 1_000_000}_{number % 1_000_000:06d}"


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(10_000)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    context.close()
    assert not wrong
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_only_the_clearest_comparisons_get_a_page(board: Path, tmp_path: Path) -> None:
    """What is left out costs a link, and no row, figure or cell."""
    logs = str(board.parent / "logs")
    given = ["leaderboard", logs, "--out", str(tmp_path), "--resamples", "99"]
    assert main([*given, "--pages", "2"]) == 0
    index, everything = Page(tmp_path / "index.html"), Page(board / "index.html")
    paths = sorted((tmp_path / "comparisons").iterdir())
    assert [path.name for path in paths] == [path.name for path in clearest(board, 2)]
    linked = {one for one in index.loads if one.startswith("comparisons/")}
    assert linked == {f"comparisons/{path.name}" for path in paths}
    assert index.tags.count("tr") == everything.tags.count("tr")
    assert index.tags.count("td") == everything.tags.count("td")
    assert "2 of the 6 comparisons, those with the smallest p-values, have a page" in index.text
    assert "comparisons, those with" not in everything.text
    assert main([*given, "--pages", "0"]) == 0
    assert not list(tmp_path.glob("comparisons/*"))
    assert main([*given, "--pages", "-1"]) == 1


def clearest(board: Path, count: int) -> list[Path]:
    """The pages of the rows with the smallest p-values, as the CSV has them, in the order of their names."""
    rows = list(csv.DictReader((board / "leaderboard.csv").open()))
    rows = sorted((row for row in rows if row["p"]), key=lambda row: (float(row["p_holm"]), float(row["p"])))
    names = [
        f"{row['task']}-{row['steering'].split(' (')[0]}".replace(" ", "-").replace("_", "-") for row in rows
    ]
    pages = sorted((board / "comparisons").iterdir())
    return sorted(next(page for page in pages if page.name.startswith(name)) for name in names[:count])


def test_a_comparison_says_in_words_what_happened(board: Path) -> None:
    rows = list(csv.DictReader((board / "leaderboard.csv").open()))
    (row,) = [one for one in rows if one["task"] == "shapes" and "fixed" in one["steering"]]
    (path,) = (board / "comparisons").glob("shapes-hones-fixed*")
    text = " ".join(Page(path).text.split())
    assert row["verdict"] == "better"
    assert (
        f"By exact_match, {row['gained']} of 120 examples became right and {row['lost']} became wrong. "
        "Steering made it better: p is <0.001 after correction for 6 rows."
    ) in text
    (unclear,) = (board / "comparisons").glob("shapes-hones-grid*")
    assert "No clear difference: p is 1.000 after correction for 6 rows." in " ".join(
        Page(unclear).text.split()
    )


def seen(page: Any, column: int) -> list[str]:
    """The texts of one column of the rows that are shown."""
    cells = page.locator(f"table.sortable tbody tr:not([hidden]) > :nth-child({column})")
    return [text.strip() for text in cells.all_inner_texts()]


def test_sort_by_keyboard(page: Any, board: Path) -> None:
    page.goto((board / "index.html").as_uri())
    assert len(seen(page, 1)) == 6
    head = page.locator("th", has_text="Steered")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    down = [float(text) for text in seen(page, 6)]
    assert down == sorted(down, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Space")
    up = [float(text) for text in seen(page, 6)]
    assert up == sorted(up)
    assert head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert [float(text) for text in seen(page, 6)] == down
    assert page.locator("th[aria-sort]").count() == 1


def test_without_a_mouse_from_the_start_to_an_example(page: Any, board: Path) -> None:
    """Tab reaches everything in the order of the page: the controls, the heads, the rows, and then on."""
    page.goto((board / "index.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = []
    while page.evaluate("document.activeElement.closest('tbody')") is None:
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id")
        )
        if reached[-1] == "Steered":
            page.keyboard.press("Enter")
        assert len(reached) < 40
    assert reached.index("search") < reached.index("Steering") < reached.index("p (Holm)")
    figures = [float(text) for text in seen(page, 6)]
    assert figures == sorted(figures, reverse=True)
    page.keyboard.press("Enter")
    page.wait_for_url("**/comparisons/**")
    assert "hones fixed" in page.inner_text("h1")


def test_sort_where_the_heads_are_not_shown(page: Any, board: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto((board / "index.html").as_uri())
    order = seen(page, 5)
    assert not page.locator("thead").first.is_visible()
    page.select_option("#sort", label="Baseline ↑")
    up = [float(text) for text in seen(page, 5)]
    assert up == sorted(up) != [float(text) for text in order]
    page.select_option("#sort", label="smallest p first")
    assert seen(page, 5) == order
    page.set_viewport_size({"width": 1280, "height": 800})
    assert not page.locator("#sort").is_visible()


def test_search_and_filter(page: Any, board: Path) -> None:
    page.goto((board / "index.html").as_uri())
    page.fill("#search", "fixed letters")
    assert len(seen(page, 1)) == 1
    assert page.inner_text("#count") == "1 of 6 rows"
    page.fill("#search", "")
    page.select_option("select[data-filter=verdict]", "better")
    assert set(seen(page, 3)) == {"▲ better"}
    page.select_option("select[data-filter=task]", "letters")
    assert len(seen(page, 1)) == 1


def test_follow_a_row_and_read_its_examples(page: Any, board: Path) -> None:
    page.goto((board / "index.html").as_uri())
    page.fill("#search", "fixed shapes exact")
    page.select_option("select[data-filter=task]", "shapes")
    page.locator("table.sortable tbody tr:not([hidden]) a").first.press("Enter")
    page.wait_for_url("**/comparisons/**")
    assert "on shapes" in page.inner_text("h1")
    assert page.locator("svg.heads rect").count() == 96
    assert page.locator("svg.neurons rect").count() == 12
    assert page.locator("#flips li").count() == 25
    page.wait_for_function("document.querySelector('#flips img').naturalWidth > 0")
    page.click("#on")
    assert "page 2 of" in page.inner_text("#flip-status")
    page.click("#back")
    page.wait_for_function("document.querySelector('#flips img').naturalWidth > 0")
    page.click("[data-side=lost]")
    assert {text.strip() for text in page.locator("#flips .badge").all_inner_texts()} == {"lost"}
    page.fill("#flip-search", "no such text")
    assert page.locator("#flips li").count() == 0
    page.click("text=All rows")
    page.wait_for_url("**/index.html")


def test_the_side_effects_and_the_left_out(page: Any, board: Path) -> None:
    page.goto((board / "index.html").as_uri())
    cells = page.locator(".matrix tbody tr")
    assert cells.count() == 3
    assert page.locator(".matrix td.home").count() == 3
    assert "incomplete: 5 of 80 examples" in page.inner_text("body")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_sideways_scrolling(page: Any, board: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for path in (board / "index.html", *sorted((board / "comparisons").iterdir())[:2]):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_and_light_are_readable(browser: Any, board: Path) -> None:
    """Body text and the small print have a contrast of at least 4.5 in both schemes (WCAG AA)."""
    for scheme in ("light", "dark"):
        opened = browser.new_page(color_scheme=scheme)
        opened.goto((board / "index.html").as_uri())
        for selector in ("h1", ".lead", "tbody th a", ".badge.better", "tbody small", "thead button"):
            ink, ground = opened.eval_on_selector(selector, COLOURS)
            assert contrast(ink, ground) >= 4.5, (scheme, selector, ink, ground)
        opened.close()


COLOURS = """element => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  let ground = element;
  while (parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  return [parse(getComputedStyle(element).color), parse(getComputedStyle(ground).backgroundColor)];
}"""


def contrast(ink: list[float], ground: list[float]) -> float:
    def luminance(colour: list[float]) -> float:
        parts = [c / 255 for c in colour[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_without_script_and_on_paper_everything_is_there(browser: Any, board: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto((board / "index.html").as_uri())
    assert opened.locator("table.sortable tbody tr").count() == 6
    assert not opened.locator("#search").is_visible()
    opened.goto(sorted((board / "comparisons").iterdir())[0].as_uri())
    assert opened.locator("#flips li").count() > 0
    opened.emulate_media(media="print")
    assert not opened.locator("#on").is_visible()
    opened.set_viewport_size({"width": 718, "height": 1000})  # A4 less its margins, at 96 dots an inch
    for path in (board / "index.html", *sorted((board / "comparisons").iterdir())[:2]):
        opened.goto(path.as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") <= 718
        assert opened.locator(".controls:visible, .pager:visible, nav:visible, .narrow:visible").count() == 0
    context.close()


def test_hostile_answers_do_nothing_in_a_browser(page: Any, hostile: Path) -> None:
    for path in sorted(hostile.rglob("*.html")):
        page.goto(path.as_uri())
        page.wait_for_function("!document.documentElement.classList.contains('no-script')")
        assert page.title() != "owned"
        assert page.locator("h1").count() == 1
        assert page.locator("main img[src='x']").count() == 0


def test_ten_thousand_flips_stay_quick_to_page(page: Any, tmp_path: Path) -> None:
    count = 10_000
    questions = Questions("shapes", [f"Question {k}?" for k in range(count)], ["yes"] * count)
    write_run(tmp_path / "logs", questions, ["no"] * count, date="20260102_030405", manifest=False)
    write_run(
        tmp_path / "logs",
        questions,
        ["yes"] * count,
        steered=Steered(),
        date="20260102_030505",
        manifest=False,
    )
    make_board([tmp_path / "logs"], tmp_path / "board", resamples=99, images=False)
    (path,) = (tmp_path / "board" / "comparisons").iterdir()
    assert path.stat().st_size < 3_000_000
    page.goto(path.as_uri())
    assert page.inner_text("#flip-status") == "10000 examples, page 1 of 400"
    assert page.locator("*").count() < 1_500
    page.fill("#flip-search", "Question 9999?")
    assert page.locator("#flips li").count() == 1


def test_choices_are_shown_by_their_values() -> None:
    """As lmms-eval writes them into its samples, numbers and truths as texts."""
    assert shown_answer([["6.5", "False"], ["0.25", "True"], [7.0, False]]) == "choice 2 of 6.5, 0.25, 7"
    assert shown_answer(["red"]) == "red"
    assert shown_answer(["red", "blue"]) == "['red', 'blue']"
    assert shown_answer([["a", "True"], ["b", "False"]]) == "[['a', 'True'], ['b', 'False']]"
