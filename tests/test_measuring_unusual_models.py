"""Compiled models and models with offloaded layers are measured as the same model is otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import hones_eval as he
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.attach import steer
from hones_eval.core.export import export_checkpoint, export_ia3
from hones_eval.core.steering import Steering
from hones_eval.engine.activations import VIEWS, LayerViews
from hones_eval.engine.passes import FullPasses
from hones_eval.engine.patching import Patch, Patcher
from hones_eval.engine.replay import Replayer, trial_edits
from hones_eval.errors import HonesError
from hones_eval.toy import checkpoint_path

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
DISCOVERY = "scenes_vqa_relation_discovery"
EVERYTHING = ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]
Load = Callable[[Path, Path], PreTrainedModel]


def whole(checkpoint: Path, folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval()


def offloaded(checkpoint: Path, folder: Path) -> PreTrainedModel:
    """Every layer is on disk until it is called."""
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, device_map=dict.fromkeys(EVERYTHING, "disk"), offload_folder=folder
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    return model.eval()


def compiled(checkpoint: Path, folder: Path) -> PreTrainedModel:
    """Compiled and called once, so that there is code that knows of no hook."""
    model = whole(checkpoint, folder)
    model.compile(backend="eager")
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    return model


UNUSUAL = [offloaded, compiled]


def inputs(colour: str) -> Any:
    return families.build("llava").inputs("what is this?", [Image.new("RGB", (30, 30), colour)])


def edited_logits(passes: Any, anatomy: Anatomy) -> Tensor:
    edits = trial_edits(anatomy.shape)
    found = {row.edits[0]: row.logits for row in passes.edited(edits)}
    return torch.cat([logits for _, logits in sorted(found.items(), key=lambda pair: pair[0][:2])])


@pytest.mark.parametrize("load", UNUSUAL)
def test_replay_patching_and_lens_are_those_of_the_whole_model(
    load: Load, llava_checkpoint: Path, tmp_path: Path
) -> None:
    plain = Anatomy.of(whole(llava_checkpoint, tmp_path))
    anatomy = Anatomy.of(load(llava_checkpoint, tmp_path))
    red, blue = inputs("red"), inputs("blue")
    replayer = Replayer(anatomy, rows=1)
    replay = replayer.record(red, 2)
    assert replayer.inexact is None
    torch.testing.assert_close(
        edited_logits(replay, anatomy), edited_logits(FullPasses(plain, red, 2), plain), **CLOSE
    )
    patcher, expected = Patcher(anatomy), Patcher(plain)
    patches = [Patch(part, 1, (3,), (3,)) for part in ("stream", "attention", "ffn")]
    found = [
        sorted(p.record(red, blue).patched(patches), key=lambda row: row.places) for p in (patcher, expected)
    ]
    assert patcher.inexact is None
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.logits, theirs.logits, **CLOSE)
    mine, theirs = LayerViews(anatomy, red), LayerViews(plain, red)
    for view in VIEWS:
        a, b = anatomy.logits(mine.view(view, 1)), plain.logits(theirs.view(view, 1))
        torch.testing.assert_close(a, b, **CLOSE)
    for layer in range(anatomy.shape.layers):
        assert torch.equal(anatomy.down_weight(layer), plain.down_weight(layer))
    assert torch.equal(anatomy.unembedding, plain.unembedding)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> he.Ranking:
    return ranked(whole(checkpoint_path(), tmp_path_factory.mktemp("whole")))


def ranked(model: PreTrainedModel) -> he.Ranking:
    loaded = he.load(model, AutoProcessor.from_pretrained(checkpoint_path()))
    return he.rank(loaded, DISCOVERY, limit=1, heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("load", UNUSUAL)
def test_a_ranking_is_that_of_the_whole_model(load: Load, expected: he.Ranking, tmp_path: Path) -> None:
    found = ranked(load(checkpoint_path(), tmp_path))
    for name in ("head_scores", "neuron_scores"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **CLOSE)


def test_exports_of_an_offloaded_model_are_refused_or_right(llava_checkpoint: Path, tmp_path: Path) -> None:
    model = offloaded(llava_checkpoint, tmp_path / "disk")
    steering = Steering.by_hand(model, heads={(1, 1): 0.0}, neurons={(2, 3): 9.0})
    with pytest.raises(HonesError, match="is offloaded from memory, so nothing can be folded, so this model"):
        export_checkpoint(model, steering, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    export_ia3(model, steering, tmp_path / "ia3")  # needs no weights
    check_ia3(llava_checkpoint, steering, tmp_path / "ia3")


def check_ia3(checkpoint: Path, steering: Steering, folder: Path) -> None:
    from peft import PeftModel

    with torch.no_grad():
        model = whole(checkpoint, folder)
        with steer(model, steering):
            expected = model(**inputs("red")).logits
        found = PeftModel.from_pretrained(model, folder).eval()(**inputs("red")).logits
    torch.testing.assert_close(found, expected, **CLOSE)


def test_exports_of_a_compiled_model_are_those_of_the_model(llava_checkpoint: Path, tmp_path: Path) -> None:
    model = compiled(llava_checkpoint, tmp_path)
    steering = Steering.by_hand(model, heads={(1, 1): 0.0}, neurons={(2, 3): 9.0})
    export_checkpoint(model, steering, tmp_path / "checkpoint")
    export_ia3(model, steering, tmp_path / "ia3")
    check_ia3(llava_checkpoint, steering, tmp_path / "ia3")
    with torch.no_grad():
        plain = whole(llava_checkpoint, tmp_path)
        with steer(plain, steering):
            expected = plain(**inputs("red")).logits
        found = whole(tmp_path / "checkpoint", tmp_path)(**inputs("red")).logits
    torch.testing.assert_close(found, expected, **CLOSE)
