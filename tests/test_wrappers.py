"""Steered wrappers: equal to the stock models without a steering, and failing where those hide errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import lmms_eval.models
import pytest
import torch
from lmms_eval import evaluator
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.models import MODEL_REGISTRY_V2 as REGISTRY
from lmms_eval.models.registry_v2 import ModelManifest, ModelRegistryV2
from lmms_eval.models.simple.llava_hf import LlavaHf
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_runs import write_steering, write_task
from loguru import logger

from hones_eval.errors import EditError, HonesError, MisfitError
from hones_eval.model_wrappers import families as steered_families
from hones_eval.model_wrappers import manifests, registry
from hones_eval.model_wrappers.any_base import steered_class
from hones_eval.model_wrappers.steered import Steered, inner_model
from hones_eval.model_wrappers.watch import WatchedGenerate

FAMILIES = ("llava", "qwen", "instructblip", "qwen3")
ON_CPU = ",device=cpu,device_map=cpu"
PROMPTS = {"llava": "One word for LLaVA.", "qwen": "One word for Qwen.", "qwen3": "Answer briefly."}


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("tiny") / "tasks")


@pytest.fixture(scope="session")
def checkpoints(
    llava_checkpoint: Path,
    qwen_checkpoint: Path,
    instructblip_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    qwen3 = families.save_checkpoint("qwen3_vl", tmp_path_factory.mktemp("checkpoints") / "qwen3_vl")
    found = (llava_checkpoint, qwen_checkpoint, instructblip_checkpoint, qwen3)
    return dict(zip(FAMILIES, found, strict=True))


@pytest.fixture(scope="session")
def steerings(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp("steerings") / family for family in FAMILIES}
    for family, folder in folders.items():
        write_steering(checkpoints[family], folder, seed=1)
    return folders


Evaluate = Callable[..., dict[int, Any]]


@pytest.fixture(scope="session")
def evaluate(tasks_folder: Path) -> Evaluate:
    """Evaluate a model by name as lmms-eval does; returns the samples by document."""

    def run(
        model: str, model_args: str, *, force_simple: bool = False, use_cache: str | None = None
    ) -> dict[int, Any]:
        manager = TaskManager(include_path=str(tasks_folder), include_defaults=False, model_name=model)
        results = evaluator.simple_evaluate(
            model=model,
            model_args=model_args,
            tasks=["tiny_colours"],
            task_manager=manager,
            limit=3,
            force_simple=force_simple,
            use_cache=use_cache,
            log_samples=True,
            bootstrap_iters=0,
        )
        return {sample["doc_id"]: sample for sample in results["samples"]["tiny_colours"]}

    return run


def texts(samples: dict[int, Any]) -> list[str]:
    return [samples[doc_id]["filtered_resps"][0] for doc_id in sorted(samples)]


def asked(samples: dict[int, Any]) -> list[str]:
    return [samples[doc_id]["arguments"][0] for doc_id in sorted(samples)]


@pytest.mark.parametrize("force_simple", [False, True], ids=["chat", "simple"])
@pytest.mark.parametrize(
    ("family", "base", "ours"),
    [
        ("llava", "llava_hf", "hones_llava"),
        ("qwen", "qwen2_5_vl", "vseam_qwen2_5_vl"),
        ("qwen3", "qwen3_vl", "hones_qwen3_vl"),
    ],
)
def test_stock_answers_without_a_steering_and_others_with_one(
    evaluate: Evaluate,
    checkpoints: dict[str, Path],
    steerings: dict[str, Path],
    family: str,
    base: str,
    ours: str,
    force_simple: bool,
) -> None:
    pretrained = f"pretrained={checkpoints[family]}"
    stock = evaluate(base, pretrained + ON_CPU, force_simple=force_simple)
    baseline = evaluate(ours, pretrained, force_simple=force_simple)
    assert texts(baseline) == texts(stock)
    assert all(texts(stock))
    assert asked(baseline) == asked(stock)
    assert PROMPTS[family] in asked(stock)[0]

    steered = evaluate(ours, f"{pretrained},steering={steerings[family]}", force_simple=force_simple)
    assert texts(steered) != texts(stock)
    assert asked(steered) == asked(stock)


def test_instructblip_answers_as_stock_but_without_the_prompt(
    evaluate: Evaluate, checkpoints: dict[str, Path], steerings: dict[str, Path]
) -> None:
    pretrained = f"pretrained={checkpoints['instructblip']}"
    stock = evaluate("instructblip", f"{pretrained},device=cpu")
    baseline = evaluate("hones_instructblip", pretrained)
    assert all(text.startswith(prompt) for text, prompt in zip(texts(stock), asked(stock), strict=True))
    cut = [text[len(prompt) :].strip() for text, prompt in zip(texts(stock), asked(stock), strict=True)]
    assert texts(baseline) == cut
    assert all(texts(baseline))
    steered = evaluate("vseam_instructblip", f"{pretrained},steering={steerings['instructblip']}")
    assert texts(steered) != texts(baseline)


def test_any_base_is_steered_like_a_class_of_this_package(
    evaluate: Evaluate, checkpoints: dict[str, Path], steerings: dict[str, Path]
) -> None:
    """A base without a class in this package, of which lmms-eval has only a simple form."""
    name = "llava_hf_plain"
    REGISTRY.register_manifest(
        ModelManifest(name, simple_class_path="lmms_eval.models.simple.llava_hf.LlavaHf"), overwrite=True
    )
    pretrained = f"pretrained={checkpoints['llava']}"
    steering = f"{pretrained},steering={steerings['llava']}"
    stock = evaluate(name, pretrained + ON_CPU)
    baseline = evaluate("hones", f"base={name},{pretrained}")
    assert (texts(baseline), asked(baseline)) == (texts(stock), asked(stock))
    steered = evaluate("vseam", f"base={name},{steering},attach=fold")
    assert texts(steered) != texts(stock)
    assert asked(steered) == asked(stock)


def test_a_family_is_one_row_of_the_registry_also_where_its_wrapper_takes_only_chats(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = registry.Family("llava_hf", chat="lmms_eval.models.chat.llava_hf.LlavaHf", own_likelihoods=False)
    monkeypatch.setitem(registry.FAMILIES, "chat_only", row)
    (manifest,) = [one for one in manifests() if one.model_id == "hones_chat_only"]
    assert manifest.simple_class_path is None
    own = ModelRegistryV2()
    own.register_manifest(manifest)
    model = own.get_model_class("vseam_chat_only", force_simple=True)
    assert not model.is_simple
    assert model.base_wrapper == "llava_hf"
    lm = model.create_from_arg_string(f"pretrained={checkpoints['llava']}")
    assert isinstance(lm, Steered)
    with pytest.raises(AttributeError, match="no steered class 'chat_only_simple'"):
        steered_families.chat_only_simple  # noqa: B018


def test_a_base_with_a_class_of_this_package_is_that_class(
    evaluate: Evaluate, checkpoints: dict[str, Path], steerings: dict[str, Path]
) -> None:
    steering = f"pretrained={checkpoints['llava']},steering={steerings['llava']}"
    generic, own = evaluate("hones", f"base=llava_hf,{steering}"), evaluate("hones_llava", steering)
    assert (texts(generic), asked(generic)) == (texts(own), asked(own))
    assert "One word for LLaVA." in asked(generic)[0]


def test_strength_zero_is_the_baseline(
    evaluate: Evaluate, checkpoints: dict[str, Path], steerings: dict[str, Path]
) -> None:
    pretrained = f"pretrained={checkpoints['llava']}"
    none = evaluate("hones_llava", f"{pretrained},steering={steerings['llava']},strength=0")
    assert texts(none) == texts(evaluate("hones_llava", pretrained))


class Careless(LlavaHf):
    """A wrapper that swallows every exception, including interrupts."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        try:
            return super().generate_until(requests)
        except:  # noqa: E722
            return [""] * len(requests)


