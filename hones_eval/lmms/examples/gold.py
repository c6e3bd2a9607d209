"""The choice of a task's metric and gold answers, both proven on the task's first examples."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.task import Task

from hones_eval.errors import TaskError, one_line
from hones_eval.lmms import targets
from hones_eval.lmms.answers.kind import AnswerKind, Recorder
from hones_eval.lmms.answers.log_probability import LOG_PROBABILITY
from hones_eval.lmms.answers.registry import kind_with_metric
from hones_eval.lmms.examples.scoring import Scorer
from hones_eval.lmms.examples.tasks import document, judge_of
from hones_eval.lmms.targets import Candidate, Gold


class Proof:
    """Chooses the metric and the gold answers of one task, and proves that they fit each other.

    A metric serves when it aggregates to a number. A gold answer serves when it scores close to the maximum
    as an answer, which `doc_to_target` does not always do.
    """

    def __init__(
        self,
        task: Task,
        requests: Sequence[Instance],
        scorer: Scorer,
        kind: AnswerKind,
        recorder: Recorder,
    ) -> None:
        """Prove on the first of `requests`, one per document, by answers of `kind`."""
        self.task, self.requests, self.scorer = task, requests, scorer
        self.kind, self.recorder = kind, recorder
        self._examples: dict[str, list[Instance]] = {}

    @property
    def name(self) -> str:
        """The task's."""
        return str(self.task.task_name)

    def metric(self, wanted: str | None, target: str | None) -> str:
        """The wanted metric, or the task's first that aggregates to a number.

        Without such a metric it is the gold answer's log-probability, if the gold answer is named.

        Raises: TaskError when a wanted metric is unknown, or none serves.
        """
        known = self.scorer.metrics()
        if wanted is not None and kind_with_metric(wanted):
            return wanted
        if wanted is not None and wanted not in known:
            raise TaskError(
                f"task {self.name} has no metric {wanted!r}; it has {', '.join([*known, LOG_PROBABILITY])}"
            )
        reasons = []
        for metric in [wanted] if wanted else known:
            try:
                nonsense = [targets.NONSENSE] * len(self._proof_examples(metric))
                self.scorer.aggregate(metric, self._results(nonsense, metric))
            except TaskError as error:
                reasons.append(str(error))
            else:
                return metric
        if wanted is None and (target is not None or targets.is_named(self.name)):
            return LOG_PROBABILITY
        raise TaskError(
            f"task {self.name} has no metric to measure heads with: {'; '.join(reasons)}. --metric "
            f"{LOG_PROBABILITY} with --target measures how likely its gold answers are"
        )

    def target(self, metric: str, override: str | None) -> Candidate:
        """The way to get gold answers, proven by the metric.

        For a metric that is not the task's own, any metric of the task that is a number proves it, unless a
        remote model computes the task's metrics.

        Raises: TaskError naming what was tried and how to name the target.
        """
        if kind_with_metric(metric) is None:
            return self._proven(override, metric)
        for tried in () if judge_of(self.task) else self.scorer.metrics():
            try:
                return self._proven(override, tried)
            except TaskError:
                continue
        return targets.unproven(self.name, document(self.task, self.requests[0].doc_id), override)

    def _proven(self, override: str | None, metric: str) -> Candidate:
        try:
            return self._target_by(override, metric, self.scorer.aggregate)
        except TaskError as unproven:
            # The metric may only reach its maximum on the whole data set, as OCRBench's sum out of 1000.
            try:
                return self._target_by(override, metric, self.scorer.mean_score)
            except TaskError:
                raise unproven from None

    def _target_by(
        self, override: str | None, metric: str, score: Callable[[str, list[dict[str, Any]]], float]
    ) -> Candidate:
        return targets.choose(
            self.name,
            metric,
            [document(self.task, request.doc_id) for request in self._proof_examples(metric)],
            lambda doc: targets.native_gold(self.task, doc),
            lambda answers: score(metric, self._results(answers, metric)),
            higher_is_better=self.scorer.metrics()[metric],
            override=override,
        )

    def _proof_examples(self, metric: str) -> list[Instance]:
        """The first examples that have a metric; some tasks, as MME, have other metrics per example."""
        if metric not in self._examples:
            having = (
                request for request in self.requests if metric in self._result(request, targets.NONSENSE)
            )
            self._examples[metric] = list(islice(having, self.recorder.proof_examples))
        return self._examples[metric]

    def _results(self, answers: Sequence[str], metric: str) -> list[dict[str, Any]]:
        proof = zip(self._proof_examples(metric), answers, strict=True)
        return [self._result(request, text) for request, text in proof]

    def _result(self, request: Instance, text: str) -> dict[str, Any]:
        """The result of an answer in words, put into the form of this kind of answer."""
        doc = document(self.task, request.doc_id)
        wrong = text == targets.NONSENSE
        answer = self.recorder.wrong_answer(doc) if wrong else self.recorder.as_answer(doc, text)
        return self.scorer.score(request, self.kind.responses(answer))


class GoldAnswers:
    """The gold answers of a task's documents, by a way that was proven."""

    def __init__(self, task: Task, candidate: Candidate) -> None:
        """Read gold answers as `candidate` does."""
        self.task, self.candidate = task, candidate

    def of(self, doc_id: int) -> Gold:
        """A document's gold answer. Raises: TaskError when it has none."""
        try:
            return self.candidate.adapter(document(self.task, doc_id))
        except (LookupError, TypeError, ValueError) as error:
            raise TaskError(
                f"{self.task.task_name}, doc_id {doc_id}: it has no gold answer ({one_line(error)})"
            ) from error
