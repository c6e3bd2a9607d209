"""What the READMEs tell people to type is what the programs take."""

import re
import shlex
from pathlib import Path

import pytest
from lmms_eval.models import MODEL_REGISTRY_V2

from hones_eval.__main__ import _parser
from hones_eval.commands import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "editing" / "README.md")
BLOCKS = [
    block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
]
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("hones-eval")])
def test_hones_eval_lines_parse(line: str) -> None:
    arguments = shlex.split(line)[1:]
    chosen = _parser(arguments).parse_args(arguments)
    assert chosen.subcommand == arguments[0]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("lmms-eval")])
def test_lmms_eval_lines_name_models_that_are_there(line: str) -> None:
    arguments = shlex.split(line)
    assert arguments[arguments.index("--model") + 1] in MODEL_REGISTRY_V2.list_model_names()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


def test_every_command_is_in_the_table() -> None:
    table = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"`hones-eval {name}`" not in table] == []
