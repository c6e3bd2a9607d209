"""Exported steerings need no hones-eval: plain transformers and plain PEFT give the steered logits."""

import errno
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from families import build
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from hones_eval.__main__ import main
from hones_eval.core import export, files
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.attach import steer
from hones_eval.core.steering import Steering


@pytest.fixture
def steering_folder(llava_checkpoint: Path, tmp_path: Path) -> Path:
    model = AutoModelForImageTextToText.from_pretrained(llava_checkpoint)
    shape = Anatomy.of(model).shape
    head_scales, neuron_scales = (
        torch.ones(shape.layers, shape.heads),
        torch.ones(shape.layers, shape.neurons),
    )
    head_scales[1, 2], neuron_scales[0, 5], neuron_scales[2, 7] = 0.5, 2.0, 0.0
    source = Provenance(str(llava_checkpoint), None, shape, "hones", {"how": "by hand"}, [])
    Steering(head_scales, neuron_scales, source).save(tmp_path / "steering")
    return tmp_path / "steering"


@pytest.mark.parametrize("to", ["checkpoint", "ia3"])
def test_exported_steering_gives_the_hooked_logits(
    to: str, steering_folder: Path, llava_checkpoint: Path, tmp_path: Path
) -> None:
    inputs = build("llava").inputs("what is this?", [Image.new("RGB", (30, 30), "red")])
    base = AutoModelForImageTextToText.from_pretrained(llava_checkpoint).eval()
    with torch.no_grad():
        plain = base(**inputs).logits
        with steer(base, Steering.load(steering_folder), strength=0.5):
            expected = base(**inputs).logits
    out = tmp_path / "exported"
    assert (
        main(
            ["export", "--steering", str(steering_folder), "--to", to, "--out", str(out), "--strength", "0.5"]
        )
        == 0
    )
    if to == "ia3":
        exported = PeftModel.from_pretrained(base, out)
    else:
        exported = AutoModelForImageTextToText.from_pretrained(out)
        AutoProcessor.from_pretrained(out)
    with torch.no_grad():
        found = exported.eval()(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 0.01


def test_the_base_is_never_overwritten_and_a_steering_without_effect_is_not_exported(
    steering_folder: Path, llava_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(llava_checkpoint, tmp_path / "base")
    arguments = ["export", "--steering", str(steering_folder), "--pretrained", str(base)]
    arguments += ["--to", "checkpoint"]
    assert main([*arguments, "--out", str(tmp_path / "other" / ".." / "base")]) == 1
    assert "is the base model's own folder" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "out"), "--strength", "0"]) == 1
    assert "at strength 0: every scale is 1, there is nothing to export" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for path in llava_checkpoint.iterdir():
        assert (base / path.name).read_bytes() == path.read_bytes()


def test_a_missing_base_is_named(
    steering_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--steering", str(steering_folder), "--to", "ia3", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--pretrained", str(tmp_path / "nothing")]) == 1
    assert "name it with --pretrained" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["checkpoint", "ia3"])
def test_a_full_disk_leaves_nothing_and_is_named(
    to: str,
    steering_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A full disk is an error of safetensors without a path, or one of copying without a name."""

    def full(*given: object, **options: object) -> None:
        if to == "ia3":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "save_file", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    out = tmp_path / "new" / "exported"
    arguments = ["export", "--steering", str(steering_folder), "--to", to, "--out", str(out)]
    assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"hones-eval: {out}")
    assert "No space left" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("to", ["checkpoint", "ia3"])
def test_a_file_that_cannot_grow_leaves_nothing(
    to: str, steering_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The system itself refuses to write more than the first bytes, as on a full disk."""
    out = tmp_path / "new" / "exported"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        status = main(["export", "--steering", str(steering_folder), "--to", to, "--out", str(out)])
        sys.stderr.flush()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    errors = capfd.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("hones-eval: ")]
    assert "exported" in line
    assert "File too large" in line
    assert "Traceback" not in errors
    assert not (tmp_path / "new").exists()


def test_what_a_killed_export_left_is_cleared_by_the_next(steering_folder: Path, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with files.staged_folder(tmp_path / "exported") as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            os._exit(9)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob(".exported.*.tmp"))) == 1
    out = str(tmp_path / "exported")
    assert main(["export", "--steering", str(steering_folder), "--to", "ia3", "--out", out]) == 0
    assert not list(tmp_path.glob(".exported.*"))
    assert (tmp_path / "exported" / "adapter_config.json").is_file()
