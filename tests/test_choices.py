"""Multiple-choice tasks: recorded at the model's forward call, and measured as lmms-eval scores them."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import lmms_runs
import plain
import pytest
import torch
from lmms_eval.api.instance import Instance, unwrap_generation_output
from torch import nn
from transformers import AutoProcessor

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import hash_of
from hones_eval.core.images import image_hash
from hones_eval.core.ranking import Ranking
from hones_eval.core.steering import Steering
from hones_eval.engine.replay import Replayer
from hones_eval.errors import TaskError
from hones_eval.lmms.answers import choices
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.answers import AnswersUnder
from hones_eval.toy import checkpoint_path, scenes
from hones_eval.toy.drawing import draw, to_image
from hones_eval.toy.questions import TEXT as WORDING

WRAPPERS = ("hones_llava", "hones_hf")
MODEL_ARGS = f"pretrained={checkpoint_path()}"
COUNT = 3
COLORS = ("red", "green", "blue")

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_choice: options
doc_to_target: {target}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["picture"]).convert("RGB")]
"""


def rows(folder: Path) -> list[dict[str, Any]]:
    """Scenes with a question about a colour; one gold answer is deliberately wrong."""
    found = []
    for index in range(COUNT):
        scene = scenes.scene("test", index)
        picture = folder / f"{index}.png"
        to_image(draw(scene)).save(picture)
        thing = scene.things[0]
        options = [thing.color, *(one for one in COLORS if one != thing.color)][:3]
        options = options[index % 3 :] + options[: index % 3]
        gold = thing.color if index != 2 else next(one for one in options if one != thing.color)
        question = WORDING["color"].format(shape=thing.shape)
        found.append(
            {
                "picture": str(picture),
                "question": question,
                "options": [f"{one} {thing.shape}" if index % 2 else one for one in options],
                "place": options.index(gold),
                "gold": f"{gold} {thing.shape}" if index % 2 else gold,
            }
        )
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choices")
    written = rows(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (folder / "utils.py").write_text(UTILS)
    for name, target, metric in (("own_choice", "place", "acc"), ("own_named", "gold", "acc")):
        text = YAML.format(name=name, data=folder / "rows.jsonl", target=target, metric=metric)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def build() -> Callable[[str], Any]:
    return cache(lambda wrapper: load_lmm(wrapper, MODEL_ARGS))


def asked(tasks: Path, lmm: Any) -> list[list[Instance]]:
    """The requests that lmms-eval makes of the rows, written out."""
    lmm.task_dict["plain"] = {"test": [json.loads(line) for line in (tasks / "rows.jsonl").open()]}
    return [
        [
            Instance(
                request_type="loglikelihood",
                arguments=(row["question"], f" {option}", picture_of, index, "plain", "test"),
                idx=place,
                metadata={"task": "plain", "doc_id": index, "repeats": 1},
            )
            for place, option in enumerate(row["options"])
        ]
        for index, row in enumerate(lmm.task_dict["plain"]["test"])
    ]


def picture_of(row: Mapping[str, Any]) -> list[Any]:
    from PIL import Image as Pictures

    return [Pictures.open(row["picture"]).convert("RGB")]


def pairs(lmm: Any, requests: list[Instance]) -> list[tuple[float, bool]]:
    return [unwrap_generation_output(one)[0] for one in lmm.loglikelihood(requests)]


def accuracy(tasks: Path, lmm: Any, edit: plain.Edit | None = None) -> float:
    """By the wrapper's own values, under an edit by separate hooks; the smallest value is the answer."""
    right = []
    with plain.edited(inner_model(lmm), edit):
        for row, requests in zip(asked_rows(tasks), asked(tasks, lmm), strict=True):
            values = [value for value, _ in pairs(lmm, requests)]
            right.append(values.index(min(values)) == row["place"])
    return sum(right) / len(right)


def asked_rows(tasks: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tasks / "rows.jsonl").open()]


def items(tasks: Path, lmm: Any) -> list[plain.Item]:
    """Prompt and gold tokens, captured at the model's `forward` while the wrapper runs."""
    model, found = inner_model(lmm), []
    for row, requests in zip(asked_rows(tasks), asked(tasks, lmm), strict=True):
        with seen_calls(model) as calls:
            lmm.loglikelihood([requests[row["place"]]])
        (call,) = calls
        gold = lmm.tokenizer.encode(row["gold"], add_special_tokens=False)
        ids = call["input_ids"][0].tolist()
        start = max(i for i in range(len(ids)) if ids[i : i + len(gold)] == gold)
        along = ("input_ids", "attention_mask")
        inputs = {name: value[:, :start] if name in along else value for name, value in call.items()}
        inputs.pop("labels")
        found.append(plain.Item(inputs, {}, gold))
    return found


