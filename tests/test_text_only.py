"""Language models that read text alone, dense and with experts, through the commands and lmms-eval."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lmms_runs
import pytest
import text_models
import torch
from datasets import Sequence, Value
from hub import serving
from lmms_eval.api.instance import Instance, unwrap_generation_output
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

import hones_eval as he
from hones_eval.__main__ import main
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Neuron
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError
from hones_eval.jobs.rank import Discovery, discover, provenance
from hones_eval.jobs.spike_in import SpikeIn, spike_in
from hones_eval.lmms.answers.tokens import answer_tokens
from hones_eval.lmms.models import load_lmm
from hones_eval.methods import scaling
from hones_eval.methods.answers import AnswersUnder
from hones_eval.methods.banks import neuron_banks

SHAPE = (4, 4)
RANKED = 6


class Setup(NamedTuple):
    """A checkpoint, its tasks with the gold answers of the first, and the folder for results."""

    name: str
    checkpoint: Path
    tasks: Path
    golds: list[str]
    out: Path

    def command(self, name: str, *others: Any, task: str = "text_own") -> list[str]:
        model = ["--model", "hones_hf", "--model_args", f"pretrained={self.checkpoint}"]
        return [name, *map(str, [*model, "--include_path", self.tasks, "--tasks", task, *others])]


@pytest.fixture(scope="module", params=text_models.NAMES)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = text_models.save_checkpoint(request.param, folder / "checkpoint")
    golds = text_models.write_tasks(folder / "tasks", checkpoint)
    return Setup(request.param, checkpoint, folder / "tasks", golds, folder)


@pytest.fixture(scope="module")
def ranking(setup: Setup) -> Ranking:
    """By HONES on the first examples, through the command."""
    arguments = ["--method", "hones", "--limit", RANKED, "--heads", 4, "--neurons", 0.02]
    assert main(setup.command("rank", *arguments, "--out", setup.out / "ranking")) == 0
    return Ranking.load(setup.out / "ranking")


def ask(lmm: Any, questions: list[str]) -> list[str]:
    """Answers through the wrapper, as lmms-eval asks in its chat form."""
    lmm.task_dict["asked"] = {"test": questions}

    def messages(question: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": question}]}]

    settings = {"max_new_tokens": 3, "until": []}
    requests = [
        Instance(
            "generate_until",
            ("", messages, dict(settings), i, "asked", "test"),
            i,
            {"task": "asked", "doc_id": i, "repeats": 1},
        )
        for i in range(len(questions))
    ]
    return [unwrap_generation_output(found)[0] for found in lmm.generate_until(requests)]


@contextmanager
def replaced_by_mean(model: PreTrainedModel, layer: int, head: int) -> Iterator[None]:
    """Replace a head by the mean of the others, by a hook of this test's own."""

    def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        heads = args[0].clone().unflatten(-1, (4, 16))
        others = [i for i in range(4) if i != head]
        heads[..., head, :] = heads[..., others, :].mean(-2)
        return (heads.flatten(-2),)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def log_probability(model: PreTrainedModel, prompt: Tensor, target: list[int]) -> float:
    """Of the target's tokens after a prompt."""
    ids = torch.cat([prompt, torch.tensor([target])], dim=1)
    rows = model(input_ids=ids).logits[0, prompt.shape[1] - 1 : -1].double().log_softmax(-1)
    return sum(float(row[token]) for row, token in zip(rows, target, strict=True))


def test_answers_are_those_of_transformers_alone_and_of_batches(setup: Setup) -> None:
    model, tokenizer = text_models.load(setup.checkpoint)
    questions = [text_models.QUESTION.format(thing) for thing in ("cat", "large white house", "dog")]
    expected = [text_models.answer(model, tokenizer, question) for question in questions]
    assert len(set(expected)) > 1
    lmm = load_lmm("hones_hf", f"pretrained={setup.checkpoint}")
    assert ask(lmm, questions) == expected
    lmm.batch_size_per_gpu = 3
    assert ask(lmm, questions) == expected


