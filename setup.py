"""Package discovery and the long description. Everything else is in pyproject.toml.

`model_wrappers/` and `tasks/` are top-level folders of the repository that install under `hones_eval`
(see `package-dir` in pyproject.toml), so setuptools cannot discover them by itself.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def long_description() -> str:
    """README.md with links that work on PyPI.

    Links into the repository become absolute if `[project.urls]` names a `Repository`. Otherwise an image is
    left out, and a link becomes its text.
    """
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    repository = urls.get("Repository", "").rstrip("/")
    pattern = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s]+)\)")

    def absolute(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if not repository:
            return "" if image else text
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/main/{target})"

    return pattern.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=["hones_eval", "hones_eval.*"]),
        "hones_eval.model_wrappers",
        "hones_eval.tasks",
    ],
)
