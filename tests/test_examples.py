"""Examples: the arguments that a wrapper passes to `generate`, its decoding, and the task's scores."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_data import write_folder
from lmms_eval import evaluator
from loguru import logger

from hones_eval.errors import HonesError, TaskError, UnsupportedModelError
from hones_eval.lmms.answers.margin import MarginRecorder, as_answer
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.lmms.playback import Playback

WRAPPERS = {"llava_hf": "llava", "qwen2_5_vl": "qwen2_5_vl", "instructblip": "instructblip"}
GREEDY = "max_new_tokens=6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("drawn"), 6)


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(folder))


@pytest.fixture(scope="module")
def lmms(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def load(wrapper: str) -> Any:
        if wrapper not in loaded:
            fixture = {"llava": "llava", "qwen2_5_vl": "qwen", "instructblip": "instructblip"}
            checkpoint = request.getfixturevalue(f"{fixture[WRAPPERS[wrapper]]}_checkpoint")
            loaded[wrapper] = load_lmm(wrapper, f"pretrained={checkpoint}")
        return loaded[wrapper]

    return load


@pytest.fixture
def llava(lmms: Callable[[str], Any]) -> Any:
    return lmms("llava_hf")


@pytest.fixture(scope="module")
def vqa(lmms: Callable[[str], Any], folder: Path) -> Iterator[TaskExamples]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HONES_EVAL_DATA", str(folder))
        yield TaskExamples(lmms("llava_hf"), "hones_vqa", model_name="llava_hf", gen_kwargs=GREEDY)


class Spied:
    """The real `generate`, which keeps its arguments and outputs."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.generate = model.generate

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        output = self.generate(**kwargs)
        self.calls.append((kwargs, output))
        return output


