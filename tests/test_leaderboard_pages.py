"""The pages: what hostile text can do on them (nothing), and how they work in a browser."""

import base64
import csv
import io
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
from make_logs import Questions, Steered, exact, provenance, save_steering, write_run
from PIL import ExifTags, Image

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
            re.match(
                r"(data:image/jpeg;base64,|comparisons/[\w.-]+$|\.\./index\.html|leaderboard\.(csv|md)$|#)",
                load,
            )
            for load in page.loads
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
    assert page.locator("#examples li").count() == 25
    page.wait_for_function("document.querySelector('#examples img').naturalWidth > 0")
    page.click("#on")
    assert "page 2 of" in page.inner_text("#example-status")
    page.click("#back")
    page.wait_for_function("document.querySelector('#examples img').naturalWidth > 0")
    page.click("[data-side=lost]")
    assert {text.strip() for text in page.locator("#examples .badge").all_inner_texts()} == {"lost"}
    page.fill("#example-search", "no such text")
    assert page.locator("#examples li").count() == 0
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
    assert opened.locator("#examples li").count() > 0
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
    assert page.inner_text("#example-status") == "10000 examples, page 1 of 400"
    assert page.locator("*").count() < 1_500
    page.fill("#example-search", "Question 9999?")
    assert page.locator("#examples li").count() == 1


@pytest.fixture(scope="module")
def grounding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boxes as answers on images larger than a thumbnail, which carry the place where they were taken."""
    folder = tmp_path_factory.mktemp("grounding")
    images = [Image.new("RGB", (400, 300), (20 * k, 90, 120)) for k in range(8)]
    golds = ["[0.25, 0.20, 0.75, 0.80]"] * 4 + ["40 30 200 150"] * 4
    questions = Questions("boxes", [f"Locate the cup in image {k}." for k in range(8)], golds, images)
    before = [gold if k % 2 else "[0, 0, 0.5, 0.5]" for k, gold in enumerate(golds)]
    after = ["0.30 0.20 0.75 0.80", *golds[1:7], "nowhere, I think"]
    metrics = {"iou": exact, "iou_at_least_50": exact}
    write_run(folder / "logs", questions, before, metrics=metrics, media=True, date="20260102_030405")
    write_run(
        folder / "logs",
        questions,
        after,
        metrics=metrics,
        media=True,
        date="20260102_030505",
        steered=Steered(),
    )
    for path in (folder / "logs").rglob("*_samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row, image in zip(rows, images, strict=True):
            row["input_media"] = [photograph(image)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_board([folder / "logs"], folder / "board", resamples=99)
    return folder / "board"


def photograph(image: Image.Image) -> str:
    """A data URI of a JPEG that names where it was taken."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.ImageDescription] = "at home"
    image.save(file, "JPEG", exif=exif, comment=b"at home")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def only_page(board: Path) -> Path:
    (path,) = (board / "comparisons").glob("*.html")
    return path


def test_an_image_opens_at_full_size_with_its_boxes(page: Any, grounding: Path) -> None:
    files = sorted((grounding / "comparisons" / "images").iterdir())
    assert len(files) == 8
    page.goto(only_page(grounding).as_uri())
    first = page.locator("#examples li", has_text="in image 1.")
    assert first.locator("rect:not(.halo)").evaluate_all("list => list.map((box) => box.classList[0])") == [
        "gold",
        "baseline",
        "steered",
    ]
    box = first.locator("rect.gold")
    x, width = (float(box.get_attribute(name)) for name in ("x", "width"))
    assert (x, width) == pytest.approx((0.25, 0.5))
    drawn, image = box.bounding_box(), first.locator("img").bounding_box()
    assert drawn["x"] - image["x"] == pytest.approx(0.25 * image["width"], abs=3)
    first.locator("a.shot").click()
    page.wait_for_function("document.querySelector('#viewer img').naturalWidth === 400")
    assert page.locator("#viewer rect.gold").count() == 1
    assert "example 1: Locate the cup in image 1." in page.inner_text("#viewer")
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    in_pixels = page.locator("#examples li", has_text="in image 5.").locator("rect.gold")
    assert float(in_pixels.get_attribute("x")) == pytest.approx(0.1)
    unclear = page.locator("#examples li", has_text="in image 7.")
    assert unclear.locator("rect.gold").count() == 1
    assert unclear.locator("rect.steered").count() == 0


def test_images_in_files_hold_nothing_but_pixels_and_can_be_left_out(grounding: Path, tmp_path: Path) -> None:
    assert b"at home" in base64.b64decode(photograph(Image.new("RGB", (9, 9))).partition(",")[2])
    for path in (grounding / "comparisons" / "images").iterdir():
        assert b"at home" not in path.read_bytes()
        with Image.open(path) as image:
            assert image.size == (400, 300)
    given = ["leaderboard", str(grounding.parent / "logs"), "--out", str(tmp_path), "--resamples", "99"]
    for choice, thumbnails, files in (("full", 8, 8), ("small", 8, 0), ("none", 0, 0)):
        assert main([*given, "--images", choice]) == 0
        assert len(Page(only_page(tmp_path)).loads) > 0
        content = only_page(tmp_path).read_text()
        assert content.count("data:image/jpeg;base64,") == thumbnails
        assert len([*(tmp_path / "comparisons").glob("images/*.jpg")]) == files


