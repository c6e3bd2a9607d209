"""Log-likelihoods in the form in which lmms-eval leaves them alone."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from lmms_eval.api.instance import GenerationResult


def as_results(likelihoods: Iterable[Sequence[Any]]) -> list[GenerationResult]:
    """Values and whether they are greedy, in the one form in which lmms-eval's evaluator leaves them alone.

    It makes a text of anything else that a model answers, also of what its tasks of choices take apart.
    """
    return [GenerationResult(cast(Any, (float(value), bool(greedy)))) for value, greedy in likelihoods]
