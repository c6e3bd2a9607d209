"""The notebooks of the documentation run from top to bottom and show what they were saved with."""

import ast
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does. Returns: the value of its last line, where that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def stored(cell: dict[str, Any], kind: str) -> str | None:
    """An output of a cell as it was saved; `kind` is text/plain, image/png, or the name of a stream."""
    for output in cell["outputs"]:
        data = (
            output.get("data", {}) if output["output_type"] != "stream" else {output["name"]: output["text"]}
        )
        if kind in data:
            return "".join(data[kind])
    return None


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_steering", "own_images"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_were_saved_without_paths_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert "site-packages" not in text
    assert all(cell["execution_count"] for cell in code_cells(path))
    assert not [
        cell for cell in code_cells(path) for output in cell["outputs"] if output["output_type"] == "error"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_gives_the_stored_answers(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for cell in code_cells(path):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            value = run("".join(cell["source"]), names)
        values.append(value)
        if stored(cell, "image/png") is not None:
            assert value._repr_png_().startswith(b"\x89PNG")
        elif (text := stored(cell, "stdout")) is not None:
            assert len(printed.getvalue().splitlines()) == len(text.splitlines())
    board = names["board"]
    saved = [stored(cell, "text/plain") or "" for cell in code_cells(path)]
    (shown,) = [text for text in saved if text.startswith("<hones_eval.Board")]
    assert shown == repr(board)
