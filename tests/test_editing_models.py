"""Edits by models, on tiny ones with random weights: the real call paths of diffusers and transformers."""

import json
from pathlib import Path
from typing import Any

import edited
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hones_eval.__main__ import main
from hones_eval.editing.boxes import Window
from hones_eval.editing.inpaint import Inpainter, InpaintSettings, Painting
from hones_eval.editing.masks import Segmenter, box_mask
from hones_eval.errors import HonesError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion inpainting pipeline in small, saved as checkpoints are."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inpainting")
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=[8, 8, 8, 8],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=32,
                intermediate_size=37,
                num_attention_heads=4,
                num_hidden_layers=2,
                vocab_size=100,
            )
        ),
        tokenizer=_tokenizer(folder),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            sample_size=16,
            in_channels=9,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            norm_num_groups=8,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def _tokenizer(folder: Path) -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def painting(seed: int, prompt: str = "a dog", size: tuple[int, int] = (120, 162)) -> Painting:
    picture = np.asarray(Image.fromarray(edited.scene()).resize(size[::-1]))
    return Painting(picture, box_mask(picture, Window(20, 30, 75, 90)), prompt, seed)


def painted(checkpoint: Path, jobs: list[Painting], **settings: Any) -> list[Any]:
    return list(Inpainter(InpaintSettings(str(checkpoint), **({"steps": 2} | settings))).paint(jobs))


def test_the_seed_and_the_prompt_decide_and_the_outside_stays(checkpoint: Path) -> None:
    jobs = [painting(1), painting(1), painting(2), painting(1, "a cat"), painting(1, size=(96, 128))]
    one, again, other, cat, small = painted(checkpoint, jobs)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, cat)
    assert one.shape == jobs[0].image.shape
    assert small.shape == (96, 128, 3)
    outside = ~jobs[0].region.footprint(*jobs[0].image.shape[:2])
    assert np.array_equal(one[outside], jobs[0].image[outside])
    assert not np.array_equal(one, jobs[0].image)