def test_rank_measures_heads_as_a_plain_loop_does(setup: Setup, ranking: Ranking) -> None:
    assert ranking.head_log_probability is not None
    model, tokenizer = text_models.load(setup.checkpoint)
    assert ranking.report is not None
    assert ranking.report["replay"] == "exact"
    things = text_models.THINGS[:RANKED]
    prompts = [text_models.prompt_ids(tokenizer, text_models.QUESTION.format(thing)) for thing in things]
    targets = [tokenizer(gold, add_special_tokens=False).input_ids for gold in setup.golds[:RANKED]]
    base = [log_probability(model, *pair) for pair in zip(prompts, targets, strict=True)]
    for layer, head in ((0, 1), (3, 2)):
        with replaced_by_mean(model, layer, head):
            edited = [log_probability(model, *pair) for pair in zip(prompts, targets, strict=True)]
        expected = sum(a - b for a, b in zip(base, edited, strict=True)) / RANKED
        assert float(ranking.head_log_probability[layer, head]) == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_verify_and_scale_take_other_questions_only(
    setup: Setup, ranking: Ranking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--ranking", setup.out / "ranking"]
    assert main(setup.command("verify", *source, "--limit", 3, "--out", tmp_path)) == 1
    assert "3 of the 3 questions of text_own (test) were also used" in capsys.readouterr().err
    held_out = [*source, "--offset", RANKED, "--trials", 2]
    assert main(setup.command("verify", *held_out, "--out", tmp_path / "verified")) == 0
    report = json.loads((tmp_path / "verified" / "verify.json").read_text())
    assert report["bank_sizes"]["selected"] == report["bank_sizes"]["random 1"]
    assert main(["scale", *map(str, source), "--how", "fixed", "--out", str(tmp_path / "fixed")]) == 0
    assert not Steering.load(tmp_path / "fixed").is_noop


def routed_to(model: PreTrainedModel, prompt: Tensor) -> list[set[int]]:
    """Per layer the experts that the routers choose for the last token of a prompt."""
    chosen: list[set[int]] = []
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda module, args, output: chosen.append(set(output[2].reshape(-1, 2)[-1].tolist()))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=prompt)
    for handle in handles:
        handle.remove()
    return chosen


