"""Pages of the site that are made from other files: the start page, every flag, the Python reference.

Links between Markdown files are written for reading the repository. Here each link is turned into one between
the site's pages; where it leads to a file that is not part of the site, the text stays and the link goes.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Markdown files outside of docs/ that are pages of the site, below project/.
PROJECT = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "leaderboards/README.md",
    "leaderboards/scenes/README.md",
    "hones_eval/toy/checkpoint/README.md",
    "hones_eval/smol/card.md",
)
IMAGES = (".png", ".svg", ".jpg")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
API = {
    "Jobs": ("load", "rank", "scale", "verify", "anatomy"),
    "Results": ("Model", "AnatomyReport", "Verification"),
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that have no file of their own in docs/."""
    made = {"index.md": _front(), "cli.md": _flags(), "api.md": _api()}
    made |= {f"project/{name}": (ROOT / name).read_text(encoding="utf-8") for name in PROJECT}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    sources = {file.src_uri: file.content_string for file in files if file.src_uri.endswith(".md")}
    for path, text in sources.items():
        for name in _images(path, text):
            if files.get_file_from_path(_uri(name)) is None:
                files.append(File.generated(config, _uri(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turn the links of a page into links of the site."""
    here = page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        name, _, anchor = target.partition("#")
        uri = _uri(posixpath.normpath(posixpath.join(posixpath.dirname(_source(here)), name)))
        if files.get_file_from_path(uri) is None:
            return text
        link = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"{mark}[{text}]({link}{'#' + anchor if anchor else ''})"

    return _outside_code(markdown, lambda part: LINK.sub(turned, part))


def _outside_code(markdown: str, change: Any) -> str:
    """Apply a change to what is not a fenced block of code."""
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def _source(uri: str) -> str:
    """The path in the repository of a page of the site."""
    if uri == "index.md":
        return "README.md"
    return uri.removeprefix("project/") if uri.startswith("project/") else f"docs/{uri}"


def _uri(path: str) -> str:
    """The page of the site that a path in the repository is."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"project/{path}"


def _images(page: str, text: str) -> Iterator[str]:
    """Images of the repository outside of docs/ that a page shows."""
    for _, _, target in LINK.findall(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(_source(page)), target))
        if path.endswith(IMAGES) and not path.startswith(("docs/", "..")) and (ROOT / path).is_file():
            yield path


def _front() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def _flags() -> str:
    """The help of every command, as the program prints it."""
    os.environ["COLUMNS"] = "96"  # the help texts are wrapped to the terminal
    from hones_eval.commands import COMMANDS
    from hones_eval.commands.help_texts import command_help

    parts = ["# Every flag", "", "What `hones-eval COMMAND --help` prints, for every command."]
    for name in COMMANDS:
        parts += ["", f"## {name}", "", "```text", command_help(name), "```"]
    return "\n".join(parts) + "\n"


def _api() -> str:
    parts = [
        "# Python reference",
        "",
        "`import hones_eval as he` has all of these names; [From Python](python.md) shows how to use them.",
    ]
    parts += ["", "::: hones_eval.core.steering.Steering", "", "::: hones_eval.core.ranking.Ranking"]
    parts += ["", "::: hones_eval.core.attach.steer", "", "::: hones_eval.leaderboard.make_board"]
    for names in API.values():
        for name in names:
            parts += ["", f"::: hones_eval.api.{_module(name)}.{name}"]
    return "\n".join(parts) + "\n"


def _module(name: str) -> str:
    from hones_eval import api

    return api._MODULES[name]
