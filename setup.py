"""Package discovery. Everything else is in pyproject.toml.

`model_wrappers/` and `tasks/` are top-level folders of the repository that install under `hones_eval`
(see `package-dir` in pyproject.toml), so setuptools cannot discover them by itself.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["hones_eval", "hones_eval.*"]),
        "hones_eval.model_wrappers",
        "hones_eval.tasks",
    ]
)
