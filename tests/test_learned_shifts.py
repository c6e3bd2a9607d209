"""Learned shifts, compared with a plain loop over hooks of its own and with finite differences."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import own_answers
import plain
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import steer
from hones_eval.core.scope import answer_follows
from hones_eval.core.sites import Head, Neuron
from hones_eval.core.steering import Steering
from hones_eval.engine.decoding import Decoder
from hones_eval.engine.replay import Replayer
from hones_eval.jobs.learn import FitSettings, fit
from hones_eval.jobs.tune import _sizes
from hones_eval.lmms.examples import Example, TaskExamples, inner_model, load_lmm
from hones_eval.methods.learning import AnswerLoss, LearnedScales
from hones_eval.runs.lightning import Loop
from hones_eval.toy import checkpoint_path

BANK = [Head(0, 1), Neuron(0, 3), Head(3, 0), Neuron(2, 7), Neuron(2, 2)]
COUNT = 6


@pytest.fixture(scope="module")
def own(llava_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> own_answers.Prepared:
    return own_answers.prepared(tmp_path_factory.getbasetemp(), f"pretrained={llava_checkpoint}")


@pytest.fixture(scope="module")
def lmm(own: own_answers.Prepared) -> Any:
    return load_lmm(own_answers.MODEL, own.model_args)


@pytest.fixture(scope="module")
def examples(lmm: Any, own: own_answers.Prepared) -> TaskExamples:
    return TaskExamples(
        lmm, "own_a", model_name=own_answers.MODEL, include_path=own.tasks, offset=4, limit=COUNT
    )


@pytest.fixture(scope="module")
def replayer(lmm: Any) -> Replayer:
    return Replayer(Anatomy.of(inner_model(lmm)))


@contextmanager
def changed(model: Any, scales: Sequence[Tensor], shifts: Sequence[Tensor]) -> Iterator[None]:
    """Scale and shift every site of the bank by hooks that treat one site after the other."""

    def hook(layer: int, kind: type, width: int) -> Any:
        def change(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            parts = list(args[0].split(width, dim=-1))
            for site, scale, shift in zip(BANK, scales, shifts, strict=True):
                if site.layer == layer and isinstance(site, kind):
                    parts[site[1]] = parts[site[1]] * scale + shift
            return (torch.cat(parts, -1),)

        return change

    handles = []
    for layer, block in enumerate(plain.layers(model)):
        width = block.self_attn.o_proj.in_features // plain.head_count(model)
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(hook(layer, Head, width)))
        handles.append(block.mlp.down_proj.register_forward_pre_hook(hook(layer, Neuron, 1)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_loss(model: Any, example: Example) -> Tensor:
    """Mean cross-entropy of the target's tokens after the prompt."""
    longer = plain.with_answer(model, example.inputs, example.target_ids)
    prompt = example.inputs["input_ids"].shape[1]
    logits = model(**longer).logits[0, prompt - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(example.target_ids))


def keep(kept: dict[tuple[type, int], Tensor], place: tuple[type, int]) -> Any:
    """A hook that keeps the input of a linear layer under a name."""
    return lambda _, args: kept.update({place: args[0][0]})


def plain_sizes(model: Any, examples: TaskExamples) -> list[float]:
    """The root mean square of each site's activation at the last prompt token and the target's tokens."""
    squares: list[list[Tensor]] = [[] for _ in BANK]
    for index in range(len(examples)):
        example = examples[index]
        longer = plain.with_answer(model, example.inputs, example.target_ids)
        first = example.inputs["input_ids"].shape[1] - 1
        kept: dict[tuple[type, int], Tensor] = {}
        handles = []
        for layer, block in enumerate(plain.layers(model)):
            for kind, module in ((Head, block.self_attn.o_proj), (Neuron, block.mlp.down_proj)):
                handles.append(module.register_forward_pre_hook(keep(kept, (kind, layer))))
        with torch.no_grad():
            model(**longer)
        for handle in handles:
            handle.remove()
        for number, site in enumerate(BANK):
            x = kept[type(site), site.layer]
            width = x.shape[-1] // plain.head_count(model) if isinstance(site, Head) else 1
            # The end of an answer is predicted too, from its last token, unless three tokens leave no room.
            count = min(3, len(example.target_ids) + 1)
            own = x[first : first + count, site[1] * width : (site[1] + 1) * width]
            squares[number].append(own.square().flatten())
    return [float(torch.cat(own).mean().sqrt()) for own in squares]


