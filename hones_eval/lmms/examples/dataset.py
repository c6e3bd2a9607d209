"""Examples of any lmms-eval task as any lmms-eval model sees them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch.utils.data import Dataset

from hones_eval.core.artifact import ExampleSet, hash_of
from hones_eval.core.images import image_hash
from hones_eval.errors import HonesError, TaskError, one_line
from hones_eval.lmms import targets
from hones_eval.lmms.answers import margin
from hones_eval.lmms.answers.choices import Choices
from hones_eval.lmms.answers.margin import Margin
from hones_eval.lmms.examples.playback import Playback
from hones_eval.lmms.examples.questions import Questions
from hones_eval.lmms.examples.scoring import Scorer
from hones_eval.lmms.examples.tasks import build_requests, build_task, document, judge_of

LOG_PROBABILITY = "log_probability"
"""In the place of a task's metric: how likely its gold answer is, which every example has by itself."""
TARGET_TOKENS = 128
PROOF_EXAMPLES = 8
TOGETHER = 64  # examples on one picture that are measured at once
REMEMBERED_ANSWERS = 100_000


@dataclass(frozen=True, eq=False)
class Example:
    """One question as the model meets it, with its gold answer."""

    index: int
    """Place in the set, from 0."""
    task: str
    split: str
    doc_id: int
    """Place in the task's split; the key of lmms-eval's sample logs."""
    inputs: dict[str, Any]
    """What the model's `forward` takes, a batch of one."""
    settings: dict[str, Any]
    """The other arguments of `generate`."""
    target: str
    """The gold answer; for captions up to five references joined."""
    references: list[str]
    """The answers that count as right, best first."""
    target_ids: list[int]
    """The target encoded alone, without special tokens, at most 128."""
    image_hashes: list[str]
    text_hash: str
    margin: Margin | None = None
    """Where the answer is a margin between two words: the tokens that they begin with behind this prompt."""
    choices: Choices | None = None
    """Where the answer is the likeliest of some choices: what the model is asked for each."""

    @property
    def is_distractor(self) -> bool:
        """Whether the target is the second word of a margin: a candidate that is not the right one."""
        return self.margin is not None and self.target_ids != [self.margin.yes]