def test_neurons_of_experts_that_no_example_was_routed_to_are_not_measured(
    setup: Setup, ranking: Ranking
) -> None:
    if setup.name != "qwen3_moe":
        assert ranking.neuron_examples is None
        assert "neurons_not_measured" not in (ranking.report or {})
        return
    model, tokenizer = text_models.load(setup.checkpoint)
    expected = torch.zeros(4, text_models.EXPERTS)
    for thing in text_models.THINGS[:RANKED]:
        prompt = text_models.prompt_ids(tokenizer, text_models.QUESTION.format(thing))
        for layer, experts in enumerate(routed_to(model, prompt)):
            expected[layer, list(experts)] += 1
    assert int((expected == 0).sum()) > 0
    assert ranking.neuron_examples is not None
    assert torch.equal(ranking.neuron_examples, expected.repeat_interleave(text_models.WIDTH, dim=1))
    assert ranking.report is not None
    assert ranking.report["experts_never_routed_to"] == int((expected == 0).sum())
    assert ranking.report["neurons_not_measured"] == int((expected == 0).sum()) * text_models.WIDTH
    selected = ranking.neurons(0.3)
    assert all(expected[layer, i // text_models.WIDTH] > 0 for layer, i in selected)
    with pytest.raises(HonesError, match=r"of the \d+ neurons that were measured"):
        ranking.neurons(1.0)


def test_random_banks_have_as_many_neurons_of_every_expert(setup: Setup, ranking: Ranking) -> None:
    banks = neuron_banks(ranking, 0.1, 3, 0)

    def by_expert(name: str) -> list[tuple[int, int]]:
        width = text_models.WIDTH if setup.name == "qwen3_moe" else 10**6
        return sorted((layer, i // width) for layer, i in banks[name])

    assert by_expert("random 1") == by_expert("random 3") == by_expert("selected")
    assert set(banks["random 1"]) != set(banks["selected"])


@pytest.mark.slow
def test_rank_names_what_was_not_measured_and_other_methods_do_too(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("activation", "dvp", "atp"):
        chosen = ["--method", method, "--limit", 1, "--heads", 4, "--neurons", 0.02]
        assert main(setup.command("rank", *chosen, "--out", tmp_path / method)) == 0
        line = "experts, to which no example was routed; they are never selected"
        assert (line in capsys.readouterr().out) == (setup.name == "qwen3_moe")
        found = Ranking.load(tmp_path / method)
        if found.neuron_examples is not None:
            assert found.neuron_scores is not None
            assert not bool(found.neuron_scores[found.neuron_examples == 0].any())
            assert line in (tmp_path / method / "index.html").read_text()
            assert all(found.neuron_examples[neuron] > 0 for neuron in found.neurons())
    stored = load_file(tmp_path / "atp" / "ranking.safetensors")
    assert bool(stored["neuron_scores"].any())


@pytest.mark.slow
def test_multiple_choice_is_ranked_and_verified(setup: Setup, tmp_path: Path) -> None:
    chosen = ["--method", "hones", "--limit", RANKED, "--heads", 4, "--neurons", 0.02]
    assert main(setup.command("rank", *chosen, "--out", tmp_path / "ranking", task="text_choice")) == 0
    ranking = Ranking.load(tmp_path / "ranking")
    assert ranking.report is not None
    assert ranking.report["metric"] == "acc"
    model, tokenizer = text_models.load(setup.checkpoint)
    right = []
    for i, thing in enumerate(text_models.THINGS[:RANKED]):
        prompt = text_models.prompt_ids(tokenizer, text_models.QUESTION.format(thing))
        losses = []
        for color in text_models.COLORS:
            ids = tokenizer(f" {color}", add_special_tokens=False).input_ids
            losses.append(-log_probability(model, prompt, ids) / len(ids))
        right.append(losses.index(min(losses)) == i % 3)
    assert ranking.report["base_metric"] == pytest.approx(sum(right) / RANKED)
    held_out = ["--ranking", tmp_path / "ranking", "--offset", RANKED, "--trials", 2]
    assert main(setup.command("verify", *held_out, "--out", tmp_path / "v", task="text_choice")) == 0


@pytest.mark.slow
def test_lmms_eval_runs_text_tasks_steered(setup: Setup, ranking: Ranking, tmp_path: Path) -> None:
    shape = ranking.provenance.shape
    generator = torch.Generator().manual_seed(3)
    neurons = 1 + torch.rand(shape.layers, shape.neurons, generator=generator)
    steering = Steering(1 + torch.rand(*SHAPE, generator=generator), neurons, ranking.provenance)
    steering.save(tmp_path / "steering")
    arguments = f"pretrained={setup.checkpoint},steering={tmp_path / 'steering'}"
    given = ["--model", "hones_hf", "--model_args", arguments, "--tasks", "text_own,text_choice"]
    given += ["--include_path", str(setup.tasks), "--log_samples", "--output_path", str(tmp_path / "logs")]
    ended = lmms_runs.run_command(given, tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (log,) = (tmp_path / "logs").rglob("*samples_text_own.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in log.read_text().splitlines()]
    model, tokenizer = text_models.load(setup.checkpoint)
    questions = [text_models.QUESTION.format(thing) for thing in text_models.THINGS]
    with he.steer(model, steering):
        expected = [text_models.answer(model, tokenizer, question) for question in questions]
    found = [entry[0] if isinstance(entry, list) else entry for entry in answers]
    assert found == expected
    assert found != [text_models.answer(model, tokenizer, question) for question in questions]
    assert list((tmp_path / "logs").rglob("*samples_text_choice.jsonl"))


def test_a_loaded_model_takes_its_tokenizer(setup: Setup) -> None:
    model, tokenizer = text_models.load(setup.checkpoint)
    loaded = he.load(model, tokenizer)
    examples = loaded.examples("text_own", include_path=setup.tasks, limit=2)
    expected = text_models.prompt_ids(tokenizer, text_models.QUESTION.format("cat"))
    assert torch.equal(examples[0].inputs["input_ids"], expected)
    assert examples[0].image_hashes == []
    assert len(examples.example_set().text_hashes) == 2


def test_a_question_with_an_image_is_refused_in_one_line(setup: Setup) -> None:
    lmm = load_lmm("hones_hf", f"pretrained={setup.checkpoint}")
    shown = [
        {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (8, 8))}]},
    ]
    with pytest.raises(HonesError, match="the model reads text alone: use a vision-language model"):
        lmm.inputs_of([shown])


def test_a_checkpoint_without_a_text_model_is_refused_in_one_line(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    with pytest.raises(HonesError, match="clip_vision_model, which in transformers is neither"):
        load_lmm("hones_hf", f"pretrained={tmp_path}")


@pytest.mark.slow
def test_a_model_that_is_damaged_by_hooks_is_ranked_as_one_with_damaged_weights(
    setup: Setup, ranking: Ranking
) -> None:
    """Damage and ranking find the experts on their own; the hooks of both have to act."""
    model = he.load(*text_models.load(setup.checkpoint))
    examples = model.examples("text_own", include_path=setup.tasks, limit=2)
    damage = scaling.fixed(ranking, 0.1, 0.2)
    found = []
    for attach in ("hook", "fold"):
        with he.steer(model.model, damage, attach):
            source = provenance(model.anatomy, examples, "hones", {}, 0)
            job = Discovery(model.replayer.unproven(), examples, model.loop, source, 3, 0.1)
            found.append(discover(job))
    by_hook, by_fold = found
    for name in ("head_scores", "head_log_probability", "neuron_scores"):
        first, other = getattr(by_hook, name), getattr(by_fold, name)
        torch.testing.assert_close(first, other, rtol=1e-3, atol=1e-5)
    undamaged = discover(dataclasses.replace(job, replayer=model.replayer.unproven()))
    assert by_hook.head_log_probability is not None
    assert undamaged.head_log_probability is not None
    assert not torch.allclose(by_hook.head_log_probability, undamaged.head_log_probability, rtol=1e-2)


@pytest.mark.slow
def test_spike_in_damages_and_repairs_experts(setup: Setup, ranking: Ranking) -> None:
    model = he.load(*text_models.load(setup.checkpoint))

    def part(offset: int, limit: int) -> Any:
        return model.examples("text_own", include_path=setup.tasks, offset=offset, limit=limit)

    job = SpikeIn(
        ranking,
        model.replayer,
        model.loop,
        discovery=part(6, 2),
        development=part(8, 2),
        test=part(10, 2),
        neurons=0.2,
        damp=0.01,
        method="dvp",
        ways=("fixed",),
        trials=1,
    )
    report = spike_in(job)
    planted = [Neuron(*site) for site in report["planted"]]
    assert planted == ranking.neurons(0.2)
    assert report["rows"][0]["value"] == report["undamaged"]  # the exact repair
    damage = scaling.scaled_neurons(ranking, planted, 0.01, {})
    under = AnswersUnder(model.replayer, job.test, {"damage": damage})
    answers = [under.measure(job.test[i]).record.answers["damage"] for i in range(2)]
    assert report["damaged"] == sum(a.result["exact_match"] for a in answers) / 2


def repository(config: str, splits: tuple[str, ...], content: bytes) -> dict[str, bytes]:
    """A data set of one configuration, whose splits all have the same rows."""
    files = {split: f"{config}/{split}-00000-of-00001.parquet" for split in splits}
    entries = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in files.items())
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{entries}---\n"
    return {"README.md": card.encode(), **dict.fromkeys(files.values(), content)}


@pytest.mark.slow
def test_built_in_text_tasks_are_ranked_and_run_steered(
    setup: Setup, ranking: Ranking, tmp_path: Path
) -> None:
    """lmms-eval's own arc_easy and a subject of mmlu, unmodified, with data of the real columns."""
    text, options = Value("string"), {"text": Sequence(Value("string")), "label": Sequence(Value("string"))}
    arc = [
        {
            "id": f"q{i}",
            "question": text_models.QUESTION.format(thing),
            "choices": {"text": ["red", "green", "blue", "white"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i, thing in enumerate(text_models.THINGS)
    ]
    mmlu = [
        {
            "question": row["question"],
            "choices": row["choices"]["text"],
            "answer": i % 4,
            "subject": "anatomy",
        }
        for i, row in enumerate(arc)
    ]
    arc_file = lmms_runs.parquet(arc, id=text, question=text, choices=options, answerKey=text)
    mmlu_file = lmms_runs.parquet(
        mmlu, question=text, choices=Sequence(text), answer=Value("int64"), subject=text
    )
    repositories = {
        "allenai/ai2_arc": repository("ARC-Easy", ("train", "validation", "test"), arc_file),
        "hails/mmlu_no_train": repository("anatomy", ("dev", "validation", "test"), mmlu_file),
    }
    fixed = scaling.fixed(ranking, 3.0, 0.2)
    fixed.save(tmp_path / "steering")
    model = ["--model", "hones_hf", "--model_args", f"pretrained={setup.checkpoint}"]
    sizes = ["--limit", "4", "--heads", "2", "--neurons", "0.02"]
    ranked = ["rank", "--method", "hones", *model, "--tasks", "arc_easy", *sizes, "--out", "arc"]
    model[-1] += ",steering=steering"
    steered = [*model, "--tasks", "arc_easy,mmlu_anatomy", "--log_samples", "--output_path", "logs"]
    with serving(repositories) as url:
        (ended,) = lmms_runs.run_each(lmms_runs.HONES_EVAL, [ranked], tmp_path, url)
        assert ended.status == 0, ended.stderr[-2000:]
        done = lmms_runs.run_command(steered, tmp_path, url)
        assert done.returncode == 0, done.stderr[-2000:]
    assert Ranking.load(tmp_path / "arc").report["metric"] == "acc"
    plain, tokenizer = text_models.load(setup.checkpoint)
    with he.steer(plain, fixed):
        for i, row in enumerate(arc):
            prompt = text_models.prompt_ids(tokenizer, f"Question: {row['question']}\nAnswer:")
            losses = []
            for option in row["choices"]["text"]:
                ids = answer_tokens(tokenizer, prompt[0].tolist(), option)
                losses.append(-log_probability(plain, prompt, ids) / len(ids))
            row["acc"] = float(losses.index(min(losses)) == i % 4)
    for task in ("arc_easy", "mmlu_anatomy"):
        (log,) = (tmp_path / "logs").rglob(f"*samples_{task}.jsonl")
        found = {line["doc_id"]: line["acc"] for line in map(json.loads, log.read_text().splitlines())}
        assert len(found) == 12
        if task == "arc_easy":
            assert found == {i: row["acc"] for i, row in enumerate(arc)}
