"""Retrieval by margins: `rank`, `verify`, `scale` and `lmms-eval` compared with single plain forwards."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import families
import plain
import pytest
import torch
import yaml
from drawn_data import write_folder
from lmms_runs import run_command
from margins import Slow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hones_eval.__main__ import main
from hones_eval.api import model as loading
from hones_eval.core.artifact import read_json
from hones_eval.core.ranking import Ranking
from hones_eval.core.steering import Steering
from hones_eval.errors import HonesError
from hones_eval.lmms.answers.margin import margin_after
from hones_eval.lmms.examples import TaskExamples
from hones_eval.runs import checkpoint
from hones_eval.runs.lightning import _Pass
from hones_eval.toy import checkpoint_path

PICTURES, CANDIDATES = 4, 16  # four pictures with five captions each: 1 + 15 candidates a query
HALF = 2 * CANDIDATES
HEADS, SHARE = 5, 0.05
FACTORS = (0.0, 3.0)


@dataclass
class Visit:
    """A family in an lmms-eval model, and the tokens with which Yes and No begin after its prompts."""

    model: str
    arguments: str
    words: tuple[str, str]
    folder: Path
    task: str = "hones_retrieval"
    candidates: int = CANDIDATES
    rows: str = "auto"

    def run(self, command: str, *more: str) -> int:
        given = ["--model", self.model, "--model_args", self.arguments, "--limit", str(2 * self.candidates)]
        # lmms-eval's own qwen2_5_vl loads bfloat16.
        return main([command, *given, "--dtype", "float32", "--batch_size", self.rows, *more])

    def rank(self, out: str, *more: str) -> Ranking:
        sizes = ["--method", "hones", "--heads", str(HEADS), "--neurons", str(SHARE)]
        arguments = ["--tasks", self.task, "--out", str(self.folder / out), *sizes, *more]
        assert self.run("rank", *arguments) == 0
        return Ranking.load(self.folder / out)

    @cached_property
    def ranking(self) -> Ranking:
        return self.rank("ranking")

    @cached_property
    def first(self) -> Slow:
        return self.slow(offset=0)

    @cached_property
    def second(self) -> Slow:
        return self.slow(offset=2 * self.candidates)

    def slow(self, offset: int) -> Slow:
        return Slow(self.model, self.arguments, self.task, self.words, 2 * self.candidates, offset)


@pytest.fixture(scope="module", autouse=True)
def drawn(tmp_path_factory: pytest.TempPathFactory, models_loaded_once: None) -> Iterator[None]:
    """The drawn images; every model is loaded once, by the real loader."""
    folder = write_folder(tmp_path_factory.mktemp("drawn") / "data", PICTURES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HONES_EVAL_DATA", str(folder))
        yield


@pytest.fixture(scope="module")
def visits(
    tmp_path_factory: pytest.TempPathFactory, llava_checkpoint: Path, qwen_checkpoint: Path
) -> dict[str, Visit]:
    folder = tmp_path_factory.mktemp("visits")
    gemma = families.save_checkpoint("gemma3", folder / "gemma3_checkpoint", seed=1)
    behind_a_colon, after_a_line = ("ĠYes", "ĠNo"), ("Yes", "No")
    return {
        "llava": Visit(
            "llava_hf", f"pretrained={llava_checkpoint}", behind_a_colon, folder / "llava", rows="3"
        ),
        "qwen2_5_vl": Visit(
            "qwen2_5_vl",
            f"pretrained={qwen_checkpoint},{families.WRAPPERS['qwen2_5_vl'][1]}",
            after_a_line,
            folder / "qwen",
        ),
        "gemma3": Visit(
            "hones_hf", f"pretrained={gemma},dtype=float32,device=cpu", after_a_line, folder / "gemma"
        ),
        "scenes": Visit(
            "llava_hf",
            f"pretrained={checkpoint_path()}",
            after_a_line,
            folder / "scenes",
            task="scenes_retrieval_margin_discovery",
            candidates=10,
        ),
    }


NAMES = ("llava", "qwen2_5_vl", "gemma3", "scenes")


@pytest.fixture(params=NAMES)
def visit(request: pytest.FixtureRequest, visits: dict[str, Visit]) -> Visit:
    return visits[request.param]


def test_heads_by_margins_are_those_of_plain_forwards(visit: Visit) -> None:
    slow, ranking = visit.first, visit.ranking
    base = slow.logits()
    assert ranking.report["metric"] == "ndcg_at_5"
    assert ranking.report["base_metric"] == pytest.approx(slow.ndcg(base))
    assert ranking.report["base_log_probability"] == pytest.approx(slow.log_probability(base), abs=1e-5)
    edits = plain.all_heads(slow.model)
    logits = {edit: slow.logits(edit) for edit in edits}
    drops = torch.tensor([slow.ndcg(base) - slow.ndcg(logits[edit]) for edit in edits])
    sure = [slow.log_probability(base) - slow.log_probability(logits[edit]) for edit in edits]
    torch.testing.assert_close(ranking.head_scores.flatten().double(), drops.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        ranking.head_log_probability.flatten().double(), torch.tensor(sure).double(), atol=1e-5, rtol=1e-4
    )
    assert len(set(drops.tolist())) > 1, "every head does the same: this shows nothing"
    assert ranking.report["prefix_sharing"] == "exact"
    assert ranking.report["examples_sharing_a_prefix"] == 2 * visit.candidates


def test_neurons_are_those_of_the_right_candidates(visit: Visit) -> None:
    slow, ranking = visit.first, visit.ranking
    right = [item for item, one in zip(slow.items, slow.right, strict=True) if one]
    items = [plain.Item(item.inputs, item.settings, slow.tokens[:1]) for item in right]
    chosen = sorted(plain.all_heads(slow.model), key=lambda e: -float(ranking.head_scores[e.layer, e.site]))
    weights = {
        edit: score
        for edit in chosen[:HEADS]
        if (score := float(ranking.head_scores[edit.layer, edit.site])) > 0
    }
    expected = plain.hones_neurons(slow.model, items, weights)
    torch.testing.assert_close(
        ranking.neuron_scores.double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-3
    )
    assert ranking.report["examples_of_neurons"] == 2


@pytest.mark.parametrize("name", NAMES[:3])
def test_masked_and_scaled_banks_are_those_of_plain_forwards(name: str, visits: dict[str, Visit]) -> None:
    visit = visits[name]
    slow, bank = visit.second, visit.ranking.neurons(SHARE)
    ranking, more = str(visit.folder / "ranking"), ["--tasks", visit.task, "--offset", str(HALF)]
    out = visit.folder / "verified"
    assert visit.run("verify", "--ranking", ranking, "--out", str(out), "--trials", "2", *more) == 0
    report = read_json(out / "verify.json")
    base, masked = slow.ndcg(slow.logits()), slow.ndcg(slow.steered(bank, 0.0))
    assert report["baseline"]["metric"] == pytest.approx(base)
    assert report["banks"]["selected"]["metric"] == pytest.approx(masked)
    assert report["banks"]["selected"]["metric_drop"]["value"] == pytest.approx(base - masked)
    grid = ["--how", "grid", "--factors", json.dumps(FACTORS), *more]
    assert visit.run("scale", "--ranking", ranking, "--out", str(visit.folder / "grid"), *grid) == 0
    settings = Steering.load(visit.folder / "grid").provenance.settings
    assert settings["baseline"] == pytest.approx(base)
    found = {float(factor): value for factor, value in settings["metric_by_factor"].items()}
    assert found == pytest.approx({one: slow.ndcg(slow.steered(bank, one)) for one in FACTORS})
    if name == "gemma3":
        return
    whole = ["--how", "search", "--groups", "1", *grid[2:]]
    assert visit.run("scale", "--ranking", ranking, "--out", str(visit.folder / "search"), *whole) == 0
    searched = Steering.load(visit.folder / "search").provenance.settings
    assert searched["best"] == pytest.approx(max(found.values()))
    learned = ["--how", "learned", "--epochs", "1", *more]
    assert visit.run("scale", "--ranking", ranking, "--out", str(visit.folder / "learned"), *learned) == 0
    steering = Steering.load(visit.folder / "learned")
    assert set(map(tuple, (steering.neuron_scales != 1).nonzero().tolist())) <= set(map(tuple, bank))
    (losses,) = steering.provenance.settings["epoch_losses"]
    # Steps of 5e-4 hardly change the scales: the mean loss is that of the unsteered model.
    assert losses["cross_entropy"] == pytest.approx(-slow.log_probability(slow.logits()), rel=0.02)


def test_lmms_eval_gives_the_same_margins_and_score(
    visits: dict[str, Visit], qwen_checkpoint: Path, tmp_path: Path
) -> None:
    """Steered wrappers of three families, and a stock wrapper, which answers in words."""
    qwen = replace(
        visits["qwen2_5_vl"],
        model="hones_hf",
        arguments=f"pretrained={qwen_checkpoint},dtype=float32,device=cpu",
        folder=tmp_path / "qwen",
    )
    ours = {"hones_llava": visits["llava"], "hones_hf": visits["gemma3"], "vseam_hf": qwen}
    runs = [("stock", "llava_hf", visits["llava"].arguments + ",device=cpu,device_map=cpu")]
    for name, visit in ours.items():
        steering = visit.folder / "fixed"
        assert visit.ranking.report["base_metric"] >= 0
        fixed = ["--how", "fixed", "--factor", "3", "--ranking", str(visit.folder / "ranking")]
        assert main(["scale", *fixed, "--out", str(steering)]) == 0
        runs.append((name, name, f"{visit.arguments},steering={steering}"))
    config = [
        {
            "model": model,
            "model_args": arguments,
            "tasks": "hones_retrieval",
            "limit": HALF,
            "log_samples": True,
            "output_path": name,
        }
        for name, model, arguments in runs
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = run_command(["--config", "config.yaml"], tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name, visit in ours.items():
        slow, bank = visit.first, visit.ranking.neurons(SHARE)
        logits = slow.steered(bank, 3.0)
        assert score(tmp_path / name, "ndcg_at_5") == pytest.approx(slow.ndcg(logits)), name
        (log,) = (tmp_path / name).glob("*/*_samples_*.jsonl")
        samples = [json.loads(line) for line in log.read_text().splitlines()]
        said = {one["doc_id"]: one["ndcg_at_5"]["score"] for one in samples}
        margins = torch.tensor([said[i] for i in range(HALF)]).double()
        expected = torch.tensor(slow.margins(logits)).double()
        torch.testing.assert_close(margins, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(expected, torch.tensor(slow.margins(slow.logits())).double(), atol=1e-2)
    assert 0 <= score(tmp_path / "stock", "ndcg_at_5_by_words") <= 1
    assert score(tmp_path / "stock", "ndcg_at_5") is None


def score(logs: Path, metric: str) -> float | None:
    (file,) = logs.glob("*/*_results.json")
    return json.loads(file.read_text())["results"]["hones_retrieval"].get(f"{metric},none")


def test_a_run_interrupted_within_a_query_ends_with_the_same_bytes(
    visits: dict[str, Visit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    visit, step = visits["llava"], _Pass.predict_step
    assert visit.ranking

    def interrupted(self: _Pass, *arguments: object) -> None:
        step(self, *arguments)
        if self.done == CANDIDATES + 5:
            raise HonesError("the power went")

    with monkeypatch.context() as broken:
        broken.setattr(_Pass, "predict_step", interrupted)
        arguments = ["--method", "hones", "--heads", str(HEADS), "--neurons", str(SHARE)]
        out = ["--out", str(visit.folder / "broken")]
        assert visit.run("rank", "--tasks", visit.task, *arguments, *out) == 1
    assert any((visit.folder / "broken" / "partial").iterdir())
    visit.rank("broken", "--resume")
    for file in ("ranking.json", "ranking.safetensors"):
        one, other = (visit.folder / run / file for run in ("ranking", "broken"))
        assert one.read_bytes() == other.read_bytes()


def test_a_screen_measures_margins_only_of_the_remaining_heads(visits: dict[str, Visit]) -> None:
    screened = visits["llava"].rank("screened", "--screen", "first_order", "--screen_share", "0.5")
    measured = screened.head_examples > 0
    assert 0 < int(measured.sum()) < measured.numel()
    torch.testing.assert_close(screened.head_scores[measured], visits["llava"].ranking.head_scores[measured])
    assert not screened.head_scores[~measured].any()


def test_ranks_share_queries_not_candidates(visits: dict[str, Visit]) -> None:
    lmm = loading.load_lmm("llava_hf", visits["llava"].arguments)
    examples = TaskExamples(lmm, "hones_retrieval", model_name="llava_hf", limit=3 * CANDIDATES + 7)
    queries = [
        list(range(i, min(i + CANDIDATES, len(examples)))) for i in range(0, len(examples), CANDIDATES)
    ]
    assert examples.share(0, 2) == queries[0] + queries[2]
    assert examples.share(1, 2) == queries[1] + queries[3]
    everywhere = [examples.share(rank, 9) for rank in range(9)]
    assert all(everywhere)
    assert sorted(index for mine in everywhere for index in mine) == list(range(len(examples)))
    for index in (CANDIDATES, CANDIDATES + 9, 2 * CANDIDATES - 1):
        assert [one.index for one in examples.with_same_images(index)] == queries[1]


def test_measuring_takes_one_group_per_query(
    visits: dict[str, Visit], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    together = TaskExamples.with_same_images

    def counted(self: TaskExamples, index: int) -> Any:
        groups.append(index)
        return together(self, index)

    monkeypatch.setattr(TaskExamples, "with_same_images", counted)
    visits["llava"].rank("counted")
    assert groups == [0, CANDIDATES]


@pytest.fixture(scope="module")
def spaced_checkpoint(tmp_path_factory: pytest.TempPathFactory, llava_checkpoint: Path) -> Path:
    """LLaVA with a tokenizer for which the space before a word is a separate token."""
    folder = tmp_path_factory.mktemp("spaced") / "llava"
    shutil.copytree(llava_checkpoint, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [one for one in merges if not "".join(one).startswith("Ġ")]
    assert len(content["model"]["merges"]) < len(merges)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_one_token_for_yes_and_no_is_refused(
    spaced_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    visit = Visit("llava_hf", f"pretrained={spaced_checkpoint}", ("", ""), tmp_path)
    arguments = ["--method", "hones", "--heads", str(HEADS), "--out", str(tmp_path / "out")]
    assert visit.run("rank", "--tasks", visit.task, *arguments) == 1
    (line,) = [one for one in capfd.readouterr().err.splitlines() if "begins both" in one]
    assert "hones_retrieval, doc_id 0" in line
    assert "begins both 'Yes' and 'No' with the token 'Ġ'" in line


def llama_style(merges: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A tokenizer with `▁` for a space, as in SentencePiece, and merges of these pairs."""
    letters = sorted({*"▁ASSISTANT:YesNo", "\n"})
    vocabulary = {"<s>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_a_separate_token_for_a_space_is_refused_and_a_word_with_its_space_is_not() -> None:
    words = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    bad = llama_style(words)
    prompt = bad.encode("ASSISTANT:", add_special_tokens=False)
    with pytest.raises(HonesError, match=rf"{type(bad).__name__} begins both 'Yes' and 'No' .* token '▁'"):
        margin_after(bad, prompt, ("Yes", "No"))
    good = llama_style([*words, ("▁", "Yes"), ("▁", "No")])
    found = margin_after(good, prompt, ("Yes", "No"))
    assert good.convert_ids_to_tokens([found.yes, found.no]) == ["▁Yes", "▁No"]
    behind_a_line = margin_after(bad, bad.encode("ASSISTANT:\n", add_special_tokens=False), ("Yes", "No"))
    assert bad.convert_ids_to_tokens([behind_a_line.yes, behind_a_line.no]) == ["Yes", "No"]
    logits = torch.zeros(len(good))
    logits[found.yes], logits[found.no] = 2.0, 0.5
    assert float(found.of(logits)) == 1.5