class Skipping(LlavaHf):
    """A wrapper that answers without calling the model when it cannot load an image."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        return ["", *super().generate_until(requests[1:])]


class Shrugging(LlavaHf):
    """A wrapper that continues without an image that it cannot read, and only logs the error."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        logger.error("Failed to process visual: truncated file")
        return super().generate_until(requests)


class SteeredShrugging(Steered, Shrugging):
    base_wrapper = "llava_hf"


class SteeredCareless(Steered, Careless):
    base_wrapper = "llava_hf"


class SteeredSkipping(Steered, Skipping):
    base_wrapper = "llava_hf"


@pytest.fixture
def build(checkpoints: dict[str, Path], tasks_folder: Path) -> Callable[..., tuple[Any, list[Any]]]:
    """Build a wrapper from its class and keyword arguments, with the task's requests."""

    def make(cls: type, **kwargs: Any) -> tuple[Any, list[Any]]:
        lm = cls(pretrained=str(checkpoints["llava"]), **kwargs)
        manager = TaskManager(include_path=str(tasks_folder), include_defaults=False, model_name="llava_hf")
        kind = "simple" if lm.is_simple else "chat"
        task = get_task_dict(["tiny_colours"], manager, kind)["tiny_colours"]
        task.build_all_requests(limit=2, rank=0, world_size=1)
        lm.task_dict["tiny_colours"] = task.dataset
        return lm, task.instances

    return make


