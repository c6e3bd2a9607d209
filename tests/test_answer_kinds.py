"""A fifth kind of answer is one class and one registration: no other module has to know of it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import own_answers
import plain
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.ranking import Ranking
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.answers.kind import NextTokenReader, RecordedTask, Recorder, Recording
from hones_eval.lmms.answers.next_token import NextTokenKind, as_text
from hones_eval.lmms.answers.registry import registered
from hones_eval.lmms.answers.tokens import next_token
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.answers import BASELINE, AnswersUnder

SETTING, WORD, COUNT = "probability_of", "Yes", 4

# The fifth kind: the probability of one word at the next token.


class Probability(NamedTuple):
    token: int

    def of(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1)[..., self.token]


class ProbabilityRecorder(Recorder):
    def __init__(self, task: RecordedTask) -> None:
        self.task, self.word = task, str(task.settings[SETTING])

    def record(self, index: int, gold: str) -> Recording:
        inputs, settings = self.task.calls.record(self.task.requests[index][0])
        token = next_token(self.task.tokenizer, inputs["input_ids"][0].tolist(), self.word)
        return Recording(inputs, settings, [token], Probability(token))

    def as_answer(self, doc: Mapping[str, Any], text: str) -> str:
        return as_text(1.0)

    def wrong_answer(self, doc: Mapping[str, Any]) -> str:
        return as_text(0.0)


class ProbabilityReader:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, word: str) -> None:
        self.text: str | None = None
        self.tokenizer, self.word = tokenizer, word

    def read(self, prompt: Tensor, logits: Tensor) -> None:
        token = next_token(self.tokenizer, prompt[0].tolist(), self.word)
        self.text = as_text(float(Probability(token).of(logits)[0]))


class ProbabilityAnswers(NextTokenKind):
    name = "probability"
    settings = frozenset({SETTING})

    def recorder(self, task: RecordedTask) -> Recorder | None:
        return ProbabilityRecorder(task) if SETTING in task.settings else None

    def differs(self, base: float, edited: Tensor) -> Tensor:
        return (edited > 0.5) != (base > 0.5)

    def reader(
        self, settings: Mapping[str, Any], task: str, tokenizer: PreTrainedTokenizerBase
    ) -> NextTokenReader:
        return ProbabilityReader(tokenizer, str(settings[SETTING]))


# A task that asks for it. Its metric is the answer itself.
UTILS = """

def own_result(doc, results):
    return {"probability": float(results[0])}
"""
METRIC = """metric_list:
  - metric: probability
    aggregation: mean
    higher_is_better: true
process_results: !function utils.own_result
"""


@pytest.fixture(scope="module")
def tasks(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")
    folder = tmp_path_factory.mktemp("fifth")
    text = (own.tasks / "own_a.yaml").read_text().replace("task: own_a", "task: own_fifth")
    text = text.replace("  max_new_tokens: 3", f"  max_new_tokens: 3\n  {SETTING}: {WORD}")
    (folder / "own_fifth.yaml").write_text(text[: text.index("metric_list")] + METRIC)
    (folder / "utils.py").write_text((own.tasks / "utils.py").read_text() + UTILS)
    return folder


@pytest.fixture(scope="module", autouse=True)
def fifth_kind() -> Iterator[None]:
    with registered(ProbabilityAnswers()):
        yield


def built(name: str, model_args: str, tasks: Path) -> TaskExamples:
    lmm = load_lmm(name, model_args)
    return TaskExamples(lmm, "own_fifth", model_name=name, include_path=tasks, limit=COUNT)


def slow(examples: TaskExamples, edit: plain.Edit | None = None) -> list[float]:
    """The probabilities of the word by full forwards with hooks of the reference."""
    found = []
    for index in range(COUNT):
        example = examples[index]
        logits = plain.forward(inner_model(examples._lmm), example.inputs, edit).logits[-1]
        found.append(float(logits.softmax(-1)[example.target_ids[0]]))
    return found


def test_it_is_ranked(tasks: Path, model_args: str, tmp_path: Path) -> None:
    model = ["--model", "llava_hf", "--model_args", model_args, "--include_path", str(tasks)]
    chosen = ["--method", "hones", "--tasks", "own_fifth", "--limit", str(COUNT), "--heads", "4"]
    assert main(["rank", *model, *chosen, "--out", str(tmp_path)]) == 0
    ranking, examples = Ranking.load(tmp_path), built("llava_hf", model_args, tasks)
    base = sum(slow(examples)) / COUNT
    assert ranking.report["metric"] == "probability"
    assert ranking.report["base_metric"] == pytest.approx(base, abs=1e-6)
    for edit in plain.all_heads(inner_model(examples._lmm)):
        drop = base - sum(slow(examples, edit)) / COUNT
        assert float(ranking.head_scores[edit.layer, edit.site]) == pytest.approx(drop, abs=1e-6)


def head_off(model: Any) -> Steering:
    shape = Anatomy.of(model).shape
    heads = torch.ones(shape.layers, shape.heads)
    heads[0, 1] = 0.0
    source = Provenance("tiny", None, shape, "by hand", {}, [])
    return Steering(heads, torch.ones(shape.layers, shape.neurons), source)


def test_it_is_answered_under_steerings(tasks: Path, model_args: str) -> None:
    examples = built("llava_hf", model_args, tasks)
    model = inner_model(examples._lmm)
    off = plain.Edit(0, 1, "zero head")
    run = AnswersUnder(Replayer(Anatomy.of(model)), examples, {"off": head_off(model)})
    for index, (base, edited) in enumerate(zip(slow(examples), slow(examples, off), strict=True)):
        answers = run.measure(examples[index]).record.answers
        assert answers[BASELINE].result["probability"] == pytest.approx(base, abs=1e-6)
        assert answers["off"].result["probability"] == pytest.approx(edited, abs=1e-6)
        assert base != edited


def test_a_steered_wrapper_answers_it(tasks: Path, model_args: str, tmp_path: Path) -> None:
    plainly = built("llava_hf", model_args, tasks)
    head_off(inner_model(plainly._lmm)).save(tmp_path / "steering")
    off = plain.Edit(0, 1, "zero head")
    expected: dict[str, Sequence[float]] = {
        model_args: slow(plainly),
        f"{model_args},steering={tmp_path / 'steering'}": slow(plainly, off),
    }
    for arguments, values in expected.items():
        examples = built("hones_llava", arguments, tasks)
        answers = examples._lmm.generate_until(examples._requests)
        assert [float(text) for text in answers] == pytest.approx(values, abs=1e-6)