class TaskExamples(Dataset[Example]):
    """The examples of one task, recorded from the lmms-eval model when asked for, and their scores."""

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
        """Build the task as lmms-eval does; choose its metric and gold answer, and prove them on a few.

        Args:
            lmm: the model, as `load_lmm` gives it.
            task: a task that generates or chooses, or a group with one such task.
            model_name: the name after lmms-eval's `--model`, which chooses the task's prompts.
            include_path: a folder of further task YAML files.
            limit: at most so many examples.
            offset: the first document.
            gen_kwargs: as lmms-eval's `--gen_kwargs`.
            metric: one of the task's metrics, or `log_probability`, that of the gold answer; by default the
                task's first that aggregates to a number, and where there is none `log_probability`.
            target: the gold answer's column, or a Jinja template, where neither is found.

        Raises: TaskError, in one line, for whatever the task is not fit for.
        """
        self._task = build_task(
            task,
            lmm,
            model_name=model_name,
            include_path=include_path,
            gen_kwargs=gen_kwargs,
            scored=metric != LOG_PROBABILITY,
        )
        self.task = str(self._task.task_name)
        offered = build_requests(self._task, limit, offset)
        self._requests = [requests[0] for requests in offered]
        self.split = str(self._requests[0].args[-1])
        self.offset = offset
        self._lmm = lmm
        self._playback = Playback(lmm)
        self._tokenizer = margin.tokenizer_in(lmm)
        self._questions: Questions | None = None
        if self._requests[0].request_type == "loglikelihood":
            self._questions = Questions(self._task, self._playback, self._tokenizer, offered)
        settings = next((one for one in self._requests[0].args if isinstance(one, dict)), {})
        self.margin_words = margin.words_of(settings, self.task)
        self._ahead: dict[int, Example] = {}
        self._scorer = Scorer(self._task)
        self._answers: OrderedDict[tuple[int, tuple[int, ...]], str] = OrderedDict()
        self._prints: dict[int, tuple[str, list[str]]] = {}
        self._proofs: dict[str, list[Instance]] = {}
        self.metric = self._choose_metric(metric, target)
        self.by_log_probability = self.metric == LOG_PROBABILITY
        self.higher_is_better = self.by_log_probability or self._scorer.metrics()[self.metric]
        self.is_mean = self.by_log_probability or self._scorer.is_mean(self.metric)
        chosen = self._choose_target(target)
        self.target_source = chosen.name
        self._gold = chosen.adapter

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._requests)

    def __getitem__(self, index: int) -> Example:
        """Record one example: no forward pass is run.

        Raises: TaskError naming the task and doc_id when it cannot be had.
        """
        if index in self._ahead:
            return self._ahead.pop(index)
        request = self._request(index)
        text_hash, image_hashes = self._print(index)
        gold = self._gold_of(request)
        asked, between = None, None
        if self._questions is not None:
            asked, inputs, ids = self._questions.ask(index, self.document(index), gold.target)
            settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": len(ids) + 1}
        else:
            inputs, settings = self._playback.record(request)
            ids = self._tokenizer.encode(gold.target, add_special_tokens=False)
        if self.margin_words is not None:
            between = self._margin_behind(inputs["input_ids"][0].tolist(), request)
            ids = [between.yes if gold.target == self.margin_words[0] else between.no]
        return Example(
            index=index,
            task=self.task,
            split=self.split,
            doc_id=request.doc_id,
            inputs=inputs,
            settings=settings,
            target=gold.target,
            references=gold.references,
            target_ids=ids[:TARGET_TOKENS],
            image_hashes=image_hashes,
            text_hash=text_hash,
            margin=between,
            choices=asked,
        )

    def together(self, index: int) -> list[Example]:
        """The neighbours that show the same pictures as an example, itself among them, in blocks of 64.

        Which they are does not depend on who asks, so that a run that goes on has them as one without a
        break. Those behind it are kept until they are asked for.
        """
        start = index
        while start and self._shares_pictures(start):
            start -= 1
        start += (index - start) // TOGETHER * TOGETHER
        end = index + 1
        while end < min(len(self), start + TOGETHER) and self._shares_pictures(end):
            end += 1
        group = [self[place] for place in range(start, end)]
        self._ahead = {one.index: one for one in group if one.index > index}
        return group

    def _shares_pictures(self, index: int) -> bool:
        """Whether an example shows what the one before it does, and not nothing."""
        shown = self._print(index)[1]
        return bool(shown) and self._print(index - 1)[1] == shown

    def share(self, rank: int, ranks: int) -> list[int]:
        """A rank's part of the examples; neighbours that show the same pictures stay together."""
        if ranks == 1:
            return list(range(len(self)))
        groups: list[list[int]] = []
        for index in range(len(self)):
            if index and self._shares_pictures(index):
                groups[-1].append(index)
            else:
                groups.append([index])
        if len(groups) < ranks:  # every rank needs an example
            return list(range(rank, len(self), ranks))
        return [index for group in groups[rank::ranks] for index in group]

    def decode(self, index: int, token_ids: list[int]) -> str:
        """Give the answer that the wrapper makes of generated tokens, by playing them back through it."""
        key = (index, tuple(token_ids))
        if key not in self._answers:
            self._answers[key] = self._playback.decode(self._request(index), token_ids)
            if len(self._answers) > REMEMBERED_ANSWERS:
                self._answers.popitem(last=False)
        return self._answers[key]

    def score(self, index: int, text: str) -> dict[str, Any]:
        """Give the result of one answer by the task's filters and `process_results`."""
        return self._scorer.score(self._request(index), text)

    def aggregate(self, results: list[dict[str, Any]]) -> float:
        """Give `metric` over the results of `score`, by the task's own aggregation."""
        if self.by_log_probability:
            return sum(float(result[self.metric]) for result in results) / len(results)
        return self._scorer.aggregate(self.metric, results)

    def doc_id(self, index: int) -> int:
        """Give an example's place in the task's split."""
        return int(self._request(index).doc_id)

    def document(self, index: int) -> dict[str, Any]:
        """Give a copy of the document behind an example, without its pictures."""
        return document(self._task, self.doc_id(index))

    def pictures(self, index: int) -> list[Image.Image]:
        """Give the pictures that an example shows."""
        return self._shown(index)[1]

    def example_set(self) -> ExampleSet:
        """Name these examples: their hash covers task, split, documents, prompts and pictures."""
        prints = [self._print(index) for index in range(len(self))]
        ids = [request.doc_id for request in self._requests]
        parts = [self.task, self.split]
        for doc_id, (text_hash, image_hashes) in zip(ids, prints, strict=True):
            parts += [str(doc_id), text_hash, *image_hashes]
        pictures = list(dict.fromkeys(one for _, hashes in prints for one in hashes))
        return ExampleSet(self.task, self.split, len(self), self.offset, hash_of(parts), ids, pictures)

    def caption_references(self) -> list[list[int]] | None:
        """Tokens of every example's joined references where they are captions of a picture, else None.

        They are the documents of the inverse document frequencies that weigh a caption's tokens (HONES 2).
        """
        golds = [self._gold_of(request) for request in self._requests]
        if all(gold.target == gold.references[0] for gold in golds):
            return None
        return [self._tokenizer.encode(gold.target, add_special_tokens=False) for gold in golds]

    def check_targets(self) -> None:
        """Raise TaskError when examples have no gold answer, or one without tokens: how many, the first."""
        missing = []
        for request in self._requests:
            try:
                target = self._gold_of(request).target
            except TaskError:
                target = ""
            if not self._tokenizer.encode(target, add_special_tokens=False):
                missing.append(request.doc_id)
        if missing:
            raise TaskError(
                f"task {self.task}: {len(missing)} of {len(self)} examples have no gold answer, the first is "
                f"doc_id {missing[0]}; leave them out with --offset and --limit, or name another --target"
            )

    def one_answer(self) -> str | None:
        """What to say of examples with one gold answer: whatever makes a model give it looks like help."""
        golds = [self._gold_of(request).target for request in self._requests]
        if len(golds) < 2 or len({gold.strip().lower() for gold in golds}) > 1:
            return None
        offered = "balanced_accuracy" in self._scorer.metrics() and self.metric != "balanced_accuracy"
        balanced = ", or --metric balanced_accuracy" if offered else ""
        return (
            f"all {len(golds)} gold answers of {self.task} are {golds[0]!r}, so whatever makes a model "
            f"always say so looks like help: ask for other answers too{balanced}"
        )

    def _request(self, index: int) -> Instance:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._requests[index]

    def _print(self, index: int) -> tuple[str, list[str]]:
        """Hashes of the prompt's text and of the pictures, remembered."""
        if index not in self._prints:
            texts, pictures = self._shown(index)
            self._prints[index] = (hash_of(texts), [image_hash(one) for one in pictures])
        return self._prints[index]

    def _shown(self, index: int) -> tuple[list[str], list[Image.Image]]:
        request = self._request(index)
        where = f"{self.task}, doc_id {request.doc_id}"
        try:
            doc = self._lmm.task_dict[self.task][self.split][request.doc_id]
            if self._questions is not None:
                texts = [str(request.args[0]), *(str(one.args[1]) for one in self._questions.offered[index])]
                media = list(request.args[2](doc) or [])
            elif self._lmm.is_simple:
                texts, media = [str(request.args[0])], list(request.args[2](doc) or [])
            else:
                texts, media = _contents(request.args[1](doc))
        except HonesError as error:
            raise TaskError(f"{where}: {error}") from error
        except Exception as error:
            raise TaskError(
                f"{where}: its picture or prompt cannot be read: {type(error).__name__}: {one_line(error)}"
            ) from error
        return texts, [_picture(one, where) for one in media]

    def _gold_of(self, request: Instance) -> targets.Gold:
        try:
            return self._gold(document(self._task, request.doc_id))
        except (LookupError, TypeError, ValueError) as error:
            raise TaskError(
                f"{self.task}, doc_id {request.doc_id}: it has no gold answer ({one_line(error)})"
            ) from error

    @property
    def offers_choices(self) -> bool:
        """Whether the answer is the likeliest of some choices."""
        return self._questions is not None

    def _choose_metric(self, asked: str | None, target: str | None) -> str:
        known = self._scorer.metrics()
        if asked == LOG_PROBABILITY:
            return asked
        if asked is not None and asked not in known:
            raise TaskError(
                f"task {self.task} has no metric {asked!r}; it has {', '.join([*known, LOG_PROBABILITY])}"
            )
        reasons = []
        for metric in [asked] if asked else known:
            try:
                self._scorer.aggregate(
                    metric, self._tried([targets.NONSENSE] * len(self._proof(metric)), metric)
                )
            except TaskError as error:
                reasons.append(str(error))
            else:
                return metric
        if asked is None and (target is not None or targets.is_named(self.task)):
            return LOG_PROBABILITY
        raise TaskError(
            f"task {self.task} has no metric to measure heads with: {'; '.join(reasons)}. --metric "
            f"{LOG_PROBABILITY} with --target measures how likely its gold answers are"
        )

    def _margin_behind(self, prompt: list[int], request: Instance) -> Margin:
        assert self.margin_words is not None
        try:
            return margin.margin_behind(self._tokenizer, prompt, self.margin_words)
        except HonesError as error:
            raise TaskError(f"{self.task}, doc_id {request.doc_id}: {error}") from error

    def _choose_target(self, override: str | None) -> targets.Candidate:
        if not self.by_log_probability:
            return self._proven_target(override, self.metric)
        # Any metric that is a number proves a gold answer; one that asks a remote model is not asked.
        for metric in () if judge_of(self._task) else self._scorer.metrics():
            try:
                return self._proven_target(override, metric)
            except TaskError:
                continue
        return targets.unproven(self.task, self.document(0), override)

    def _proven_target(self, override: str | None, metric: str) -> targets.Candidate:
        try:
            return self._target_by(override, metric, self._scorer.aggregate)
        except TaskError as unproven:
            # The metric's scale may be one that only the whole data set fills, as OCRBench's share of 1000.
            try:
                return self._target_by(override, metric, self._scorer.mean_score)
            except TaskError:
                raise unproven from None

    def _target_by(
        self, override: str | None, metric: str, score: Callable[[str, list[dict[str, Any]]], float]
    ) -> targets.Candidate:
        return targets.choose(
            self.task,
            metric,
            [document(self._task, request.doc_id) for request in self._proof(metric)],
            self._native,
            lambda answers: score(metric, self._tried(answers, metric)),
            higher_is_better=self._scorer.metrics()[metric],
            override=override,
        )

    def _proof(self, metric: str) -> list[Instance]:
        """The first examples that have a metric: not every one need have all, as in MME."""
        if self.margin_words is not None:  # a score of whole queries is proven on one
            return self._requests[:TOGETHER]
        if metric not in self._proofs:
            having = (
                one
                for one in self._requests
                if metric in self._scorer.score(one, self._as_answer(one, targets.NONSENSE))
            )
            self._proofs[metric] = list(islice(having, PROOF_EXAMPLES))
        return self._proofs[metric]

    def _tried(self, answers: list[str], metric: str) -> list[dict[str, Any]]:
        proof = zip(self._proof(metric), answers, strict=True)
        return [self._scorer.score(one, self._as_answer(one, text)) for one, text in proof]

    def _as_answer(self, request: Instance, text: str) -> str:
        """A text as the task's scoring takes answers: also where they are margins or choices."""
        if self.margin_words is not None:
            return margin.as_answer(text, self.margin_words)
        if self._questions is None:
            return text
        doc = document(self._task, request.doc_id)
        if text == targets.NONSENSE:
            return self._questions.wrong_answer(doc, self._native(doc).references)
        return self._questions.answer(doc, text)

    def _native(self, doc: Mapping[str, Any]) -> targets.Gold:
        """The task's `doc_to_target`, through its choices where it is the place of one, or of several."""
        found = self._task.doc_to_target(dict(doc))
        if getattr(self._task.config, "doc_to_choice", None) is not None:
            several = found if isinstance(found, list) else [found]
            if all(isinstance(one, int) for one in several):
                texts = self._task.doc_to_choice(dict(doc))
                found = [texts[one] for one in several]
        return targets.most_common(targets.texts_in(found))


def _contents(messages: list[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """Texts with their speakers, and media, of a chat."""
    parts = [(one["role"], part) for one in messages for part in one["content"]]
    texts = [f"{role}: {part['text']}" for role, part in parts if part["type"] == "text"]
    return texts, [
        part if part["type"] != "image" else part["url"] for _, part in parts if part["type"] != "text"
    ]


def _picture(medium: Any, where: str) -> Image.Image:
    if isinstance(medium, Image.Image):
        return medium
    if isinstance(medium, str) and Path(medium).suffix.lower() in Image.registered_extensions():
        try:
            return Image.open(medium)
        except OSError as error:
            raise TaskError(f"{where}: the picture {medium} cannot be read: {one_line(error)}") from error
    kind = medium.get("type", "a dict") if isinstance(medium, dict) else type(medium).__name__
    raise TaskError(
        f"{where}: it shows {kind}, not a picture; only tasks of pictures and text can be measured"
    )