def test_examples_without_a_change_are_there_too_with_every_score(page: Any, grounding: Path) -> None:
    page.goto(only_page(grounding).as_uri())
    assert page.inner_text("#example-status") == "8 examples, page 1 of 1"
    counts = [text for text in page.locator("[data-side]").all_inner_texts() if "(" in text]
    assert counts == ["Gained (3)", "Lost (1)", "Other answer (1)", "Same answer (3)"]
    page.click("[data-side=same]")
    items = page.locator("#examples li").all_inner_texts()
    assert len(items) == 3
    assert all("iou 1 → 1; iou_at_least_50 1 → 1" in text for text in items)
    with page.expect_download() as download:
        page.click("#download")
    rows = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    assert [row["side"] for row in rows] == ["same"] * 3
    assert rows[0]["gold"] == "[0.25, 0.20, 0.75, 0.80]"


def test_filters_are_kept_in_the_address(page: Any, board: Path, grounding: Path) -> None:
    page.goto(f"{only_page(grounding).as_uri()}#side=same&q=image+1.")
    assert page.locator("#examples li").count() == 1
    assert page.get_attribute("[data-side=same]", "aria-pressed") == "true"
    page.click("[data-side='']")
    assert page.evaluate("location.hash") == "#q=image+1."
    page.goto((board / "index.html").as_uri())
    page.select_option("select[data-filter=verdict]", "better")
    page.locator("th", has_text="Steered").locator("button").click()
    kept = seen(page, 1)
    page.goto(page.evaluate("location.href"))
    page.reload()
    assert seen(page, 1) == kept
    assert page.get_attribute("th:has-text('Steered')", "aria-sort") == "descending"
    page.goto(f"{(board / 'index.html').as_uri()}#task=%3Cscript%3E&sort=nonsense&page=99")
    page.reload()
    assert page.inner_text("#count") == "6 rows"


def test_words_that_differ_between_two_answers_are_marked(page: Any, tmp_path: Path) -> None:
    questions = Questions("captions", ["Describe it."] * 2, ["a red circle"] * 2)
    answers = (
        ["a red circle left of a square", "nothing"],
        ["a large blue circle left of the square", "everything"],
    )
    write_run(tmp_path / "logs", questions, answers[0], date="20260102_030405", manifest=False)
    write_run(
        tmp_path / "logs", questions, answers[1], date="20260102_030505", manifest=False, steered=Steered()
    )
    make_board([tmp_path / "logs"], tmp_path / "board", resamples=99)
    page.goto(only_page(tmp_path / "board").as_uri())
    assert page.locator("#examples del").all_inner_texts() == ["red", "a"]
    assert page.locator("#examples ins").all_inner_texts() == ["large", "blue", "the"]
    shown = page.locator("#examples dd").all_inner_texts()
    assert answers[1][0] in shown
    assert answers[1][1] in shown


def test_long_tables_have_pages_and_paper_has_all_rows(page: Any, tmp_path: Path) -> None:
    questions = Questions.drawn("shapes", 8)
    metrics = {f"metric_{k}": exact for k in range(60)}
    for right, steered, date in ((0.2, None, "20260102_030405"), (0.9, Steered(), "20260102_030505")):
        write_run(
            tmp_path / "logs",
            questions,
            questions.answers(right, 1),
            metrics=metrics,
            steered=steered,
            date=date,
        )
    make_board([tmp_path / "logs"], tmp_path / "board", resamples=99, images=False)
    page.goto((tmp_path / "board" / "index.html").as_uri())
    assert len(seen(page, 1)) == 50
    assert page.inner_text("#page-status") == "rows 1 to 50 of 60"
    page.click("#on")
    assert len(seen(page, 1)) == 10
    assert page.evaluate("location.hash") == "#page=2"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(seen(page, 1)) == 60
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.fill("#search", "metric_5")
    assert len(seen(page, 1)) == 11
    assert not page.locator("#pages").is_visible()
    text = page.inner_text("body")
    assert "#1 of 1" not in text


def test_choices_are_shown_by_their_values() -> None:
    """As lmms-eval writes them into its samples, numbers and truths as texts."""
    assert shown_answer([["6.5", "False"], ["0.25", "True"], [7.0, False]]) == "choice 2 of 6.5, 0.25, 7"
    assert shown_answer(["red"]) == "red"
    assert shown_answer(["red", "blue"]) == "['red', 'blue']"
    assert shown_answer([["a", "True"], ["b", "False"]]) == "[['a', 'True'], ['b', 'False']]"
