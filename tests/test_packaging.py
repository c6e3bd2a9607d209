"""The wheel installs one top-level package, and the lmms-eval plug-in works from it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "leaderboards", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by setuptools from a copy of the checkout, so that no build folder is left there."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 or later")
    copy = tmp_path_factory.mktemp("sources") / "copy"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    (copy / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (copy / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_one_name_reaches_site_packages(names: list[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert "hones_eval" in top
    assert {name for name in top if not name.endswith(".dist-info")} == {"hones_eval"}


def test_every_module_and_every_task_file_is_inside(names: list[str]) -> None:
    inside = {"hones_eval": "", "model_wrappers": "model_wrappers/", "tasks": "tasks/"}
    kinds = {".py", ".yaml", ".html", ".css", ".js"}
    expected = {
        f"hones_eval/{prefix}{file.relative_to(ROOT / folder).as_posix()}"
        for folder, prefix in inside.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in kinds
    }
    assert any(name.endswith(".yaml") for name in expected)
    assert expected <= set(names), sorted(expected - set(names))


def test_every_link_of_the_long_description_is_absolute(wheel: Path) -> None:
    """On PyPI a relative link leads nowhere."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    assert "Description-Content-Type: text/markdown" in metadata
    text = metadata.split("\n\n", 1)[1]
    assert text.startswith("# hones-eval")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []


def test_the_plugin_works_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Unpacked, first on the path, and run outside the checkout."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = """
import hones_eval, lmms_eval.models as models
from hones_eval.model_wrappers import plugin
print(hones_eval.__file__)
print(plugin.__file__)
print(models.get_model_manifest("vseam_instructblip").simple_class_path)
print(plugin.own_task_folders()[0])
"""
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    package, plugin, path, tasks = done.stdout.splitlines()[-4:]
    assert package == str(site / "hones_eval" / "__init__.py")
    assert plugin == str(site / "hones_eval" / "model_wrappers" / "plugin.py")
    assert path == "hones_eval.model_wrappers.instructblip.InstructBlip"
    assert list(Path(tasks).rglob("*.yaml"))
    assert Path(tasks).is_relative_to(site)
