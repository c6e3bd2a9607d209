"""The ranking job: run one method on the examples of a task, and confirm its best sites if asked to."""

from typing import Any

from hones_eval.core.adapters import model_source
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.ranking import Ranking
from hones_eval.core.weights import weights_digest
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples
from hones_eval.methods.confirm import check_confirm, confirmed
from hones_eval.methods.discovery import Discovery
from hones_eval.methods.registry import MethodName as Method
from hones_eval.methods.registry import function_of, method

__all__ = ["Discovery", "Method", "discover", "provenance"]


def discover(job: Discovery) -> Ranking:
    """Run the method that the job's provenance names; every process gets the same ranking.

    Raises: HonesError for settings that do not go together, before the work.
    """
    name = job.provenance.method
    if job.edit != "mean" and not method(name).head_edit:
        raise HonesError(f"--edit {job.edit} has no effect on --method {name}, which replaces no heads")
    check_confirm(job)
    ranking = function_of(name)(job)
    assert isinstance(ranking, Ranking)
    return ranking if job.confirm is None else confirmed(job, ranking)


def provenance(
    anatomy: Anatomy, examples: TaskExamples, method: Method, settings: dict[str, Any], seed: int
) -> Provenance:
    """The provenance of a ranking: model, method, settings, examples and seed."""
    return Provenance(
        **model_source(anatomy.model),
        shape=anatomy.shape,
        method=method,
        settings=settings,
        examples=[examples.example_set()],
        seed=seed,
        weights=weights_digest(anatomy.model),
    )
