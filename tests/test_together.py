"""Questions about one image, checked together under every edit, equal the same questions one by one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import plain
import pytest
import torch
from datasets import Image, Value
from lmms_runs import parquet
from own_answers import UTILS, YAML

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.ranking import Ranking
from hones_eval.engine.replay import Replayer
from hones_eval.lmms.answers import together
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.methods.localization import HeadLocalization
from hones_eval.runs.measure import Measurement
from hones_eval.toy import checkpoint_path
from hones_eval.toy.documents import documents

MODEL_ARGS = f"pretrained={checkpoint_path()},device=cpu"
IMAGES, QUESTIONS = 2, 5


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of several questions per image. Most gold answers are of another image, and so are wrong."""
    folder = tmp_path_factory.mktemp("questions")
    asked = documents("vqa_attribute", "plain", "test", IMAGES * QUESTIONS)
    rows = [
        {
            "image": PIL.Image.fromarray(asked[i // QUESTIONS].pixels),
            "question": document.prompt,
            "answer": document.answer,
        }
        for i, document in enumerate(asked)
    ]
    data = folder / "questions.parquet"
    data.write_bytes(parquet(rows, image=Image(), question=Value("string"), answer=Value("string")))
    (folder / "questions.yaml").write_text(YAML.format(name="questions", data=data))
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.fixture(autouse=True)
def short_prompts_are_shared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image has only 16 tokens here."""
    monkeypatch.setattr(together, "SAVING", 1.0)


@pytest.fixture(scope="module")
def lmm() -> Iterator[Any]:
    return load_lmm("llava_hf", MODEL_ARGS)


def measured(lmm: Any, tasks: Path, share: bool) -> tuple[list[Measurement], int]:
    """All examples by heads, and the tokens that passed FFNs, proofs included."""
    model = inner_model(lmm)
    examples = TaskExamples(lmm, "questions", model_name="llava_hf", include_path=tasks)
    localization = HeadLocalization(Replayer(Anatomy.of(model)), examples)
    localization.run = localization.run._replace(share=share)
    tokens = 0

    def add(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        nonlocal tokens
        tokens += args[0].shape[:-1].numel()

    handles = [layer.mlp.register_forward_pre_hook(add) for layer in plain.layers(model)]
    found = [localization.measure(examples[i]) for i in range(len(examples))]
    for handle in handles:
        handle.remove()
    assert localization.run.sharing.inexact is None
    return found, tokens


@torch.no_grad()
def test_shared_questions_give_the_same_with_fewer_tokens(lmm: Any, tasks: Path) -> None:
    alone, many = measured(lmm, tasks, share=False)
    shared, few = measured(lmm, tasks, share=True)
    for i, (one, other) in enumerate(zip(alone, shared, strict=True)):
        for name in ("metric", "metric_drop", "differing_answers", "measured"):
            assert torch.equal(one.sums[name], other.sums[name]), (i, name)
        for name in ("log_probability", "log_probability_drop"):
            torch.testing.assert_close(one.sums[name], other.sums[name], atol=1e-4, rtol=1e-5)
        assert bool(other.sums["shared"]) == (i % QUESTIONS > 0)
    assert sum(float(one.sums["differing_answers"]) for one in shared[1:]) > 0, "no answer had to be decoded"
    assert few < many


@torch.no_grad()
def test_groups_whose_answers_often_change_or_that_share_little_are_measured_one_by_one(
    lmm: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FEW", -1), ("SAVING", 0.1)):
        with monkeypatch.context() as patch:
            patch.setattr(together, name, value)
            found, _ = measured(lmm, tasks, share=True)
        assert not any(bool(one.sums["shared"]) for one in found)


@torch.no_grad()
def test_groups_are_cut_to_fit_into_memory(lmm: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = measured(lmm, tasks, share=True)
    sizes: list[int] = []
    ours = together.Together._of_prefix

    def counted(self: Any, run: Any, questions: Any, numbers: Any) -> Any:
        sizes.append(len(questions))
        return ours(self, run, questions, numbers)

    monkeypatch.setattr(together.Together, "_of_prefix", counted)
    monkeypatch.setattr(together, "MEMORY", 1)
    cut, _ = measured(lmm, tasks, share=True)
    assert sizes == [2, 2] * IMAGES
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one.sums["metric_drop"], other.sums["metric_drop"])


def test_rank_shares_questions_and_says_so(tasks: Path, tmp_path: Path) -> None:
    shared = ["rank", "--method", "hones", "--model", "llava_hf", "--model_args", MODEL_ARGS]
    shared += ["--tasks", "questions", "--include_path", str(tasks), "--heads", "2", "--out", str(tmp_path)]
    assert main(shared) == 0
    report = Ranking.load(tmp_path).report
    assert report is not None
    assert report["prefix_sharing"] == "exact"
    assert report["examples_sharing_a_prefix"] == IMAGES * (QUESTIONS - 1)
