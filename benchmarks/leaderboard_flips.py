"""A page that lists ten thousand examples, in a browser: `leaderboard_flips.py [EXAMPLES]`.

One baseline and one steered run that draws every score anew, so that about half of the examples change; every
example has an image. Prints the size of the page and what Chromium takes to load, page and search it.
"""

import base64
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from leaderboard_scale import write_logs
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from hones_eval.leaderboard import make_board

PICTURES = 250  # different ones


def main(examples: int = 22_000) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no chromium on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        logs, out = Path(folder) / "logs", Path(folder) / "board"
        write_logs(logs, runs=2, examples=examples, changed=1.0)
        add_images(logs)
        make_board([logs], out, images=False)
        (path,) = (out / "comparisons").glob("*.html")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            print(f"{path.stat().st_size / 1e6:.1f} MB, {report(browser.new_page(), path)}")
            browser.close()


def add_images(logs: Path) -> None:
    """Give every sample an image, as lmms-eval writes those that come as bytes."""
    generator = np.random.default_rng(0)
    media = []
    for _ in range(PICTURES):
        rough = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        rough.resize((320, 240)).save(file, "JPEG")
        media.append(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")
    for path in logs.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [line | {"input_media": [media[k % PICTURES]]} for k, line in enumerate(lines)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def report(page: Page, path: Path) -> str:
    loads = []
    for _ in range(5):
        page.goto(path.as_uri())
        loads.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    status, elements = page.inner_text("#example-status"), page.locator("*").count()
    turned = page.evaluate(timed("document.querySelector('#on').click()"))
    page.evaluate("document.querySelector('#example-search').value = 'image 2100'")
    searched = page.evaluate(
        timed("document.querySelector('#example-search').dispatchEvent(new Event('input'))")
    )
    heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
    return (
        f"{status}: loads in {np.median(loads):.0f} ms, turns a page in {turned:.0f} ms, searches in "
        f"{searched:.0f} ms, {elements} elements, {heap:.0f} MB of heap"
    )


def timed(action: str) -> str:
    return f"(() => {{ const start = performance.now(); {action}; return performance.now() - start; }})()"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