def plain_fit(
    model: Any, examples: TaskExamples, settings: FitSettings, units: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """Learned scales and shifts of the bank, by AdamW steps that are written out."""
    width = plain.layers(model)[0].self_attn.o_proj.in_features // plain.head_count(model)
    a = [torch.zeros(1, requires_grad=True) for _ in BANK]
    c = [torch.zeros(width if isinstance(site, Head) else 1, requires_grad=True) for site in BANK]
    optimizer = torch.optim.AdamW([*a, *c], lr=settings.learning_rate, weight_decay=0)
    steps = settings.epochs * math.ceil(len(examples) / settings.accumulate)
    done = 0
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(settings.seed + epoch)
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), settings.accumulate):
            members = order[start : start + settings.accumulate]
            rate = settings.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done / steps)) / 2)
            optimizer.param_groups[0]["lr"] = rate
            shifts = [own * unit for own, unit in zip(c, units, strict=True)]
            with changed(model, [1 + own for own in a], shifts):
                loss = torch.stack([plain_loss(model, examples[index]) for index in members]).mean()
            total = sum(own.square().sum() for own in (*a, *c)) / sum(own.numel() for own in (*a, *c))
            optimizer.zero_grad()
            (loss + settings.penalty * total).backward()
            norm = torch.cat([own.grad for own in (*a, *c)]).norm()
            for own in (*a, *c):
                own.grad.mul_(min(1.0, settings.clip_norm / float(norm + 1e-6)))
            optimizer.step()
            with torch.no_grad():
                for own in (*a, *c):
                    own.copy_(own.sign() * (own.abs() - rate * settings.sparsity).clamp(min=0))
                for own in a:
                    own.clamp_(settings.floor, settings.limit)
                for own in c:
                    own.clamp_(-settings.limit, settings.limit)
            done += 1
    model.zero_grad()
    return [(1 + own).detach() for own in a], [
        (own * unit).detach() for own, unit in zip(c, units, strict=True)
    ]


def test_scales_and_shifts_make_the_same_steps_as_a_plain_loop(
    replayer: Replayer, examples: TaskExamples
) -> None:
    """Also with the smallest scale and the largest shift that are allowed, and with weak sites held back."""
    model, units = replayer.anatomy.model, [0.5, 2.0, 1.0, 0.25, 1.0]
    settings = FitSettings(beta=0, learning_rate=0.3, limit=0.4, floor=-0.1, sparsity=0.1, penalty=0.01)
    loop = Loop("cpu", progress=False)
    found = fit(replayer, examples, BANK, settings, loop, units=torch.tensor(units)).learned
    scales, shifts = plain_fit(model, examples, settings, units)
    assert found.head_shifts is not None
    assert found.neuron_shifts is not None
    expected = [torch.ones_like(found.head_scales), torch.ones_like(found.neuron_scales)]
    added = [torch.zeros_like(found.head_shifts), torch.zeros_like(found.neuron_shifts)]
    for site, scale, shift in zip(BANK, scales, shifts, strict=True):
        kind = isinstance(site, Neuron)
        expected[kind][site] = scale
        added[kind][site] = shift if isinstance(site, Head) else shift[0]
    torch.testing.assert_close([found.head_scales, found.neuron_scales], expected, rtol=0, atol=3e-4)
    torch.testing.assert_close([found.head_shifts, found.neuron_shifts], added, rtol=0, atol=3e-4)
    # The test is informative: shifts moved, one up to the limit in its unit, and a scale down to the floor.
    relative = torch.cat([s.abs() / unit for s, unit in zip(shifts, units, strict=True)])
    assert float(relative.max()) == pytest.approx(0.4)
    assert float(relative[relative > 0].min()) < 0.35
    assert min(float(scale) for scale in scales) == pytest.approx(0.9)


def test_the_gradient_of_a_shift_is_its_finite_difference(
    replayer: Replayer, examples: TaskExamples, own: own_answers.Prepared
) -> None:
    """At the tokens of a scope alone; the losses of the differences are those of stored steerings."""
    scoped, example = replayer.in_scope("last+generated"), examples[0]
    model, units = replayer.anatomy.model, torch.tensor([0.5, 2.0, 1.0, 0.25, 1.0])
    scales = LearnedScales(scoped.anatomy, BANK, units)
    scales.a.data.copy_(torch.rand(len(scales.a), generator=torch.Generator().manual_seed(0)) - 0.5)
    AnswerLoss(scales, Decoder(scoped), beta=0.0, penalty=0.0)(example).total.backward()
    gradient, at = scales.a.grad.clone(), scales.a.detach().clone()

    @torch.no_grad()
    def loss() -> float:
        learned, anatomy = scales.learned(), replayer.anatomy
        empty = Steering.by_hand(anatomy)
        steering = Steering(*learned[:2], empty.provenance, *learned[2:])
        answer = example.target_ids[:-1]
        longer = plain.with_answer(model, example.inputs, answer)
        prompt = example.inputs["input_ids"].shape[1]
        with steer(model, steering, scope="last+generated"), answer_follows(model, len(answer)):
            logits = model(**longer).logits[0, prompt - 1 :]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(example.target_ids)))

    largest = float(gradient.abs().max())
    for number in range(len(at)):
        values = []
        for step in (0.02, -0.02):
            scales.a.data.copy_(at)
            scales.a.data[number] += step
            values.append(loss())
        assert (values[0] - values[1]) / 0.04 == pytest.approx(float(gradient[number]), abs=0.02 * largest)
    assert bool((gradient[len(BANK) :].abs() > 0.05 * largest).any())


