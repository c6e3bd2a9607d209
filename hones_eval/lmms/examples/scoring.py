"""Scores single answers and whole sets by the task's own filters, metrics and aggregation."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.metrics import mean
from lmms_eval.api.reasoning import parse_reasoning_tags_config, strip_reasoning_tags
from lmms_eval.api.task import Task
from lmms_eval.filters.transformation import StripThinkingFilter

from hones_eval.errors import TaskError, one_line
from hones_eval.lmms.calls import aggregate, quiet
from hones_eval.lmms.examples.tasks import document
from hones_eval.lmms.failures import failure


class Scorer:
    """Scores answers of one task as lmms-eval's evaluator does, one at a time."""

    def __init__(self, task: Task) -> None:
        """Score with the filters of `task`, the first ensemble where it has several."""
        self.task = task
        self._filters = [*self._thinking(), *task._filters[0].filters]

    def score(self, instance: Instance, responses: Sequence[Any]) -> dict[str, Any]:
        """The result of one document: for each metric the entry that its aggregation takes.

        Args:
            instance: the request that was answered.
            responses: one text, or one pair of value and greediness per choice.
        """
        doc = document(self.task, instance.doc_id)
        with quiet(), _seeded(instance.doc_id):
            try:
                result = self._process(doc, [self._filtered(instance, response) for response in responses])
            except Exception as error:
                where = f"{self.task.task_name}, doc_id {instance.doc_id}"
                answer = responses[0] if len(responses) == 1 else list(responses)
                what = f"{where}: process_results failed on the answer {str(answer)[:80]!r}"
                raise failure(what, error, doc) from error
        return dict(result)

    def aggregate(self, metric: str, results: Sequence[dict[str, Any]]) -> float:
        """The task's own aggregation of one metric over results of `score`.

        Raises: TaskError when no result has the metric, or the aggregation gives no finite number.
        """
        values = [result[metric] for result in results if metric in result]
        name = f"{self.task.task_name}: {metric}"
        if not values:
            raise TaskError(f"{name} is in none of {len(results)} results")
        with quiet():
            try:
                number = aggregate(self.task.aggregation()[metric], values)
            except Exception as error:
                raise TaskError(
                    f"{name} cannot be aggregated: {type(error).__name__}: {one_line(error)}"
                ) from error
        number = number.item() if hasattr(number, "item") else number
        if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
            raise TaskError(f"{name} aggregates to {number!r}, which is not a finite number")
        return float(number)

    def mean_score(self, metric: str, results: Sequence[dict[str, Any]]) -> float:
        """The mean of the scores that a metric's entries list, for a metric on a scale of its own.

        Raises: TaskError when an entry lists none.
        """
        entries = [result[metric] for result in results if metric in result]
        listed = [entry.get("score") if isinstance(entry, dict) else None for entry in entries]
        scores = [float(score) for score in listed if isinstance(score, Real)]
        if not scores or len(scores) < len(entries):
            raise TaskError(f"{self.task.task_name}: {metric} lists no score for each example")
        return sum(scores) / len(scores)

    def is_mean(self, metric: str) -> bool:
        """Whether the task aggregates a metric by lmms-eval's plain mean."""
        return self.task.aggregation()[metric] is mean

    def metrics(self) -> dict[str, bool]:
        """Whether higher is better, for every metric of the task, in the task's order.

        It is where a task does not say: lmms-eval then has None for metrics that are not its own.
        """
        better = self.task.higher_is_better()
        return {str(name): better.get(name) is not False for name in self.task.aggregation()}

    def _thinking(self) -> list[Any]:
        config = self.task.config
        tags = parse_reasoning_tags_config(task_value=getattr(config, "reasoning_tags", None))
        return [StripThinkingFilter()] if getattr(config, "auto_strip_thinking", False) and not tags else []

    def _filtered(self, instance: Instance, answer: Any) -> Any:
        answered = Instance(instance.request_type, instance.args, instance.idx, dict(instance.metadata))
        answered.resps = [answer]
        responses: list[Any] = [answered.resps]
        for applied in self._filters:
            responses = applied.apply(responses, getattr(self.task, "task_docs", None))
        answer = next(iter(responses))
        tags = parse_reasoning_tags_config(task_value=getattr(self.task.config, "reasoning_tags", None))
        return strip_reasoning_tags(answer, tags) if tags and isinstance(answer, str) else answer

    def _process(self, doc: dict[str, Any], answers: list[Any]) -> dict[str, Any]:
        """`process_results` without lmms-eval's retries, which are two seconds apart and fail again."""
        plain = getattr(self.task.process_results, "__wrapped__", None)
        result = self.task.process_results(doc, answers) if plain is None else plain(self.task, doc, answers)
        if not isinstance(result, dict):
            raise TypeError(f"it returned {type(result).__name__} instead of a dict of metrics")
        return result


@contextmanager
def _seeded(doc_id: int) -> Iterator[None]:
    """Give an answer the same score each time: MMMU picks a random choice where an answer names none."""
    before = random.getstate(), np.random.get_state()
    random.seed(doc_id)
    np.random.seed(doc_id)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