def asked_for(examples: TaskExamples) -> list[Any]:
    """The requests' generation settings, which wrappers modify."""
    return [one for request in examples._requests for one in request.args if isinstance(one, dict)]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_recorded_inputs_and_decoding_are_those_of_the_stock_wrapper(
    wrapper: str, lmms: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lmm = lmms(wrapper)
    examples = TaskExamples(lmm, "hones_ocr", model_name=wrapper, limit=3, gen_kwargs=GREEDY)
    asked = copy.deepcopy(asked_for(examples))
    spied = Spied(inner_model(lmm))
    monkeypatch.setattr(inner_model(lmm), "generate", spied, raising=False)
    stock = lmm.generate_until(copy.deepcopy(examples._requests))
    monkeypatch.undo()
    by_picture = {float(call["pixel_values"].sum()): (call, output) for call, output in spied.calls}
    assert len(by_picture) == len(examples) == 3
    for example, answer in zip((examples[i] for i in range(3)), stock, strict=True):
        call, output = by_picture[float(example.inputs["pixel_values"].sum())]
        recorded = example.inputs | example.settings
        assert recorded.keys() == call.keys()
        assert all(same(recorded[key], call[key]) for key in call)
        assert not example.inputs.keys() & {"use_cache", "max_new_tokens", "do_sample", "eos_token_id"}
        new = output[0, call["input_ids"].shape[1] :].tolist()
        text = getattr(answer, "text", answer)
        decoded = examples.decode(example.index, new)
        assert decoded.strip()
        if wrapper == "instructblip":  # the stock one puts the prompt in front of its answer
            assert text.startswith("Transcribe the text")
            assert text.endswith(decoded)
            assert text != decoded
        else:
            assert decoded == text
    assert asked_for(examples) == asked


def test_inputs_and_settings_are_separate_and_generate_takes_both(vqa: TaskExamples, llava: Any) -> None:
    example = vqa[1]
    assert set(example.inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert example.settings["max_new_tokens"] == 6
    assert example.settings["do_sample"] is False
    model = inner_model(llava)
    assert model(**example.inputs).logits.shape[:2] == example.inputs["input_ids"].shape
    assert "generate" not in vars(model)


def test_positional_and_renamed_inputs_are_recorded_by_name(llava: Any, vqa: TaskExamples) -> None:
    example = vqa[0]
    ids, rest = example.inputs["input_ids"], {k: v for k, v in example.inputs.items() if k != "input_ids"}
    for call in (lambda m: m.generate(ids, **rest), lambda m: m.generate(inputs=ids, **rest)):
        wrapper = Wrapper(inner_model(llava), call)
        recorded = Playback(wrapper).record(vqa._requests[0])
        assert recorded.inputs.keys() == example.inputs.keys()
        assert torch.equal(recorded.inputs["input_ids"], ids)


class Wrapper:
    """An lmms-eval model whose answering function is given."""

    def __init__(self, model: Any, call: Callable[[Any], Any]) -> None:
        self.model, self.call = model, call

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [str(self.call(self.model)) for _ in requests]


def test_an_error_names_a_wrapper_that_cannot_be_recorded(llava: Any, vqa: TaskExamples) -> None:
    ids = vqa[0].inputs["input_ids"]

    def fails(model: Any) -> str:
        raise RuntimeError("out of\nmemory")

    def swallows(model: Any) -> str:
        model.generate(input_ids=ids)
        logger.error("Error list index out of range in generating")
        return ""

    for call, says in (
        (fails, "Wrapper failed: RuntimeError: out of memory"),
        (swallows, "answered after an error: Error list index"),
        (lambda model: "", "never called `generate` of its Llava"),
        (
            lambda model: [model.generate(input_ids=ids), model.generate(input_ids=ids)],
            "2 times for one request",
        ),
        (lambda model: model.generate(input_ids=ids, num_beams=4), "num_beams=4"),
    ):
        with pytest.raises(TaskError, match="hones_vqa.*" + says) as caught:
            Playback(Wrapper(inner_model(llava), call)).record(vqa._requests[0])
        assert "\n" not in str(caught.value)
    assert "generate" not in vars(inner_model(llava))


@pytest.mark.parametrize("task", ["hones_vqa", "hones_caption", "hones_ocr", "hones_retrieval"])
def test_scores_are_those_of_lmms_evals_evaluator(
    task: str, llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = TaskExamples(llava, task, model_name="llava_hf", limit=12)
    golds = [examples._gold.of(request.doc_id).references[0] for request in examples._requests]
    answers = [gold if i % 3 else "Yes" for i, gold in enumerate(golds)]
    if isinstance(examples.recorder, MarginRecorder):
        answers = [as_answer(text, examples.recorder.words) for text in answers]
    monkeypatch.setattr(llava, "generate_until", lambda requests: [answers[r.doc_id] for r in requests])
    monkeypatch.setattr(llava, "clean", lambda: None)
    theirs = evaluator.evaluate(llava, {task: examples._task}, limit=12, bootstrap_iters=0)
    assert theirs is not None
    ours = [examples.score(i, text) for i, text in enumerate(answers)]
    logged = sorted(theirs["samples"][task], key=lambda one: one["doc_id"])
    assert [one[examples.metric] for one in logged] == [one[examples.metric] for one in ours]
    assert theirs["results"][task][f"{examples.metric},none"] == examples.aggregate(ours)
    assert 0.2 < examples.aggregate(ours) < 1


def test_the_gold_answers_score_near_the_maximum(vqa: TaskExamples) -> None:
    results = [vqa.score(i, vqa[i].references[0]) for i in range(len(vqa))]
    assert vqa.aggregate(results) > 0.8
    assert vqa.metric == "vqa_accuracy"
    assert vqa.higher_is_better


def test_targets_are_encoded_alone_and_captions_joined(llava: Any) -> None:
    example = TaskExamples(llava, "hones_caption", model_name="llava_hf")[2]
    assert len(example.references) == 5
    assert example.target == " ".join(example.references)
    assert example.target_ids == llava.tokenizer.encode(example.target, add_special_tokens=False)[:128]


def test_answers_are_remembered(vqa: TaskExamples, monkeypatch: pytest.MonkeyPatch) -> None:
    first = vqa.decode(0, [30, 31, 32])
    monkeypatch.setattr(vqa, "_playback", None)
    assert vqa.decode(0, [30, 31, 32]) == first


def test_limit_and_offset_choose_documents(llava: Any) -> None:
    some = TaskExamples(llava, "hones_vqa", model_name="llava_hf", limit=2, offset=3)
    assert [some[i].doc_id for i in range(len(some))] == [3, 4]
    with pytest.raises(IndexError):
        some[2]
    for arguments, says in (
        ({"offset": 6}, "6 examples; offset=6 leaves none"),
        ({"limit": 0}, "limit=0 leaves"),
    ):
        with pytest.raises(TaskError, match=says):
            TaskExamples(llava, "hones_vqa", model_name="llava_hf", **arguments)


def test_the_hash_of_examples_depends_on_images_prompts_and_documents(
    llava: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(task: str = "hones_vqa", **arguments: Any) -> Any:
        return TaskExamples(llava, task, model_name="llava_hf", **arguments).example_set()

    whole, again = named(), named()
    assert whole == again
    assert whole.doc_ids == list(range(6))
    assert len(set(whole.image_hashes)) == 6
    assert whole.shared_images(named(limit=2)) == set(whole.image_hashes[:2])
    changed = write_folder(tmp_path / "changed", 6, first_question="Is it red?")
    monkeypatch.setenv("HONES_EVAL_DATA", str(changed))
    other_prompt = named()
    assert other_prompt.image_hashes == whole.image_hashes
    shutil.copy(changed / "images" / "drawn_1.png", changed / "images" / "drawn_0.png")
    other_picture = named()
    monkeypatch.undo()
    hashes = [one.hash for one in (whole, named(limit=5), other_prompt, other_picture)]
    assert len(set(hashes)) == 4


def test_an_error_names_a_corrupt_image(
    llava: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    picture = broken / "images" / "drawn_1.png"
    picture.write_bytes(picture.read_bytes()[:200])
    monkeypatch.setenv("HONES_EVAL_DATA", str(broken))
    examples = TaskExamples(llava, "hones_vqa", model_name="llava_hf")
    assert examples[0].target
    with pytest.raises(TaskError, match=r"hones_vqa, doc_id 1: .*drawn_1.png cannot be read"):
        examples[1]


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("hones_vqs", "no task named 'hones_vqs': did you mean .*hones_vqa"),
        # `lmms-eval tasks list` would leave out the tasks of this package, as it loads no plug-in.
        ("qqqq", "no task named 'qqqq': `lmms-eval --tasks list` shows all"),
        ("vqav2", "group of several tasks; choose one of: vqav2_test, vqav2_val"),
        ("mmsearch_end2end", "output_type generate_until_multi_round; only tasks with one answer"),
    ],
)
def test_tasks_that_cannot_be_measured_are_refused(llava: Any, task: str, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        TaskExamples(llava, task, model_name="llava_hf")


def test_sampling_is_refused_with_the_way_out(llava: Any) -> None:
    examples = TaskExamples(
        llava, "hones_vqa", model_name="llava_hf", gen_kwargs="temperature=0.7,do_sample=True"
    )
    with pytest.raises(TaskError, match=r"do_sample=True.*--gen_kwargs do_sample=False"):
        examples[0]


OWN_TASK = """task: own_colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.drawn
doc_to_text: "{{question}}"
doc_to_target: "%s"
generation_kwargs: {max_new_tokens: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list: [{name: low, filter: [{function: lowercase}, {function: take_first}]}]
"""


def own_task(folder: Path, target: str) -> Path:
    folder.mkdir()
    rows = [
        {"question": f"What is {i}?", "colour": ["red", "blue"][i % 2], "gold": "wrong"} for i in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(OWN_TASK % target)
    (folder / "pictures.py").write_text(
        "from PIL import Image\n\ndef drawn(doc):\n    return [Image.new('RGB', (40, 40), doc['colour'])]\n\n"
        "def clip(doc):\n    return ['clip.mp4']\n"
    )
    clip = OWN_TASK.replace("own_colours", "own_clip").replace("pictures.drawn", "pictures.clip")
    (folder / "clip.yaml").write_text(clip % target)
    return folder


def test_a_metric_whose_direction_is_not_stated_is_better_if_higher(llava: Any, tmp_path: Path) -> None:
    folder = own_task(tmp_path / "own", "colour")
    text = OWN_TASK.replace(
        "exact_match, aggregation: mean, higher_is_better: true", "right, aggregation: mean"
    )
    text += "process_results: !function pictures.process\n"
    (folder / "own.yaml").write_text(text % "colour")
    with (folder / "pictures.py").open("a") as file:
        file.write("\ndef process(doc, results):\n    return {'right': float(results[0] == doc['colour'])}\n")
    examples = TaskExamples(llava, "own_colours", model_name="llava_hf", include_path=folder)
    assert examples.metric == "right"
    assert examples.higher_is_better


def test_a_users_own_task_and_its_mistakes(llava: Any, tmp_path: Path) -> None:
    def build(include_path: Path, **arguments: Any) -> TaskExamples:
        return TaskExamples(
            llava, "own_colours", model_name="llava_hf", include_path=include_path, **arguments
        )

    good = own_task(tmp_path / "good", "colour")
    examples = build(good)
    assert [examples[i].target for i in range(4)] == ["red", "blue", "red", "blue"]
    assert examples[0].image_hashes == examples[2].image_hashes != examples[1].image_hashes

    assert [examples.score(0, text)["exact_match"] for text in ("RED", "RED.")] == [1.0, 0.0]

    clips = TaskExamples(llava, "own_clip", model_name="llava_hf", include_path=good)
    with pytest.raises(TaskError, match="own_clip, doc_id 0: it shows video; only tasks with images"):
        clips[0]
    with pytest.raises(TaskError, match="columns are question, colour, gold"):
        build(good, target="{{question}}")
    (good / "more.yaml").write_text("task: other\nmetric_list: [\n")
    with pytest.raises(TaskError, match=r"more.yaml, line 3: not valid YAML"):
        build(good)
    with pytest.raises(TaskError, match="nowhere is not a folder"):
        build(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("task", "judge"),
    [("llava_in_the_wild", "openai"), ("mmvet", "openai")],
)
def test_tasks_that_ask_a_remote_model_are_refused_before_their_data_is_fetched(
    llava: Any, task: str, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(TaskError, match=rf"task {task} is scored by a remote model \(.*({judge}).*\)"):
        TaskExamples(llava, task, model_name="llava_hf")


def test_models_are_found_by_name(tmp_path: Path) -> None:
    with pytest.raises(HonesError, match="no model named 'lava_hf': did you mean llava_hf"):
        load_lmm("lava_hf", "pretrained=x")
    with pytest.raises(HonesError, match=f"llava_hf cannot be built from model_args 'pretrained={tmp_path}'"):
        load_lmm("llava_hf", f"pretrained={tmp_path}")
    with pytest.raises(HonesError, match="pretrained=/nowhere: no such folder"):
        load_lmm("llava_hf", "pretrained=/nowhere")
    with pytest.raises(HonesError, match="'pretrained' should have the form name=value"):
        load_lmm("llava_hf", "pretrained")


def test_a_model_that_cannot_generate_is_refused(llava: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"the LlavaModel of .* cannot generate"):
        inner_model(Wrapper(inner_model(llava).model, lambda model: ""))
    with pytest.raises(UnsupportedModelError, match="no Hugging Face model"):
        inner_model(Wrapper(None, lambda model: ""))


def test_a_launched_process_loads_its_model_alone(
    llava_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    lmm = load_lmm("llava_hf", f"pretrained={llava_checkpoint}")
    assert (lmm.rank, lmm.world_size) == (0, 1)
    assert not torch.distributed.is_initialized()
    assert {name: os.environ[name] for name in launched} == launched
    assert "MASTER_PORT" not in os.environ


def test_photographs(llava: Any, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(photos))
    examples = TaskExamples(llava, "hones_vqa", model_name="llava_hf", gen_kwargs=GREEDY)
    assert len(examples) == 10
    model = inner_model(llava)
    results = []
    for i in range(2):
        example = examples[i]
        output = model.generate(**example.inputs, **example.settings)
        text = examples.decode(i, output[0, example.inputs["input_ids"].shape[1] :].tolist())
        stock = llava.generate_until(copy.deepcopy(examples._requests[i : i + 1]))[0].text
        assert text == stock
        results.append(examples.score(i, text))
    assert 0 <= examples.aggregate(results) <= 1
    assert len(set(examples.example_set().image_hashes)) == 10