def test_a_unit_is_the_usual_size_of_the_activation(replayer: Replayer, examples: TaskExamples) -> None:
    """At the tokens by which the answer, and where it fits its end, are predicted; never 0."""
    model = replayer.anatomy.model
    found = _sizes(replayer, examples, Loop("cpu", progress=False))
    everything = [site for site in BANK if isinstance(site, Neuron)]
    assert torch.equal(found.units(everything), torch.stack([found.neurons[site] for site in everything]))
    assert found.units(BANK).tolist() == pytest.approx(plain_sizes(model, examples), rel=1e-4)
    assert len({len(examples[index].target_ids) for index in range(COUNT)}) > 1, (
        "some have no room for an end"
    )
    assert bool((found.heads > 0).all())
    assert bool((found.neurons > 0).all())


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a constant added to the output of each head of its first layer.

    Its `o_proj` has a bias, which holds what the constants write.
    """
    folder = tmp_path_factory.mktemp("shifted")
    shutil.copytree(checkpoint_path(), folder / "whole")
    config = AutoConfig.from_pretrained(checkpoint_path())
    config.text_config.attention_bias = True
    model = AutoModelForImageTextToText.from_pretrained(checkpoint_path(), config=config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "language_model" in name and name.endswith("bias"):
            nn.init.zeros_(parameter)
    model.save_pretrained(folder / "whole")
    model = AutoModelForImageTextToText.from_pretrained(folder / "whole", dtype=torch.float32)
    drawn = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    added = {(0, head): drawn[head] for head in range(8)}
    Steering.by_hand(model, head_shifts=added).save(folder / "steering")
    flags = ["--steering", folder / "steering", "--to", "checkpoint", "--out", folder / "shifted"]
    assert main(["export", *map(str, flags)]) == 0
    return folder / "shifted"


@pytest.mark.slow
def test_the_command_repairs_shifted_heads(
    shifted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out loss chooses heads with shifts, the answers get better, and an export has the repair."""
    here = ["--model", "llava_hf", "--model_args", f"pretrained={shifted}"]
    here += ["--tasks", "scenes_vqa_relation_discovery"]
    assert (
        main(["rank", "--method", "random", *here, "--limit", "2", "--out", str(tmp_path / "ranking")]) == 0
    )
    flags = ["--ranking", str(tmp_path / "ranking"), "--offset", "2", "--limit", "12", "--how", "tuned"]
    flags += ["--tuned_sites", "heads", "--shifts", "--out", str(tmp_path / "out")]
    assert main(["scale", *here, *flags]) == 0
    said = capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "steering.json").read_text())["settings"]
    losses = settings["held_out_loss_by_kind_rate_and_epoch"]
    assert {name.split(", ")[0] for name in losses} == {"heads", "heads with shifts"}
    best = min(losses, key=losses.__getitem__)
    assert settings["kind"] == best.split(", ")[0] == "heads with shifts"
    assert losses[best] < 0.5 * settings["held_out_loss_without"]
    assert settings["shifts"]
    assert settings["best"] > settings["baseline"]
    steering = Steering.load(tmp_path / "out")
    assert steering.head_shifts is not None
    assert steering.neuron_shifts is None
    count = int((steering.head_shifts != 0).any(-1).sum())
    assert settings["shifted_sites"] == count > 0
    assert f"{count} heads and 0 neurons are shifted" in said
    assert f"{count} are shifted, by at most" in said
    export = ["--steering", str(tmp_path / "out"), "--to", "checkpoint", "--out", str(tmp_path / "repaired")]
    assert main(["export", *export]) == 0
    ids = torch.randint(4, 190, (1, 12), generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (shifted, tmp_path / "repaired"):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad(), steer(model, steering) if folder == shifted else nullcontext():
            logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


def test_shifts_are_refused_for_other_ways_and_by_an_export_without_a_place(
    own: own_answers.Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranking = ["--ranking", own.rankings / "hones"]
    for how in ("fixed", "learned", "halving"):
        assert main(own.command("scale", *ranking, "--how", how, "--shifts", "--out", tmp_path / "no")) == 1
        said = own_answers.complaint(capsys.readouterr().err)
        assert f"--shifts only applies to --how tuned, not to {how}" in said
    assert not (tmp_path / "no").exists()
