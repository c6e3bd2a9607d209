"""Imports only point down: which folder of the package may import which, read from the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from hones_eval.methods.registry import METHODS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hones_eval"

# A folder (or a top-level module) of hones_eval, and the ones that it may import, from the bottom up.
FOLDERS: dict[str, set[str]] = {}


def level(folder: str, *may_import: str) -> None:
    """Add a folder that may import the named ones and everything that those may import."""
    FOLDERS[folder] = set(may_import).union(*(FOLDERS[other] for other in may_import))


level("version")
level("errors")
level("limits")
level("choices", "errors")
level("notes", "errors")
level("core", "errors", "limits", "version", "choices", "notes")
level("engine", "core")
level("lmms", "engine")
level("runs", "lmms")
level("stats", "errors", "choices")
level("methods", "runs")
level("toy", "runs")
level("smol", "toy")
level("editing", "core")
level("pages", "core")
level("leaderboard", "lmms", "stats", "pages")
level("jobs", "methods", "stats")
level("reports", "jobs")
level("model_wrappers", "runs")
level("api", "reports", "leaderboard", "model_wrappers")
FOLDERS["tasks"] = {"errors", "core", "toy"}
EVERYTHING = {"commands", "__main__", "__init__"}  # may import all of the above

# Libraries that only some folders may import.
ONLY = {
    "lightning": {"runs", "jobs"},
    "lmms_eval": {"api", "commands", "leaderboard", "lmms", "model_wrappers", "tasks"},
    "peft": {"core", "smol"},
}
# Modules of pure tensor functions: no hook, no model.
PURE = ("edits", "readouts", "sites")


def sources(folder: str) -> list[Path]:
    """Every Python file of a folder of the package, or a top-level module's own file."""
    home = ROOT / folder if folder in {"model_wrappers", "tasks"} else PACKAGE / folder
    return sorted(home.rglob("*.py")) if home.is_dir() else [PACKAGE / f"{folder}.py"]


def modules(source: str, name: str = "hones_eval") -> Iterator[str]:
    """Dotted names below `hones_eval` that a source imports, wherever in it the import is.

    Args:
        source: Python text.
        name: the importing module's dotted name, against which relative imports are resolved.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*name.split(".")[: -node.level], base]))
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def folders(source: str, name: str = "hones_eval") -> set[str]:
    """Folders of the package that a source imports."""
    return {
        found.split(".")[1]
        for found in modules(source, name)
        if found.startswith("hones_eval.") and found.split(".")[1] in {*FOLDERS, *EVERYTHING}
    }


def offenses(folder: str, source: str) -> set[str]:
    """Folders that a source of `folder` imports and may not."""
    return folders(source) - FOLDERS[folder] - {folder}


def libraries(source: str) -> set[str]:
    return {name.split(".")[0] for name in modules(source)}


def module_graph() -> dict[str, set[str]]:
    """Every module of the package and the modules that it imports when it is itself imported."""
    places = {"hones_eval": PACKAGE, "hones_eval.model_wrappers": ROOT / "model_wrappers"}
    files = {
        ".".join([base, *file.relative_to(home).with_suffix("").parts]).removesuffix(".__init__"): file
        for base, home in places.items()
        for file in home.rglob("*.py")
        if file != PACKAGE / "__init__.py"  # re-exports names only when they are asked for
    }
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        inner = f"{name}.__init__" if file.stem == "__init__" else name
        found = set()
        for imported in modules(file.read_text(encoding="utf-8"), inner):
            parent = imported.rpartition(".")[0]
            found |= {imported} & set(files) or {parent} & set(files)
        graph[name] = found - {name}
    return graph


def test_every_folder_has_a_level() -> None:
    found = {path.stem for path in PACKAGE.glob("*.py")}
    found |= {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert found - EVERYTHING == set(FOLDERS) - {"model_wrappers", "tasks"}, "give the new folder its level"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_is_below(folder: str) -> None:
    found = {
        path.name: offenses(folder, path.read_text(encoding="utf-8"))
        for path in sources(folder)
        if offenses(folder, path.read_text(encoding="utf-8"))
    }
    assert not found


def test_no_module_imports_itself_through_others() -> None:
    """Modules can be put in an order in which each imports only those before it."""
    left = module_graph()
    assert len(left) > 100
    while left:
        lowest = [name for name, imported in left.items() if not imported & set(left)]
        assert lowest, f"an import cycle among {sorted(left)}"
        for name in lowest:
            del left[name]


def test_no_method_imports_another() -> None:
    methods = {row.function.partition(":")[0].rpartition(".")[2] for row in METHODS.values()}
    assert len(methods) > 3
    for path in (PACKAGE / "methods").glob("*.py"):
        found = modules(path.read_text(encoding="utf-8"), f"hones_eval.methods.{path.stem}")
        imported = {name.split(".")[2] for name in found if name.startswith("hones_eval.methods.")}
        assert not imported & methods, f"{path.name} imports {imported & methods}"


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_imported_by_its_folders_alone(library: str) -> None:
    users = {
        folder
        for folder in {*FOLDERS, *EVERYTHING}
        if any(library in libraries(path.read_text(encoding="utf-8")) for path in sources(folder))
    }
    assert users <= ONLY[library]


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_hold_no_hook_and_no_model(name: str) -> None:
    source = (PACKAGE / "core" / f"{name}.py").read_text(encoding="utf-8")
    assert not libraries(source) & {"transformers", "lmms_eval", "lightning"}
    assert "register_forward" not in source
    assert "nn.Module" not in source


UPWARD = """\
from hones_eval.errors import HonesError
from hones_eval import engine
from hones_eval.core import edits


def late() -> None:
    import hones_eval.methods.hones
    from hones_eval.commands.shared import Job
"""


def test_an_upward_import_is_seen_wherever_it_is() -> None:
    assert offenses("core", UPWARD) == {"engine", "methods", "commands"}
    assert not offenses("core", "from hones_eval.errors import EditError\nimport torch")
    assert set(modules("from .. import commands", "hones_eval.core.hooks")) == {"hones_eval.commands"}
    assert set(modules("from .steered import Steered", "hones_eval.model_wrappers.llava")) == {
        "hones_eval.model_wrappers.steered.Steered"
    }
