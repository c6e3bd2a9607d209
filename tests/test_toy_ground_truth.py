"""The stored ground truth is that of the shipped model, and any of its entries can be had by a plain loop."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from scipy.stats import rankdata

from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples, inner_model, load_lmm
from hones_eval.toy import checkpoint_path
from hones_eval.toy.ground_truth import FOLDER, TASKS, load_ground_truth, make_ground_truth
from hones_eval.toy.yardstick import agreement, captured_effect, masking_area


def test_it_is_of_the_shipped_model() -> None:
    truth = load_ground_truth()
    weights = (checkpoint_path() / "model.safetensors.sha256").read_text().split()[0]
    assert truth.report["checkpoint_sha256"] == weights
    assert set(truth.effects) == set(TASKS)
    assert any(bool(effects["neurons"].metric.any()) for effects in truth.effects.values())


def test_entries_equal_a_plain_loop() -> None:
    """The head and the neuron that matter most, each zeroed by a hook of its own."""
    task = "vqa_attribute"
    truth = load_ground_truth()
    about = truth.report["tasks"][task]
    lmm = load_lmm("llava_hf", f"pretrained={checkpoint_path()}", device="cpu")
    model = inner_model(lmm)
    examples = TaskExamples(lmm, about["task"], model_name="llava_hf", limit=about["examples"])
    assert examples.example_set().hash == about["examples_hash"]
    items = [examples[i] for i in range(len(examples))]
    layers = model.get_decoder().layers
    width = layers[0].self_attn.o_proj.in_features // model.config.text_config.num_attention_heads

    def metric(module: torch.nn.Module | None, part: slice) -> float:
        def zero(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            x = args[0].clone()
            x[..., part] = 0
            return (x,)

        handle = module.register_forward_pre_hook(zero) if module is not None else None
        results = []
        for item in items:
            output = model.generate(**item.inputs, **item.settings)
            new = output[0, item.inputs["input_ids"].shape[1] :].tolist()
            results.append(examples.score(item.index, examples.decode(item.index, new)))
        if handle is not None:
            handle.remove()
        return examples.aggregate(results)

    base = metric(None, slice(0))
    assert base == pytest.approx(about["base_metric"])
    for kind in ("heads_by_zero", "neurons"):
        drops = truth.effects[task][kind].metric
        layer, site = divmod(int(drops.argmax()), drops.shape[1])
        module = layers[layer].self_attn.o_proj if kind != "neurons" else layers[layer].mlp.down_proj
        part = slice(site * width, (site + 1) * width) if kind != "neurons" else slice(site, site + 1)
        assert base - metric(module, part) == pytest.approx(float(drops[layer, site]), abs=1e-6)
        assert drops[layer, site] > 0


def test_margins_equal_a_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truth of two examples, made by the command's function: its largest effects by hooks of their own."""
    make_ground_truth(tmp_path, ["vqa_relation"], 2, checkpoint_path())
    truth = load_ground_truth(tmp_path)
    lmm = load_lmm("llava_hf", f"pretrained={checkpoint_path()}", device="cpu")
    model = inner_model(lmm)
    examples = TaskExamples(lmm, "scenes_vqa_relation_discovery", model_name="llava_hf", limit=2)
    layers = model.get_decoder().layers

    def margins(module: torch.nn.Module | None, part: slice) -> list[float]:
        def zero(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            x = args[0].clone()
            x[..., part] = 0
            return (x,)

        handle = module.register_forward_pre_hook(zero) if module is not None else None
        found = []
        for item in (examples[0], examples[1]):
            target = list(item.target_ids)
            ids = torch.cat([item.inputs["input_ids"], torch.tensor([target[:-1]], dtype=torch.long)], dim=1)
            given = item.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = model(**given).logits[0, -len(target) :].double()
            rows = [
                row[token] - torch.cat([row[:token], row[token + 1 :]]).max()
                for row, token in zip(logits, target, strict=True)
            ]
            found.append(float(sum(rows)))
        if handle is not None:
            handle.remove()
        return found

    base = margins(None, slice(0))
    for kind, width in (("heads_by_zero", 16), ("neurons", 1)):
        effects = truth.effects["vqa_relation"][kind]
        assert effects.margin is not None
        layer, site = divmod(int(effects.margin.argmax()), effects.margin.shape[1])
        module = layers[layer].self_attn.o_proj if width > 1 else layers[layer].mlp.down_proj
        edited = margins(module, slice(site * width, (site + 1) * width))
        drops = torch.tensor(base) - torch.tensor(edited)
        assert float(drops.mean()) == pytest.approx(float(effects.margin[layer, site]), abs=1e-4)
        assert float(drops.std() / 2**0.5) == pytest.approx(
            float(effects.errors["margin"][layer, site]), abs=1e-4
        )
        even, odd = effects.halves["margin"]
        assert [float(even[layer, site]), float(odd[layer, site])] == pytest.approx(drops.tolist(), abs=1e-4)
    capsys.readouterr()
    make_ground_truth(tmp_path, ["vqa_relation"], 2, checkpoint_path())
    assert "already measured on these examples" in capsys.readouterr().out


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "truth")
    header = json.loads((tmp_path / "truth" / "ground_truth.json").read_text())
    header["digest"] = "0" * 64
    (tmp_path / "truth" / "ground_truth.json").write_text(json.dumps(header))
    with pytest.raises(HonesError, match=r"does not match the digest in ground_truth\.json"):
        load_ground_truth(tmp_path / "truth")


