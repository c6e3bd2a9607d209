"""What a command ends with: a few lines for people, and the same for programs."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hones_eval.errors import printable
from hones_eval.pages.parts import HeatMap, Table


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    `lines`: a few lines that answer the question the command was asked.
    `data`: the same content as JSON-ready values, printed by `--json`.
    `headline`: the answer in one sentence, for the page of the result; by default the first line.
    `tables`, `charts`: shown on that page, beside the figures and tables in the output folder.
    `parts`: answers of results in subfolders, by the name of the folder; each gets a page of its own.
    """

    lines: list[str]
    data: dict[str, Any] = field(default_factory=dict)
    headline: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[HeatMap] = ()
    parts: Mapping[str, "Answer"] = field(default_factory=dict)


class _Output:
    """Where lines for people go: to standard output, or to standard error under `--json`."""

    as_json = False


def print_as_json(wanted: bool) -> None:
    """Keep standard output for one JSON document, or not."""
    _Output.as_json = wanted


def say(line: str) -> None:
    """Print a line at once, also where the output is a pipe."""
    print(printable(line), file=sys.stderr if _Output.as_json else sys.stdout, flush=True)


def show(answer: Answer) -> None:
    """Print the lines of an answer."""
    for line in answer.lines:
        say(line)
