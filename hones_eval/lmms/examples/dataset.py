"""Examples of any lmms-eval task, as any lmms-eval model sees them."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch.utils.data import Dataset

from hones_eval.core.artifact import ExampleSet
from hones_eval.errors import HonesError, TaskError
from hones_eval.lmms.answers.kind import RecordedTask, Recording
from hones_eval.lmms.answers.registry import kind_with_metric, recorder_of
from hones_eval.lmms.answers.tokens import tokenizer_of
from hones_eval.lmms.example import Example
from hones_eval.lmms.examples.fingerprints import Fingerprints
from hones_eval.lmms.examples.gold import GoldAnswers, Proof
from hones_eval.lmms.examples.scoring import Scorer
from hones_eval.lmms.examples.shown import WITHOUT_IMAGE, Shown, shown
from hones_eval.lmms.examples.tasks import build_requests, build_task, document
from hones_eval.lmms.playback import Playback

TARGET_TOKENS = 128
REMEMBERED_ANSWERS = 100_000


class TaskExamples(Dataset[Example]):
    """The examples of one task, recorded from the lmms-eval model when they are indexed, and their scores."""

    def __init__(
        self,
        lmm: lmms,
        task: str,
        *,
        model_name: str,
        include_path: str | Path | None = None,
        limit: int | None = None,
        offset: int = 0,
        gen_kwargs: str | None = None,
        metric: str | None = None,
        target: str | None = None,
    ) -> None:
        """Build the task as lmms-eval does, choose its metric and gold answers, and prove them on a few.

        Args:
            lmm: the model, as returned by `load_lmm`.
            task: a task that generates or chooses, or a group with one such task.
            model_name: the name after lmms-eval's `--model`, which chooses the task's prompts.
            include_path: a folder of further task YAML files.
            limit: the largest number of examples.
            offset: the first document.
            gen_kwargs: as lmms-eval's `--gen_kwargs`.
            metric: one of the task's metrics, or `log_probability`, that of the gold answer; by default the
                task's first that aggregates to a number, or `log_probability` where there is none.
            target: the gold answer's column, or a Jinja template, where neither is found.

        Raises: TaskError, in one line, when the task cannot be measured.
        """
        own_metric = kind_with_metric(metric)
        self._task = build_task(
            task,
            lmm,
            model_name=model_name,
            include_path=include_path,
            gen_kwargs=gen_kwargs,
            scored=own_metric is None,
        )
        self.task = str(self._task.task_name)
        self._by_document = build_requests(self._task, limit, offset)
        self._requests = [requests[0] for requests in self._by_document]
        self.split = str(self._requests[0].args[-1])
        self.offset = offset
        self._lmm = lmm
        self._playback = Playback(lmm)
        self._tokenizer = tokenizer_of(lmm)
        self._fingerprints = Fingerprints(len(self), self._shown)
        self._ahead: dict[int, Example] = {}
        self._answers: OrderedDict[tuple[int, tuple[int, ...]], str] = OrderedDict()
        self.recorded_as, self.recorder = recorder_of(
            RecordedTask(
                self._task,
                self._by_document,
                self._playback,
                self._tokenizer,
                lambda doc_id: document(self._task, doc_id),
            )
        )
        self._scorer = Scorer(self._task)
        self._choose(metric, target)

    def _choose(self, metric: str | None, target: str | None) -> None:
        """Choose the metric, the kind of answer that is measured, and the gold answers."""
        proof = Proof(self._task, self._requests, self._scorer, self.recorded_as, self.recorder)
        self.metric = proof.metric(metric, target)
        own_metric = kind_with_metric(self.metric)
        self.kind = own_metric or self.recorded_as
        self.higher_is_better = own_metric is not None or self._scorer.metrics()[self.metric]
        self.is_mean = own_metric is not None or self._scorer.is_mean(self.metric)
        candidate = proof.target(self.metric, target)
        self.target_source = candidate.name
        self._gold = GoldAnswers(self._task, candidate)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self._requests)

    def __getitem__(self, index: int) -> Example:
        """Record one example without a forward pass.

        Raises: TaskError naming the task and doc_id when it cannot be recorded.
        """
        if index in self._ahead:
            return self._ahead.pop(index)
        request = self._request(index)
        text_hash, image_hashes = self._fingerprints.of(index)
        gold = self._gold.of(request.doc_id)
        recording = self._record(index, gold.target)
        return Example(
            index=index,
            task=self.task,
            split=self.split,
            doc_id=request.doc_id,
            inputs=recording.inputs,
            settings=recording.settings,
            target=gold.target,
            references=gold.references,
            target_ids=recording.target_ids[:TARGET_TOKENS],
            image_hashes=image_hashes,
            text_hash=text_hash,
            details=recording.details,
            is_distractor=recording.is_distractor,
        )

    def _record(self, index: int, gold: str) -> Recording:
        try:
            return self.recorder.record(index, gold)
        except HonesError as error:
            without_images = not self._fingerprints.of(index)[1]
            if without_images and "hones_hf" not in str(error):
                raise TaskError(f"{error}{WITHOUT_IMAGE}") from error
            raise

    def with_same_images(self, index: int) -> list[Example]:
        """The neighbors of an example that show the same images, itself included, in blocks of 64.

        The later ones are kept until they are indexed, so that none is recorded twice.
        """
        group = [self[member] for member in self._fingerprints.group(index)]
        self._ahead = {example.index: example for example in group if example.index > index}
        return group

    def share(self, rank: int, ranks: int) -> list[int]:
        """A rank's part of the examples; neighbors that show the same images stay together."""
        return self._fingerprints.share(rank, ranks)

    def decode(self, index: int, token_ids: list[int]) -> str:
        """The answer that the wrapper makes of generated tokens, by playing them back through it."""
        key = (index, tuple(token_ids))
        if key not in self._answers:
            self._answers[key] = self._playback.decode(self._request(index), token_ids)
            if len(self._answers) > REMEMBERED_ANSWERS:
                self._answers.popitem(last=False)
        return self._answers[key]

    def score(self, index: int, text: str) -> dict[str, Any]:
        """The result of one answer by the task's filters and metrics, or by the kind's own metric."""
        own = self.kind.own_result(text)
        return own or self._scorer.score(self._request(index), self.kind.responses(text))

    def metric_of(self, index: int, result: dict[str, Any]) -> Any:
        """The entry of `metric` in one result of `score`. Raises: TaskError where the example has none."""
        if self.metric not in result:
            raise TaskError(
                f"{self.task}, doc_id {self.doc_id(index)}: its result has no {self.metric!r}, only "
                f"{', '.join(map(repr, result))}: choose another --metric, or leave such examples out"
            )
        return result[self.metric]

    def aggregate(self, results: list[dict[str, Any]]) -> float:
        """`metric` over results of `score`, by the task's own aggregation; a kind's own metric is a mean."""
        if self.kind.metric is not None:
            return sum(float(result[self.metric]) for result in results) / len(results)
        return self._scorer.aggregate(self.metric, results)

    def doc_id(self, index: int) -> int:
        """An example's position in the task's split."""
        return int(self._request(index).doc_id)

    def document(self, index: int) -> dict[str, Any]:
        """A copy of an example's document, without its images."""
        return document(self._task, self.doc_id(index))

    def images(self, index: int) -> list[Image.Image]:
        """The images that an example shows."""
        return self._shown(index).images

    def example_set(self) -> ExampleSet:
        """The identity of these examples: its hash covers task, split, documents, prompts and images."""
        doc_ids = [request.doc_id for request in self._requests]
        return self._fingerprints.example_set(self.task, self.split, self.offset, doc_ids)

    def caption_references(self) -> list[list[int]] | None:
        """Tokens of every example's joined references where they are captions of an image, else None.

        They are the documents of the inverse document frequencies that weight a caption's tokens (HONES 2).
        """
        golds = [self._gold.of(request.doc_id) for request in self._requests]
        if all(gold.target == gold.references[0] for gold in golds):
            return None
        return [self._tokenizer.encode(gold.target, add_special_tokens=False) for gold in golds]

    def check_targets(self) -> None:
        """Check that every example has a gold answer with tokens.

        Raises: TaskError saying how many have none, and naming the first.
        """
        missing = []
        for request in self._requests:
            try:
                target = self._gold.of(request.doc_id).target
            except TaskError:
                target = ""
            if not self._tokenizer.encode(target, add_special_tokens=False):
                missing.append(request.doc_id)
        if missing:
            raise TaskError(
                f"task {self.task}: {len(missing)} of {len(self)} examples have no gold answer, the first is "
                f"doc_id {missing[0]}; leave them out with --offset and --limit, or name another --target"
            )

    def constant_answer_warning(self) -> str | None:
        """A warning when all gold answers are the same, so that always giving it looks helpful."""
        golds = [self._gold.of(request.doc_id).target for request in self._requests]
        if len(golds) < 2 or len({gold.strip().lower() for gold in golds}) > 1:
            return None
        offered = "balanced_accuracy" in self._scorer.metrics() and self.metric != "balanced_accuracy"
        balanced = ", or --metric balanced_accuracy" if offered else ""
        return (
            f"all {len(golds)} gold answers of {self.task} are {golds[0]!r}, so any edit that makes a model "
            f"always give this answer looks helpful: include other answers{balanced}"
        )

    def _request(self, index: int) -> Instance:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._requests[index]

    def _shown(self, index: int) -> Shown:
        doc_id = self._request(index).doc_id
        return shown(
            self._by_document[index],
            lambda: self._lmm.task_dict[self.task][self.split][doc_id],
            simple=self._lmm.is_simple,
        )
