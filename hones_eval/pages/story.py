"""The page of a job of several steps: the answer, then each step with its finding and a link to its page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hones_eval.core.files import write_text
from hones_eval.pages.parts import HeatMap
from hones_eval.pages.rendering import render
from hones_eval.pages.run import PAGE, chart_view, figure_views, relative_link
from hones_eval.pages.text import shown_line


@dataclass(frozen=True)
class Step:
    """One step of a job.

    `question`: what the step asks, as a heading.
    `found`: the finding, in one sentence.
    `lines`: further lines of the answer.
    `command`: the command line that does this step alone.
    `page`: the page of the step's result.
    `charts`, `figures`: shown under the finding; figures are PNG or SVG files.
    """

    question: str
    found: str
    lines: Sequence[str] = ()
    command: str = ""
    page: Path | None = None
    charts: Sequence[HeatMap] = ()
    figures: Sequence[Path] = field(default=())


def write_story(out: Path, *, title: str, answer: str, lead: str, steps: Sequence[Step]) -> Path:
    """Write `out/index.html`.

    Args:
        out: the folder of the job; the pages of the steps are in its subfolders.
        title: of the page.
        answer: the answer to the question of the whole job, in one or two sentences.
        lead: what was done, on what.
        steps: in the order of the job.
    """
    page = render(
        "hones_eval.pages",
        "story.html",
        "run.js",
        title=shown_line(title),
        answer=shown_line(answer),
        lead=shown_line(lead),
        steps=[_view(step, out) for step in steps],
    )
    write_text(out / PAGE, page)
    return out / PAGE


def _view(step: Step, out: Path) -> dict[str, Any]:
    return {
        "question": shown_line(step.question),
        "found": shown_line(step.found),
        "lines": [shown_line(line) for line in step.lines],
        "command": shown_line(step.command),
        "page": "" if step.page is None else relative_link(step.page, out),
        "charts": [chart_view(chart) for chart in step.charts],
        "figures": figure_views(step.figures, out),
    }