Build = Callable[..., tuple[Any, list[Any]]]


@pytest.fixture(params=[True, False], ids=["simple", "chat"])
def llava(request: pytest.FixtureRequest) -> type:
    cls: type = lmms_eval.models.get_model("hones_llava", force_simple=request.param)
    return cls


def failing(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the device\ncaught fire")


def test_a_failing_generate_is_an_error_that_names_the_document(build: Build, llava: type) -> None:
    lm, requests = build(llava)
    lm._watched._generate = failing
    with pytest.raises(HonesError, match="task tiny_colours, doc 0: RuntimeError: the device caught fire"):
        lm.generate_until(requests)
    (kept,) = lm.record.errors
    assert (kept["task"], kept["doc_id"]) == ("tiny_colours", 0)


def test_the_stock_wrapper_answers_a_failing_generate_with_nothing(build: Build) -> None:
    """The reason for the guard. When this test fails, lmms-eval no longer hides such errors."""
    lm, requests = build(LlavaHf, device="cpu", device_map="cpu")
    lm.model.generate = failing
    assert lm.generate_until(requests) == ["", ""]


def test_a_wrapper_that_swallows_everything_still_fails(build: Build) -> None:
    lm, requests = build(SteeredCareless)
    lm._watched._generate = failing
    with pytest.raises(HonesError, match="caught fire"):
        lm.generate_until(requests)


def test_an_answer_without_a_call_of_the_model_is_an_error(build: Build) -> None:
    lm, requests = build(SteeredSkipping)
    with pytest.raises(HonesError, match="answered 1 of 2 requests without calling the model"):
        lm.generate_until(requests)


def test_an_error_that_is_only_logged_is_an_error(build: Build) -> None:
    lm, requests = build(SteeredShrugging)
    with pytest.raises(HonesError, match="Failed to process visual: truncated file"):
        lm.generate_until(requests)


def test_an_image_that_cannot_be_loaded_is_an_error(build: Build) -> None:
    lm, requests = build(SteeredCareless)

    def missing(doc: Any) -> None:
        raise FileNotFoundError("no such picture")

    context, settings, _, *place = requests[1].args
    requests[1].arguments = (context, settings, missing, *place)
    with pytest.raises(HonesError, match="doc 1: FileNotFoundError: no such picture"):
        lm.generate_until(requests)


def test_requests_are_not_modified(build: Build, llava: type) -> None:
    """`llava_hf` writes into gen_kwargs, which are part of the key under which lmms-eval caches answers."""
    lm, requests = build(llava)
    before = [next(part.copy() for part in one.args if isinstance(part, dict)) for one in requests]
    lm.generate_until(requests)
    assert [next(part for part in one.args if isinstance(part, dict)) for one in requests] == before


@pytest.mark.parametrize("force_simple", [False, True], ids=["chat", "simple"])
def test_the_cache_answers_a_second_run(
    evaluate: Evaluate,
    checkpoints: dict[str, Path],
    steerings: dict[str, Path],
    force_simple: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = f"pretrained={checkpoints['llava']},steering={steerings['llava']}"
    settings: dict[str, Any] = {"force_simple": force_simple, "use_cache": str(tmp_path / "cache")}
    first = evaluate("hones_llava", arguments, **settings)
    monkeypatch.setattr(WatchedGenerate, "__call__", failing)
    # Empty answers are never cached; the second run would fail at the first of them.
    assert all(texts(first))
    assert texts(evaluate("hones_llava", arguments, **settings)) == texts(first)
    assert len(registry.latest_record._fingerprints()["tiny_colours"]) == 3


def test_other_weights_at_the_same_path_get_no_cached_answers(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is replaced in place between two runs that share a cache."""
    folder, cache = tmp_path / "model", str(tmp_path / "cache")
    families.save_checkpoint("llava", folder)
    before = evaluate("hones_llava", f"pretrained={folder}", use_cache=cache)
    families.save_checkpoint("llava", folder, seed=5)
    after = evaluate("hones_llava", f"pretrained={folder}", use_cache=cache)
    fresh = evaluate("hones_llava", f"pretrained={folder}")
    assert texts(fresh) != texts(before)
    assert texts(after) == texts(fresh)


def test_the_key_of_cached_answers_names_the_commit_of_a_hub_model(build: Build, llava: type) -> None:
    lm, _ = build(llava)
    before = lm.fingerprint
    inner_model(lm).config._commit_hash = "c0ffee"
    assert lm.fingerprint == f"{before}-c0ffee"


def test_a_steering_that_changes_no_logit_is_an_error(
    build: Build, llava: type, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    write_steering(checkpoints["llava"], tmp_path / "ones", seed=0, spread=0.0)
    lm, requests = build(llava, steering=str(tmp_path / "ones"))
    with pytest.raises(HonesError, match="changes no logit of the first input"):
        lm.generate_until(requests)
    allowed, requests = build(llava, steering=str(tmp_path / "ones"), allow_noop=True)
    baseline, _ = build(llava)
    assert answers_of(allowed, requests) == answers_of(baseline, requests)


def test_a_steering_that_changes_no_logit_ends_an_evaluation(
    evaluate: Evaluate, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    write_steering(checkpoints["llava"], tmp_path / "ones", seed=0, spread=0.0)
    pretrained = f"pretrained={checkpoints['llava']}"
    with pytest.raises(HonesError, match="changes no logit of the first input"):
        evaluate("hones_llava", f"{pretrained},steering={tmp_path / 'ones'}")
    allowed = evaluate("hones_llava", f"{pretrained},steering={tmp_path / 'ones'},allow_noop=true")
    assert texts(allowed) == texts(evaluate("hones_llava", pretrained))


class Scoring(LlavaHf):
    """Log-likelihoods by one forward pass each; those of `llava_hf` fail on transformers 5."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        scored = []
        for _, choice, visual, doc_id, task, split in [request.args for request in requests]:
            pictures = visual(self.task_dict[task][split][doc_id])
            inputs = self._image_processor(text=f"<image>\n{choice}", images=pictures, return_tensors="pt")
            with torch.inference_mode():
                output = self.model(**inputs, labels=inputs["input_ids"])
            scored.append((-float(output.loss), False))
        return scored


class SteeredScoring(Steered, Scoring):
    base_wrapper = "llava_hf"


def likelihoods(requests: list[Any]) -> list[Instance]:
    """The requests of a multiple-choice task on the images of `requests`, with two choices per image."""
    asked = []
    for request in requests:
        context, _, visual, doc_id, task, split = request.args
        asked += [
            Instance(
                request_type="loglikelihood",
                arguments=(context, choice, visual, doc_id, task, split),
                idx=k,
                metadata={"task": task, "doc_id": doc_id, "repeats": 1},
            )
            for k, choice in enumerate(("red", "green"))
        ]
    return asked


@pytest.mark.parametrize("attach", ["hook", "fold"])
def test_log_likelihoods_prove_that_the_steering_acts(
    build: Build, checkpoints: dict[str, Path], steerings: dict[str, Path], tmp_path: Path, attach: str
) -> None:
    """A task of log-likelihoods alone never calls `generate`."""
    write_steering(checkpoints["llava"], tmp_path / "ones", seed=0, spread=0.0)
    idle, requests = build(SteeredScoring, steering=str(tmp_path / "ones"), attach=attach)
    asked = likelihoods(requests)
    with pytest.raises(HonesError, match=r"doc 0: the steering changes no logit of the first input"):
        idle.loglikelihood(asked)
    plain = build(Scoring, device="cpu", device_map="cpu")[0].loglikelihood(asked)
    allowed, _ = build(SteeredScoring, steering=str(tmp_path / "ones"), attach=attach, allow_noop=True)
    baseline, _ = build(SteeredScoring)
    assert pairs(allowed.loglikelihood(asked)) == pairs(baseline.loglikelihood(asked)) == plain

    steering = str(steerings["llava"])
    proven, _ = build(SteeredScoring, steering=steering, attach=attach)
    unproven, _ = build(SteeredScoring, steering=steering, allow_noop=True)
    first, found = pairs(proven.loglikelihood(asked[:1])), pairs(proven.loglikelihood(asked))
    assert found == pairs(unproven.loglikelihood(asked)) != plain
    assert first == found[:1]


def pairs(results: list[GenerationResult]) -> list[tuple[float, bool]]:
    """In the form that lmms-eval's evaluator keeps: it converts a plain pair to text."""
    return [unwrap_generation_output(one)[0] for one in results]


def answers_of(lm: Any, requests: list[Any]) -> list[str]:
    return [getattr(answer, "text", answer) for answer in lm.generate_until(requests)]


@pytest.mark.parametrize("attach", ["hook", "fold"])
def test_the_steering_is_attached_again_after_the_proof(
    build: Build, llava: type, steerings: dict[str, Path], attach: str
) -> None:
    """The first call detaches the steering and attaches it again; answers must not depend on that."""
    steering = str(steerings["llava"])
    proven, requests = build(llava, steering=steering, attach=attach)
    unproven, _ = build(llava, steering=steering, attach="hook", allow_noop=True)
    assert answers_of(proven, requests) == answers_of(unproven, requests)


def test_a_steering_that_did_not_run_is_an_error(
    build: Build, llava: type, steerings: dict[str, Path]
) -> None:
    lm, requests = build(llava, steering=str(steerings["llava"]), allow_noop=True)
    lm._watched._generate = lambda **kwargs: kwargs["input_ids"]
    with pytest.raises(HonesError, match="edits never ran"):
        lm.generate_until(requests)


@pytest.mark.parametrize("attach", ["hook", "fold"])
def test_clean_restores_the_model(build: Build, llava: type, steerings: dict[str, Path], attach: str) -> None:
    lm, requests = build(llava, steering=str(steerings["llava"]), attach=attach)
    stock, _ = build(llava)
    model, stock_model = inner_model(lm), inner_model(stock)
    lm.generate_until(requests)
    lm.clean()
    assert "generate" not in model.__dict__
    assert not any(module._forward_pre_hooks for module in model.modules())
    for (name, mine), theirs in zip(model.named_parameters(), stock_model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert inner_model_or_none(lm) is None


def inner_model_or_none(lm: Any) -> Any:
    try:
        return inner_model(lm)
    except HonesError:
        return None


def test_invalid_settings_are_refused(
    build: Build, llava: type, steerings: dict[str, Path], tmp_path: Path
) -> None:
    steering = str(steerings["llava"])
    for wrong, message in (
        ({"steering": ""}, "steering= is empty: give a folder or a hub id, or leave it out"),
        ({"strength": "strong"}, "strength='strong' should be a number"),
        ({"attach": "glue"}, "attach='glue' is unknown: use hook or fold"),
        ({"allow_noop": "maybe"}, "allow_noop='maybe' should be true or false"),
        ({"steering": str(tmp_path / "nowhere")}, "no steering at"),
    ):
        with pytest.raises(HonesError, match=message):
            build(llava, **({"steering": steering} | wrong))
    with pytest.raises(HonesError, match="strength=2 says how strongly a steering acts: give steering= too"):
        build(llava, strength=2)
    with pytest.raises(MisfitError, match="does not fit"):
        build(llava, steering=str(steerings["instructblip"]))
    with pytest.raises(HonesError, match="has no argument 'sterring': did you mean steering"):
        build(llava, sterring=steering)


def test_invalid_bases_are_refused() -> None:
    with pytest.raises(HonesError, match="did you mean llava_hf"):
        steered_class("lava_hf")
    with pytest.raises(HonesError, match="not a model of lmms-eval"):
        steered_class("hones_llava")
    with pytest.raises(HonesError, match="needs base="):
        lmms_eval.models.get_model("hones").create_from_arg_string("pretrained=x")


def test_a_wrapper_without_a_model_is_refused() -> None:
    class Silent(Steered, lmms_eval.models.get_model("dummy")):  # type: ignore[misc]
        base_wrapper = "dummy"

    with pytest.raises(HonesError, match="holds no Hugging Face model"):
        Silent()


def test_edit_errors_are_hones_errors() -> None:
    """The error for a steering without effect is shown as one line, like every HonesError."""
    assert issubclass(EditError, HonesError)
