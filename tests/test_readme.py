"""The documentation: programs accept its commands, its links lead somewhere, and the README is short."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lmms_eval.models import MODEL_REGISTRY_V2

from hones_eval.__main__ import _joined
from hones_eval.commands import COMMANDS, flags

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "leaderboards" / "README.md",
    ROOT / "leaderboards" / "scenes" / "README.md",
    ROOT / "benchmarks" / "README.md",
]
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
LINES = sorted({line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()} - {""})
COMPLETE = [line for line in LINES if "..." not in line]


@pytest.mark.parametrize("line", [line for line in COMPLETE if line.startswith("hones-eval")])
def test_hones_eval_lines_parse(line: str) -> None:
    arguments = _joined(shlex.split(line)[1:])
    assert flags.read(arguments).name == arguments[0]


@pytest.mark.parametrize("line", [line for line in COMPLETE if line.startswith("lmms-eval")])
def test_lmms_eval_lines_name_existing_models(line: str) -> None:
    arguments = shlex.split(line)
    assert arguments[arguments.index("--model") + 1] in MODEL_REGISTRY_V2.list_model_names()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["sc"], {"scale"}),
        (["rank", "--conf"], {"--config", "--confirm"}),
        (["leaderboard", "logs", "--im"], {"--images"}),
        (["rank", "--out", "run"], set()),
    ],
)
def test_shell_completion_as_documented(typed: list[str], wanted: set[str]) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "commands.md").read_text(), re.DOTALL)
    words = " ".join(map(shlex.quote, ["hones-eval", *typed]))
    ask = f'COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _hones_eval; printf "%s\\n" "${{COMPREPLY[@]}}"'
    program = f'hones-eval() {{ {shlex.quote(sys.executable)} -m hones_eval "$@"; }}'
    done = subprocess.run(
        ["bash", "-c", f"{program}\n{block}\n{ask}"], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == wanted
    assert not done.stderr


def test_every_command_is_in_the_table() -> None:
    table = (ROOT / "docs" / "commands.md").read_text()
    assert [name for name in COMMANDS if f"`hones-eval {name}`" not in table] == []


def test_the_readme_has_fewer_than_900_words() -> None:
    assert len(README.read_text().split()) < 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    missing = []
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (heading and heading not in anchors(file)):
            missing.append(target)
    assert missing == []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and MkDocs give the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_test_that_the_reliability_page_names_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    classes = re.findall(r"^\| (D\d+) \|", page, flags=re.MULTILINE)
    assert classes == [f"D{number}" for number in range(1, 17)]
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert missing == []