def test_a_batch_paints_what_single_runs_paint(checkpoint: Path) -> None:
    jobs = [painting(1), painting(2, "a cat"), painting(3)]
    for one, other in zip(painted(checkpoint, jobs), painted(checkpoint, jobs, batch=2), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 2  # rounding of other kernels


def test_what_reaches_the_pipeline(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides in multiples of 8, masked pixels blanked, and the settings of the paper."""
    painter = Inpainter(InpaintSettings(str(checkpoint)))
    seen: dict[str, Any] = {}
    real = type(painter._pipeline).__call__

    def heard(self: Any, **given: Any) -> Any:
        seen.update(given)
        return real(self, **(given | {"num_inference_steps": 1}))

    monkeypatch.setattr(type(painter._pipeline), "__call__", heard)
    (made,) = painter.paint([painting(0)])
    assert (seen["width"], seen["height"]) == (160, 120)
    assert seen["image"][0].size == seen["mask_image"][0].size == (160, 120)
    assert (seen["num_inference_steps"], seen["guidance_scale"]) == (50, 7.5)
    assert seen["negative_prompt"] == ["low quality, blurry"]
    mask, picture = np.asarray(seen["mask_image"][0]), np.asarray(seen["image"][0])
    assert (picture[mask > 0] == 0).all()
    assert (picture[mask == 0] > 0).any()
    assert 0.15 < (mask > 0).mean() < 0.35
    assert made.shape == (120, 162, 3)


def test_parts_that_wait_off_the_device_paint_the_same(checkpoint: Path) -> None:
    """By accelerate's own hooks; where there is no other device they move parts from the CPU to the CPU."""
    whole = Inpainter(InpaintSettings(str(checkpoint), steps=2))
    parts = Inpainter(InpaintSettings(str(checkpoint), steps=2, device="cpu:0", offload=True))
    hooked = [name for name, part in parts._pipeline.components.items() if hasattr(part, "_hf_hook")]
    assert set(hooked) == {"text_encoder", "unet", "vae"}
    assert not [part for part in whole._pipeline.components.values() if hasattr(part, "_hf_hook")]
    assert np.array_equal(*(next(iter(item.paint([painting(1)]))) for item in (whole, parts)))


def test_an_image_that_the_safety_checker_blanks_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = Inpainter(InpaintSettings(str(checkpoint), steps=1, batch=2))

    def checked(self: Any, images: Any, *rest: Any) -> Any:
        return images, [False, True][: len(images)]

    monkeypatch.setattr(type(painter._pipeline), "run_safety_checker", checked)
    one, blanked = painter.paint([painting(1), painting(2)])
    assert one.shape == (120, 162, 3)
    assert "safety checker blanked the image" in str(blanked)


def test_no_memory_for_the_checkpoint_is_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")

    def full(*given: Any, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", full)
    with pytest.raises(
        HonesError, match=r"not enough memory on cpu for .*: use --offload or a smaller --dtype"
    ):
        Inpainter(InpaintSettings(str(checkpoint)))


def test_no_memory_stops_one_image_and_not_the_rest(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = Inpainter(InpaintSettings(str(checkpoint), steps=1, batch=2))
    real = type(painter._pipeline).__call__

    def crowded(self: Any, **given: Any) -> Any:
        if len(given["prompt"]) > 1 or given["prompt"] == ["a whale"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")
        return real(self, **given)

    monkeypatch.setattr(type(painter._pipeline), "__call__", crowded)
    one, whale, three = painter.paint([painting(1), painting(2, "a whale"), painting(3)])
    assert "not enough memory to paint 162 x 120 pixels" in str(whale)
    assert one.shape == three.shape == (120, 162, 3)


def test_the_command_paints(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        edited.object_record(),
        edited.side_record(question_id="side"),
        edited.record(question_id="color"),
    ]
    questions = edited.write(tmp_path, rows)
    flags = ["edit", "--questions", str(questions), "--editor", "inpaint", "--checkpoint", str(checkpoint)]
    flags += ["--steps", "1", "--mask", "box"]
    assert main([*flags, "--out", str(tmp_path / "one")]) == 0
    assert main([*flags, "--out", str(tmp_path / "two")]) == 0
    one, two = (json.loads((tmp_path / name / "vseam_pairs.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert {row["question_id"]: row["perturb_prompt"] for row in one}["side"] == "ball to the right of box"
    assert all(row["psnr_outside"] is None and row["edited_answer"] == "No" for row in one)
    assert main([*flags, "--composite", "false", "--out", str(tmp_path / "whole")]) == 0
    assert "rejected q1: outside the mask the PSNR is" in capsys.readouterr().out


def test_questions_have_seeds_of_their_own_whatever_runs_beside_them(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Records that cannot be painted, other sizes and batches between them change no other's image."""
    twins = [edited.object_record(question_id=name, perturb_prompt="cat") for name in ("one", "two")]
    small = edited.object_record(question_id="small", imageId="small")
    bad = [
        edited.object_record(question_id="nobox", object_positions=[]),
        edited.object_record(question_id="flat", object_positions=[[3, 3, 0, 5]]),
        edited.object_record(question_id="gone", imageId="gone"),
    ]
    path = edited.write(tmp_path, [twins[0], *bad, small, twins[1]])
    Image.fromarray(edited.scene()[:90, :150]).save(tmp_path / "small.png")
    (tmp_path / "alone.json").write_text(json.dumps([twins[1]]))
    flags = ["edit", "--editor", "inpaint", "--checkpoint", str(checkpoint), "--steps", "1", "--mask", "box"]
    flags += ["--images", str(tmp_path)]
    out = tmp_path / "out"
    assert main([*flags, "--batch", "2", "--questions", str(path), "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert [item["question_id"] for item in report["not_editable"]] == ["flat", "nobox", "gone"]
    rows = {row["question_id"]: row for row in json.loads((out / "vseam_pairs.json").read_text())}
    assert list(rows) == ["one", "small", "two"]
    made = {name: np.asarray(Image.open(out / row["edited"])) for name, row in rows.items()}
    assert made["small"].shape == (90, 150, 3)
    assert not np.array_equal(made["one"], made["two"])
    alone = tmp_path / "alone"
    assert main([*flags, "--questions", str(tmp_path / "alone.json"), "--out", str(alone)]) == 0
    again = np.asarray(Image.open(alone / "images" / "two_edited.png"))
    assert np.abs(again.astype(int) - made["two"]).max() <= 2  # rounding of other kernels
    # What is missing is painted again, alone, as it was; what is there stays.
    (out / "rows" / "two.json").unlink()
    assert main([*flags, "--batch", "2", "--questions", str(path), "--out", str(out)]) == 0
    later = np.asarray(Image.open(out / "images" / "two_edited.png"))
    assert np.abs(later.astype(int) - made["two"]).max() <= 2


def test_what_is_no_inpainting_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(HonesError, match="nowhere cannot be loaded as a diffusers inpainting checkpoint"):
        Inpainter(InpaintSettings(str(tmp_path / "nowhere")))
    with pytest.raises(HonesError, match="cannot be loaded as a diffusers inpainting checkpoint"):
        Inpainter(InpaintSettings(str(checkpoint / "unet")))
    index = json.loads((checkpoint / "model_index.json").read_text())
    (tmp_path / "video").mkdir()
    index["_class_name"] = "DanceDiffusionPipeline"
    (tmp_path / "video" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(HonesError, match="DanceDiffusionPipeline"):
        Inpainter(InpaintSettings(str(tmp_path / "video")))


def test_without_diffusers_the_way_to_get_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(HonesError, match=r"pip install 'hones-eval\[edit\]'"):
        Inpainter(InpaintSettings("any"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAM in small."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam")
    vision = SamVisionConfig(
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        mlp_dim=16,
        global_attn_indexes=[0],
        window_size=4,
        num_pos_feats=8,
    )
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16)
    config = SamConfig(
        vision_config=vision.to_dict(),
        prompt_encoder_config=prompts.to_dict(),
        mask_decoder_config=decoder.to_dict(),
    )
    SamModel(config).save_pretrained(folder)
    side = {"longest_edge": 64}
    SamProcessor(SamImageProcessor(size=side, pad_size={"height": 64, "width": 64})).save_pretrained(folder)
    return folder


def test_a_segmenter_masks_inside_the_box(segmenter: Path) -> None:
    mask = Segmenter(str(segmenter))
    picture = edited.scene()
    region = mask(picture, Window(18, 33, 72, 87))
    again = mask(picture, Window(18, 33, 72, 87))
    assert np.array_equal(region.alpha, again.alpha)
    assert region.alpha.shape == (region.window.height, region.window.width)
    assert 0 <= region.alpha.min() <= region.alpha.max() <= 1
    touched = region.footprint(120, 160)
    assert not touched[:, 85:].any()
    with pytest.raises(HonesError, match="cannot be loaded as a segmenter"):
        Segmenter(str(segmenter / "nothing"))


def test_the_command_asks_a_segmenter(segmenter: Path, tmp_path: Path) -> None:
    path = edited.write(tmp_path, [edited.object_record()])
    flags = ["edit", "--questions", str(path), "--editor", "remove", "--mask", "segmenter"]
    flags += ["--segmenter", str(segmenter), "--out", str(tmp_path / "out"), "--min_change", "0"]
    assert main(flags) == 0
    (row,) = json.loads((tmp_path / "out" / "vseam_pairs.json").read_text())
    mask = np.asarray(Image.open(tmp_path / "out" / row["mask"])) > 0
    made, clean = (np.asarray(Image.open(tmp_path / "out" / row[key])) for key in ("edited", "clean"))
    assert mask.any()
    assert np.array_equal(made[~mask], clean[~mask])


@pytest.mark.parametrize("editor", ["remove", "inpaint"])
def test_no_memory_for_one_mask_stops_one_record(
    editor: str, checkpoint: Path, segmenter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import SamModel

    real, calls = SamModel.forward, iter(range(9))

    def crowded(self: Any, *given: Any, **more: Any) -> Any:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")
        return real(self, *given, **more)

    monkeypatch.setattr(SamModel, "forward", crowded)
    path = edited.write(tmp_path, [edited.object_record(question_id=name) for name in ("one", "two")])
    flags = ["edit", "--questions", str(path), "--editor", editor, "--mask", "segmenter", "--min_change", "0"]
    flags += ["--segmenter", str(segmenter), "--out", str(tmp_path / "out")]
    flags += ["--checkpoint", str(checkpoint), "--steps", "1"] if editor == "inpaint" else []
    assert main(flags) == 0
    (row,) = json.loads((tmp_path / "out" / "vseam_pairs.json").read_text())
    assert row["question_id"] == "two"
    (problem,) = json.loads((tmp_path / "out" / "report.json").read_text())["not_editable"]
    assert problem["question_id"] == "one"
    assert "not enough memory" in problem["reason"]
