"""What several commands do alike: open a model with a task's examples, and speak."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lmms_eval.api.model import lmms

from hones_eval.core.anatomy import Anatomy
from hones_eval.engine.replay import Replayer
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.runs.lightning import Loop

DType = Literal["auto", "float32", "bfloat16", "float16"]
Rows = int | Literal["auto"]


@dataclass(frozen=True, eq=False)
class Job:
    """A model, its anatomy, the examples of one task, and the loop over them."""

    model: str
    model_args: str
    lmm: lmms
    anatomy: Anatomy
    examples: TaskExamples
    loop: Loop
    replayer: Replayer

    @classmethod
    def open(
        cls,
        model: str,
        model_args: str,
        tasks: str,
        *,
        include_path: Path | None = None,
        limit: int | None = None,
        offset: int = 0,
        gen_kwargs: str | None = None,
        metric: str | None = None,
        target: str | None = None,
        dtype: DType = "auto",
        batch_size: Rows = "auto",
        devices: int = 1,
        num_nodes: int = 1,
    ) -> Self:
        """Build the lmms-eval model and task; see the flags of `hones-eval rank`."""
        if "," in tasks:
            raise HonesError(f"--tasks {tasks}: give one task at a time, each in a run of its own")
        lmm = load_lmm(model, model_args)
        if dtype != "auto":
            inner_model(lmm).to(getattr(torch, dtype))
        anatomy = Anatomy.of(inner_model(lmm))
        examples = TaskExamples(
            lmm,
            tasks,
            model_name=model,
            include_path=include_path,
            limit=limit,
            offset=offset,
            gen_kwargs=gen_kwargs,
            metric=metric,
            target=target,
        )
        examples.check_targets()
        accelerator: Literal["cpu", "cuda"] = "cuda" if anatomy.unembedding.is_cuda else "cpu"
        return cls(
            model=model,
            model_args=model_args,
            lmm=lmm,
            anatomy=anatomy,
            examples=examples,
            loop=Loop(accelerator, devices, num_nodes, progress=sys.stderr.isatty()),
            replayer=Replayer(anatomy, None if batch_size == "auto" else batch_size),
        )

    def on(
        self,
        task: str,
        *,
        include_path: Path | None = None,
        limit: int | None = None,
        offset: int = 0,
        gen_kwargs: str | None = None,
    ) -> Self:
        """The same model and loop on the examples of another task."""
        examples = TaskExamples(
            self.lmm,
            task,
            model_name=self.model,
            include_path=include_path,
            limit=limit,
            offset=offset,
            gen_kwargs=gen_kwargs,
        )
        examples.check_targets()
        return replace(self, examples=examples)

    @property
    def dtype(self) -> str:
        """The model's floating-point type, as torch names it without its prefix."""
        return str(self.anatomy.model.dtype).removeprefix("torch.")

    def settings(self, **others: Any) -> dict[str, Any]:
        """What an artifact records of this job, beside `others`."""
        return {
            "model": self.model,
            "model_args": self.model_args,
            "metric": self.examples.metric,
            "target": self.examples.target_source,
            "dtype": self.dtype,
        } | others


def names_in(given: str, flag: str) -> list[str]:
    """The tasks of a flag that takes several, a,b,c. Raises: HonesError when one is empty or named twice."""
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise HonesError(f"--{flag} {given!r}: a name is empty; give tasks as a,b,c")
    if len(set(names)) < len(names):
        raise HonesError(f"--{flag} {given}: a task is named twice")
    return names


def limits_of(
    names: Sequence[str], limit: int | None, limits: Mapping[str, int] | None, flag: str
) -> dict[str, int | None]:
    """Every task's own limit, or that of all. Raises: HonesError when `limits` names another task."""
    own = limits or {}
    unknown = [name for name in own if name not in names]
    if unknown:
        raise HonesError(f"--{flag} names {unknown[0]}, which is none of --tasks {','.join(names)}")
    return {name: own.get(name, limit) for name in names}


def say(line: str) -> None:
    """Print a line now, also when the output is a pipe."""
    print(line, flush=True)
