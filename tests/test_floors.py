"""Arrows only go down: which room of the house may import which, read from the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hones_eval"

BASE = {"errors", "artefact"}
EDITING = {"sites", "edits", "readouts", "attach"}
MODEL = {
    *BASE,
    *EDITING,
    "anatomy",
    "ranking",
    "steering",
    "steer_model",
    "passes",
    "caches",
    "replay",
    "stretches",
    "prefixes",
    "continuation",
    "decoding",
    "streams",
    "tokens",
}
MEASURING = {*MODEL, "margin", "choices", "examples", "measure", "together", "ablation", "patching", "racing"}
WHOLE = {*MEASURING, "methods", "loops", "leaderboard", "resampling"}

# A room (a module or a folder of hones_eval) and the rooms that it may import.
FLOORS: dict[str, set[str]] = {
    # 0: tensors, names and files; no model is known here
    "errors": set(),
    "pictures": set(),
    "lmms_calls": set(),
    "edits": set(),
    "readouts": set(),
    "artefact": {"errors"},
    "sites": {"errors"},
    "attach": {"errors"},
    "partial": BASE,
    "processes": {"errors"},
    "margin": {"errors"},
    "prompts": set(),
    "doors": set(),
    "choices": {"readouts"},
    "racing": {"errors"},
    # 1: one model, or one result
    "anatomy": {*BASE, "attach"},
    "ranking": {*BASE, "sites"},
    "steering": {*BASE, "sites"},
    # 2: a model at work, and what it works on
    "steer_model": {*BASE, *EDITING, "anatomy", "steering"},
    "passes": {*BASE, *EDITING, "anatomy"},
    "caches": BASE,
    "replay": {*BASE, *EDITING, "anatomy", "passes", "caches"},
    "stretches": {*BASE, "anatomy", "passes", "caches", "replay"},
    "prefixes": {*BASE, "sites", "anatomy", "passes", "prompts", "caches", "replay", "stretches"},
    "streams": {*BASE, *EDITING, "anatomy", "passes", "replay"},
    "tokens": {*BASE, "anatomy"},
    "export": {*BASE, "anatomy", "steering", "steer_model"},
    "continuation": {*BASE, *EDITING, "anatomy", "passes", "caches", "replay"},
    "decoding": {*BASE, *EDITING, "anatomy", "passes", "prompts", "replay", "continuation"},
    "targets": {"errors"},
    "task_files": {"errors"},
    "task_failures": {"errors", "lmms_calls"},
    "examples": {
        *(*BASE, "lmms_calls", "margin", "choices", "doors", "prompts", "pictures"),
        *("targets", "task_failures", "task_files"),
    },
    "measure": {"examples"},
    "patching": {*MODEL},
    "together": {*MODEL, "examples"},
    "ablation": {*MODEL, "margin", "choices", "examples", "measure", "together"},
    # 3: what is measured; pictures that are edited; the embedded model
    "methods": MEASURING,
    "editing": {*BASE, "pictures"},
    "toy": {*MEASURING, "pictures"},
    # 4: loops over examples; logs and their statistics
    "loops": {"errors", "examples", "measure", "partial", "processes"},
    "leaderboard": {*BASE, "lmms_calls", "pictures", "steering"},
    "resampling": {"errors", "leaderboard"},
    "fitting": {*MODEL, "examples", "methods", "loops", "partial"},
    # 5: whole jobs, and the figures that they draw
    "localizing": WHOLE,
    "discovery": {*WHOLE, "localizing"},
    "verification": WHOLE,
    "comparison": {*WHOLE, "verification"},
    "choosing": {*WHOLE, "fitting", "verification"},
    "figures": {*BASE, "ranking"},
    "comparison_levels": {"errors", "comparison"},
    "comparison_report": {*BASE, "comparison", "comparison_levels", "figures"},
    "study": {*WHOLE, "choosing", "discovery", "fitting", "verification"},
    "study_report": {*BASE, "comparison_report", "figures", "study"},
    "trace_tables": {*BASE, "methods", "tokens"},
    "trace_figures": {"figures", "methods", "tokens", "trace_tables"},
    "lens_figures": {"figures", "methods", "streams", "trace_figures"},
}
BESIDE: dict[str, set[str]] = {
    "model_wrappers": {
        *(*BASE, "lmms_calls", "margin", "doors", "prompts", "pictures", "steering"),
        *("steer_model", "processes", "task_failures", "task_files"),
    },
    "tasks": {"errors", "toy", "pictures"},
}
TOP = {"commands", "__main__", "__init__"}  # may import everything


def imports(source: str, package: str = "hones_eval") -> Iterator[str]:
    """Rooms of the package that a source imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
            if node.module == package:
                names = [f"{package}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith(f"{package}."))


def climbs(source: str) -> bool:
    """Whether a relative import leaves the source's own folder, which would go round the table."""
    return any(isinstance(node, ast.ImportFrom) and node.level > 1 for node in ast.walk(ast.parse(source)))


def offences(room: str, source: str, allowed: set[str], known: set[str]) -> list[str]:
    return [
        f"{room} imports {other}"
        for other in imports(source)
        if other in known and other != room and other not in allowed
    ]


def rooms(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {path.stem: [path] for path in folder.glob("*.py")}
    for inner in folder.iterdir():
        if (inner / "__init__.py").is_file():
            found[inner.name] = sorted(inner.rglob("*.py"))
    return found


HOUSES = rooms(PACKAGE)
KNOWN = {*HOUSES, *BESIDE}


def test_imports_can_be_read_off_the_sources() -> None:
    for room, paths in HOUSES.items():
        for path in paths:
            source = path.read_text(encoding="utf-8")
            assert not climbs(source), f"{path}: relative imports stay in their folder"
            assert path.parent != PACKAGE or "from ." not in source, f"{room}: imports are absolute"


def test_every_room_has_a_floor() -> None:
    assert set(HOUSES) - TOP == set(FLOORS), "a room came or went: give it its floor in FLOORS"


def test_the_table_itself_only_goes_down() -> None:
    """No circle: rooms can be put in an order in which each imports only those before it."""
    left = dict(FLOORS)
    while left:
        lowest = [room for room, allowed in left.items() if not allowed & (set(left) - {room})]
        assert lowest, f"a circle among {sorted(left)}"
        for room in lowest:
            del left[room]


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_what_is_below(room: str) -> None:
    found = [
        offence
        for path in HOUSES[room]
        for offence in offences(room, path.read_text(encoding="utf-8"), FLOORS[room], KNOWN)
    ]
    assert not found


@pytest.mark.parametrize("folder", BESIDE)
def test_what_stands_beside_the_house(folder: str) -> None:
    found = [
        f"{path.name}: {offence}"
        for path in (ROOT / folder).rglob("*.py")
        for offence in offences(folder, path.read_text(encoding="utf-8"), BESIDE[folder], KNOWN)
    ]
    assert not found


def test_no_method_imports_another() -> None:
    methods = {path.stem for path in (PACKAGE / "methods").glob("*.py")}
    for path in (PACKAGE / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hones_eval.methods"):
                imported = {*(node.module or "").split(".")[2:], *(alias.name for alias in node.names)}
                assert not imported & methods, f"{path.name} imports {imported & methods}"


# Libraries that only some rooms know.
ONLY = {
    "lightning": {"loops", "fitting"},
    "lmms_eval": {
        *("commands", "examples", "leaderboard", "lmms_calls"),
        *("targets", "task_failures", "task_files"),
    },
    "peft": {"export"},
}


def outside(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_known_to_its_rooms_alone(library: str) -> None:
    users = {
        room
        for room, paths in HOUSES.items()
        if any(library in outside(path.read_text(encoding="utf-8")) for path in paths)
    }
    assert users <= ONLY[library]


def test_pure_rooms_hold_no_hook_and_no_model() -> None:
    for room in ("edits", "readouts", "sites"):
        source = (PACKAGE / f"{room}.py").read_text(encoding="utf-8")
        assert not outside(source) & {"transformers", "lmms_eval", "lightning"}
        assert "register_forward" not in source
        assert "nn.Module" not in source


OFFENDING = """\
from hones_eval.errors import HonesError
from hones_eval import edits, replay


def late() -> None:
    import hones_eval.methods.hones
    from hones_eval.commands.shared import Job
"""


def test_an_import_upwards_is_seen_wherever_it_stands() -> None:
    found = offences("attach", OFFENDING, FLOORS["attach"], KNOWN)
    assert found == [
        "attach imports edits",
        "attach imports replay",
        "attach imports methods",
        "attach imports commands",
    ]
    assert not offences(
        "attach", "from hones_eval.errors import EditError\nimport torch", FLOORS["attach"], KNOWN
    )
    assert climbs("from .. import commands")
    assert not climbs("from .steered import Steered")
