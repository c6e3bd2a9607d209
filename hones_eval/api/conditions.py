"""Learn when a steering should act."""

from pathlib import Path
from typing import Any

from hones_eval.api.model import Model
from hones_eval.core.condition import Condition
from hones_eval.core.lock import writes_to_out
from hones_eval.errors import HonesError
from hones_eval.jobs.condition import learn_condition as learn


@writes_to_out
def learn_condition(
    model: Model,
    tasks: str,
    against: str,
    *,
    layer: int | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    gen_kwargs: str | None = None,
    out: Path | None = None,
) -> Condition:
    """Learn a condition that holds for the prompts of one task and not for those of another.

    Half of the images are only used to measure precision and recall.

    Args:
        model: what `load` returned.
        tasks: the task on whose prompts a steering should act.
        against: the task on whose prompts it should not.
        layer: the layer whose input is read; by default the one that tells the tasks apart best.
        include_path: a folder with more task YAML files.
        limit: use at most this many examples of each task.
        offset: skip this many examples of each task first.
        gen_kwargs: as in lmms-eval --gen_kwargs.
        out: the folder to save the condition to.

    Raises: HonesError when the tasks are the same, or too few examples are left to learn from or to test on.

    Example:
        `condition = learn_condition(model, "vqav2_val", "textvqa_val", limit=200)`, and then
        `with steer(model, steering, condition=condition): ...`
    """
    if tasks == against:
        raise HonesError(f"--tasks and --against are both {tasks}: a condition tells two tasks apart")
    settings: dict[str, Any] = {
        "include_path": include_path,
        "limit": limit,
        "offset": offset,
        "gen_kwargs": gen_kwargs,
    }
    both = [model.examples(task, **settings) for task in (tasks, against)]
    recorded = model.settings(both[0], gen_kwargs=gen_kwargs)
    condition = learn(model.anatomy, both[0], both[1], model.loop, recorded, layer)
    if out is not None and model.loop.is_first:
        condition.save(out)
    return condition