def test_agreement_by_hand() -> None:
    truth = torch.tensor([[0.0, 0.3, 0.1], [0.2, 0.2, -0.1]])
    scores = torch.tensor([[0.0, 9.0, 1.0], [5.0, 4.0, 7.0]])
    found = agreement(scores, truth, 2)
    # The top two of the truth are 0.3 and either 0.2; the scores choose 0.3 and -0.1.
    assert found.precision == 0.5
    ranks = [rankdata(values.flatten()) for values in (scores, truth)]
    assert found.rank_correlation == pytest.approx(
        float(torch.corrcoef(torch.tensor([*map(list, ranks)]))[0, 1])
    )
    assert agreement(truth, truth, 3).precision == 1.0
    with pytest.raises(HonesError, match="no order to compare"):
        agreement(torch.ones(2, 3), truth, 2)
    with pytest.raises(HonesError, match="different shapes"):
        agreement(torch.ones(2, 2), truth, 2)


def test_captured_effect_by_hand() -> None:
    truth = torch.tensor([[0.4, 0.3, 0.2], [0.0, -0.5, 0.1]])
    scores = torch.tensor([[9.0, 0.0, 8.0], [0.0, 7.0, 1.0]])
    # Selected: 0.4, 0.2 and -0.5, which counts as 0; the best three are 0.4, 0.3 and 0.2.
    assert captured_effect(scores, truth, 3).share == pytest.approx(0.6 / 0.9)
    assert captured_effect(truth, truth, 3).share == 1.0
    first, second = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 2.0, 5.0]])
    # One half chooses 3 and 2 and gets 1 + 2 of 5 + 2; the other chooses 5 and 2 and gets 1 + 2 of 3 + 2.
    found = captured_effect(first, first, 2, (first, second))
    assert found.ceiling == pytest.approx((3 / 7 + 3 / 5) / 2)
    with pytest.raises(HonesError, match="this truth is flat"):
        captured_effect(scores, -truth.abs(), 3)
    with pytest.raises(HonesError, match="k must be 1 to 6"):
        captured_effect(scores, truth, 7)


def test_stored_spreads_belong_to_the_stored_means() -> None:
    """Tasks measured on 200 images: the halves average to the mean, and errors are those of a mean."""
    truth = load_ground_truth()
    wide = [task for task, about in truth.report["tasks"].items() if about["examples"] >= 200]
    assert wide
    for task in wide:
        for effects in truth.effects[task].values():
            even, odd = effects.halves["log_probability"]
            torch.testing.assert_close((even + odd) / 2, effects.log_probability, rtol=1e-4, atol=1e-6)
            assert bool((effects.errors["log_probability"] >= 0).all())
            assert bool(((even - odd).abs() <= 20 * effects.errors["log_probability"] + 1e-6).all())


def test_masking_area_by_hand() -> None:
    area, drops = masking_area(torch.zeros(3, 4), lambda count: count / 4, [1, 2, 4])
    assert drops == [0.25, 0.5, 1.0]
    # Equal steps of log k: the mean of the two trapezia.
    assert area == pytest.approx(((0.25 + 0.5) / 2 + (0.5 + 1.0) / 2) / 2)
    with pytest.raises(HonesError, match="ascend"):
        masking_area(torch.zeros(3, 4), lambda count: 0.0, [2, 1])