@contextmanager
def seen_calls(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    calls: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def rank(tasks: Path, out: Path, wrapper: str, *more: Any, method: str = "hones") -> Ranking:
    command = ["rank", "--method", method, "--model", wrapper, "--model_args", MODEL_ARGS]
    command += ["--include_path", tasks, "--tasks", "own_choice", "--heads", 4, "--out", out, *more]
    assert main([str(part) for part in command]) == 0
    return Ranking.load(out)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_heads_and_neurons_are_those_of_a_plain_loop(
    wrapper: str, tasks: Path, build: Callable[[str], Any], tmp_path: Path
) -> None:
    ranking, lmm = rank(tasks, tmp_path / "ranking", wrapper), build(wrapper)
    model, questions = inner_model(lmm), items(tasks, build(wrapper))
    base = accuracy(tasks, lmm)
    assert 0 < base < 1
    assert ranking.report["base_metric"] == base
    assert ranking.report["prefix_sharing"] == "exact"
    assert ranking.report["examples_sharing_a_prefix"] == COUNT
    drops, logs = torch.zeros(2, len(plain.layers(model)), plain.head_count(model)).double()
    sure = [plain.log_probability(model, one) for one in questions]
    for edit in plain.all_heads(model):
        drops[edit.layer, edit.site] = base - accuracy(tasks, lmm, edit)
        losses = [s - plain.log_probability(model, one, edit) for s, one in zip(sure, questions, strict=True)]
        logs[edit.layer, edit.site] = sum(losses) / len(losses)
    assert drops.abs().max() > 0
    torch.testing.assert_close(ranking.head_scores.double(), drops, atol=1e-6, rtol=0)
    torch.testing.assert_close(ranking.head_log_probability.double(), logs, atol=1e-4, rtol=0)
    chosen = [tuple(one["head"]) for one in ranking.report["heads"] if one["score"] > 0]
    weights = {plain.Edit(*head): float(drops[head]) for head in chosen}
    importance = plain.hones_neurons(model, questions, weights)
    torch.testing.assert_close(ranking.neuron_scores.double(), importance, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_vseam_reads_where_the_right_choice_begins(
    wrapper: str, tasks: Path, build: Callable[[str], Any], tmp_path: Path
) -> None:
    ranking = rank(tasks, tmp_path / "ranking", wrapper, method="vseam")
    lmm = build(wrapper)
    expected = plain.vseam_heads(inner_model(lmm), items(tasks, lmm))
    assert ranking.report["correct_examples"] == expected["correct"]
    for name, scores in (
        ("signed", ranking.head_scores),
        ("positive", ranking.head_positive),
        ("negative", ranking.head_negative),
    ):
        torch.testing.assert_close(scores.double(), expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_answers_under_a_steering_are_those_of_the_steered_wrapper(
    wrapper: str, tasks: Path, build: Callable[[str], Any], tmp_path: Path
) -> None:
    lmms_runs.write_steering(checkpoint_path(), tmp_path / "steering", seed=1, spread=1.0)
    lmm = build(wrapper)
    examples = TaskExamples(lmm, "own_named", model_name=wrapper, include_path=tasks)
    steering = Steering.load(str(tmp_path / "steering"))
    scored: list[str] = []
    score = examples.score
    examples.score = lambda index, text: scored.append(text) or score(index, text)  # type: ignore[method-assign]
    answers = AnswersUnder(Replayer(Anatomy.of(inner_model(lmm))), examples, {"steered": steering})
    results = [answers.measure(examples[index]).record.answers for index in range(COUNT)]
    steered = load_lmm(wrapper, f"{MODEL_ARGS},steering={tmp_path / 'steering'}")
    for place, one in enumerate((lmm, steered)):
        said = [choices.from_text(text) for text in scored[place::2]]
        for found, requests in zip(said, asked(tasks, one), strict=True):
            expected = pairs(one, requests)
            assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert scored[::2] != scored[1::2]
    assert [one["baseline"].result["acc"] for one in results] == [1.0, 1.0, 0.0]
    for found, item in zip(results, items(tasks, lmm), strict=True):
        begins = plain.forward(inner_model(lmm), item.inputs).logits[-1].float().softmax(-1)
        assert found["baseline"].probability == pytest.approx(float(begins[item.target[0]]), abs=1e-5)
        assert found["baseline"].correct == (int(begins.argmax()) in item.target)


def test_the_report_of_the_command_describes_choices(tasks: Path, tmp_path: Path) -> None:
    model = ["--model", "hones_llava", "--model_args", MODEL_ARGS]
    task = ["--tasks", "own_choice", "--include_path", str(tasks), "--log_samples", "--output_path", "logs"]
    for _ in range(2):  # the second time from the cache
        done = lmms_runs.run_command([*model, *task, "--use_cache", str(tmp_path / "cache")], tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        (results,) = tmp_path.glob("logs/*/*_results.json")
        assert json.loads(results.read_text())["results"]["own_choice"]["acc,none"] == pytest.approx(2 / 3)
        kept = lmms_runs.manifest(tmp_path / "logs")["requests"]["own_choice"]
        assert kept == {str(row): fingerprint(tasks, row) for row in range(COUNT)}
        shutil.rmtree(tmp_path / "logs")
    assert rank(tasks, tmp_path / "ranking", "hones_llava").report["base_metric"] == pytest.approx(2 / 3)


def fingerprint(tasks: Path, row: int) -> dict[str, Any]:
    """One hash of the question with all choices, and one of its image."""
    asked = asked_rows(tasks)[row]
    texts = [text for option in asked["options"] for text in (asked["question"], f" {option}")]
    return {"prompt_sha256": hash_of(texts), "image_sha256": [image_hash(picture_of(asked)[0])]}


def test_own_tokens_leave_out_the_tokens_of_a_template() -> None:
    tokenizer = AutoProcessor.from_pretrained(checkpoint_path()).tokenizer
    encode = tokenizer.encode
    round_it = [*encode(":"), *encode("red circle"), tokenizer.eos_token_id, *encode(".")]
    assert choices.own_tokens(tokenizer, round_it, "Red circle") == (1, 3)
    assert choices.own_tokens(tokenizer, encode("red red"), "red red") == (0, 2)
    assert choices.own_tokens(tokenizer, encode("red circle"), "blue") == (0, 2)
    assert choices.own_tokens(tokenizer, round_it, "blue") == (0, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"metric: acc": "metric: acc_mutual_info"},
            "'acc_mutual_info' should be one of acc, acc_norm",
        ),
        (
            {"doc_to_target: place": "doc_to_target: question"},
            "could not find the gold answer.*is not among the choices",
        ),
        (
            {"doc_to_choice: options": 'doc_to_choice: ["red"]'},
            r"own_choice.yaml: doc_to_choice: \['red'\] should be a list of at least two texts",
        ),
        ({"multiple_choice": "loglikelihood"}, "has output_type loglikelihood; only tasks with one answer"),
    ],
)
def test_invalid_questions_are_refused(
    change: dict[str, str], says: str, tasks: Path, build: Callable[[str], Any], tmp_path: Path
) -> None:
    text = (tasks / "own_choice.yaml").read_text()
    for old, new in change.items():
        text = text.replace(old, new)
    (tmp_path / "own_choice.yaml").write_text(text)
    (tmp_path / "utils.py").write_text(UTILS)
    with pytest.raises(TaskError, match=says):
        TaskExamples(build("hones_llava"), "own_choice", model_name="hones_llava", include_path=tmp_path)


def test_a_wrapper_without_log_likelihoods_is_refused_with_the_way_out(tasks: Path) -> None:
    lmm = load_lmm("llava_hf", MODEL_ARGS)
    says = r"own_choice, doc_id \d: LlavaHf failed: .*; use --model hones with base=<this model>"
    with pytest.raises(TaskError, match=says):
        TaskExamples(lmm, "own_choice", model_name="llava_hf", include_path=tasks)


@pytest.mark.parametrize("value", choices.VALUES)
@pytest.mark.parametrize("greedy_at", [0, 1, None])
def test_the_way_in_which_a_wrapper_reads_logits_is_found(
    value: str,
    greedy_at: int | None,
    tasks: Path,
    build: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lmm = build("hones_hf")
    of = {
        "mean loss": lambda logs: -logs.mean(),
        "summed loss": lambda logs: -logs.sum(),
        "mean log-likelihood": lambda logs: logs.mean(),
        "summed log-likelihood": lambda logs: logs.sum(),
    }[value]
    monkeypatch.setattr(type(lmm), "loglikelihood", scoring(of, greedy_at))
    examples = TaskExamples(lmm, "own_choice", model_name="hones_hf", include_path=tasks)
    assert examples[0].details.reading == choices.Reading(value, greedy_at)


def test_a_wrapper_with_other_scores_is_refused(
    tasks: Path, build: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lmm = build("hones_hf")
    monkeypatch.setattr(type(lmm), "loglikelihood", scoring(lambda logs: logs.min()))
    with pytest.raises(TaskError, match="neither the loss nor the log-likelihood"):
        TaskExamples(lmm, "own_choice", model_name="hones_hf", include_path=tasks)


def scoring(
    of: Callable[[torch.Tensor], torch.Tensor], greedy_at: int | None = 0
) -> Callable[..., list[tuple[float, bool]]]:
    """A `loglikelihood` by calls of the model that computes another value from the logits."""

    def loglikelihood(self: Any, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        found = []
        for text, choice, show, doc_id, task, split in (request.args for request in requests):
            shown = [{"type": "image", "image": one} for one in show(self.task_dict[task][split][doc_id])]
            turn = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
            inputs = self.inputs_of([[turn]])
            ids = self.tokenizer.encode(choice, add_special_tokens=False, return_tensors="pt")
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            count = ids.shape[1]
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[:, -count:] = ids
            logits = inner_model(self)(**inputs, labels=labels).logits[0]
            logs = logits[-count - 1 : -1].log_softmax(-1)[range(count), ids[0]]
            likeliest = logits.argmax(-1)[-count - 1 + (greedy_at or 0) :][:count]
            greedy = greedy_at is not None and bool((likeliest == ids[0]).all())
            found.append((float(of(logs.detach())), greedy))
        return found

    return loglikelihood
