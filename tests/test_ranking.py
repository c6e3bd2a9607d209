"""Rankings: what they choose, and their files, which load whole or say why not."""

import dataclasses
import json
import os
import socket
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hones_eval import limits
from hones_eval.core import artifact, files
from hones_eval.core.artifact import ExampleSet, ModelShape, Provenance, read_json, write_json, write_text
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron
from hones_eval.errors import HonesError, MisfitError

SHAPE = ModelShape(layers=2, heads=3, head_width=4, hidden=8, neurons=50, vocabulary=99)
EXAMPLES = ExampleSet("vqa", "val", 2, 5, "f00d", [5, 6], ["aa", "bb"])
PROVENANCE = Provenance(
    base_model="org/model",
    revision="abc",
    shape=SHAPE,
    method="hones",
    settings={"neurons": 0.03, "metric": "vqa_accuracy"},
    examples=[EXAMPLES],
    seed=7,
)


def make() -> Ranking:
    generator = torch.Generator().manual_seed(0)
    return Ranking(
        provenance=PROVENANCE,
        head_scores=torch.tensor([[0.1, -0.2, 0.5], [0.5, 0.0, 1 / 3]]),
        head_log_probability=torch.randn(2, 3, generator=generator),
        neuron_scores=torch.randn(2, 50, generator=generator),
        report={"examples": 2, "heads": [{"head": [1, 0], "score": 0.5}]},
    )


def rewrite(folder: Path, change: dict[str, object], *, sign: bool = True) -> None:
    """Change the header of a ranking, and its digest with it if `sign`."""
    header = read_json(folder / "ranking.json") | change
    if sign:
        header["header_digest"] = artifact.header_digest(header)
    write_json(folder / "ranking.json", header)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save(tmp_path / "runs" / "vqa")
    return tmp_path / "runs" / "vqa"


def test_a_ranking_comes_back_as_it_was(saved: Path) -> None:
    made, loaded = make(), Ranking.load(saved)
    assert loaded.provenance == made.provenance
    assert loaded.report == made.report
    assert loaded.digest == made.digest
    for name in ("head_scores", "head_log_probability", "neuron_scores"):
        assert torch.equal(getattr(loaded, name), getattr(made, name))
    assert loaded.head_positive is None
    assert loaded.head_negative is None
    assert sorted(path.name for path in saved.iterdir()) == ["ranking.json", "ranking.safetensors"]


def test_the_header_can_be_read_by_a_person(saved: Path) -> None:
    text = (saved / "ranking.json").read_text()
    content = json.loads(text)
    assert content["format"] == "hones-eval ranking"
    assert content["format_version"] == 2
    assert content["base_model"] == "org/model"
    assert content["revision"] == "abc"
    assert content["shape"]["head_width"] == 4
    assert content["examples"][0]["hash"] == "f00d"
    assert content["tensors"]["neuron_scores"] == [2, 50]
    assert '\n "base_model": "org/model",\n' in text
    assert '"doc_ids": [ 5, 6 ]' in text or '"doc_ids": [5, 6]' in text


def test_choosing_heads_and_neurons() -> None:
    ranking = make()
    assert ranking.heads(3) == [Head(0, 2), Head(1, 0), Head(1, 2)]
    best = torch.argsort(ranking.neuron_scores.flatten(), descending=True)
    assert ranking.neurons() == [Neuron(*divmod(int(i), 50)) for i in best[:3]]  # 3 % of 100
    assert len(ranking.neurons(0.1)) == 10


def test_heads_that_a_layer_lacks_are_not_chosen() -> None:
    """Their scores are stored as 0, which is more than the score of any head here."""
    shape = dataclasses.replace(SHAPE, layer_heads=[1, 3])
    scores = torch.tensor([[-0.1, 0.0, 0.0], [-0.4, -0.2, -0.3]])
    ranking = Ranking(dataclasses.replace(PROVENANCE, shape=shape), head_scores=scores)
    assert ranking.measured_heads == 4
    assert ranking.heads(4) == [Head(0, 0), Head(1, 1), Head(1, 2), Head(1, 0)]
    with pytest.raises(HonesError, match="cannot choose 5 of the 4 heads"):
        ranking.heads(5)


def test_what_a_ranking_has_not_cannot_be_chosen() -> None:
    empty = Ranking(provenance=PROVENANCE)
    with pytest.raises(HonesError, match="no head scores"):
        empty.heads(1)
    with pytest.raises(HonesError, match="no neuron scores: rank with --method hones and --neurons"):
        empty.neurons()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("head_scores", (3, 2)), ("head_positive", (2, 50)), ("neuron_scores", (2, 3)), ("head_negative", (6,))],
)
def test_scores_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(MisfitError, match=f"{name} has the shape .* the model needs"):
        Ranking(provenance=PROVENANCE, **{name: torch.zeros(shape)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_not_written(value: float, tmp_path: Path) -> None:
    ranking = make()
    ranking.head_scores[1, 1] = value
    with pytest.raises(HonesError, match="ranking tensor head_scores holds values that are not finite"):
        ranking.save(tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_file_that_is_not_there_is_named(saved: Path) -> None:
    (saved / "ranking.safetensors").unlink()
    with pytest.raises(HonesError, match=r"ranking\.safetensors does not exist"):
        Ranking.load(saved)
    (saved / "ranking.json").unlink()
    with pytest.raises(HonesError, match=r"ranking\.json does not exist"):
        Ranking.load(saved)


def test_other_tensors_than_it_was_written_with_are_refused(saved: Path) -> None:
    other = make()
    other.head_scores[0, 0] += 1e-6
    other.save(saved.parent / "other")
    (saved.parent / "other" / "ranking.safetensors").rename(saved / "ranking.safetensors")
    with pytest.raises(HonesError, match=r"not the file that ranking\.json was written with"):
        Ranking.load(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_of_tensors_is_refused(saved: Path, keep: int) -> None:
    file = saved / "ranking.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(HonesError, match=r"ranking\.safetensors is not a safetensors file"):
        Ranking.load(saved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 3}, r"has ranking format 3; hones-eval \S+ reads 1 and 2: make it again"),
        ({"format_version": True}, r"has ranking format True; hones-eval \S+ reads 1 and 2: make it again"),
        ({"format": "hones-eval steering"}, "is not a hones-eval ranking"),
        ({"shape": {"layers": 2}}, r"does not fit its schema: shape\.heads: Field required"),
        ({"examples": [{"task": "x"}]}, r"schema: examples\.0\.split: Field required"),
        ({"base_model": None, "shape": None}, "schema: base_model: Input should be a valid string"),
        ({"settings": [1]}, "schema: settings: Input should be a valid dictionary"),
        ({"seed": "7"}, "schema: seed: Input should be a valid integer"),
        ({"seed": True}, "schema: seed: Input should be a valid integer"),
        (
            {"shape": dataclasses.asdict(SHAPE) | {"layers": "2"}},
            r"schema: shape\.layers: Input should be a valid integer",
        ),
        (
            {"shape": dataclasses.asdict(SHAPE) | {"heads": 10**9}},
            r"schema: shape\.heads: Input should be less than or equal to 65536",
        ),
        (
            {"examples": [dataclasses.asdict(EXAMPLES) | {"image_hashes": "aa"}]},
            r"schema: examples\.0\.image_hashes: Input should be a valid list",
        ),
        (
            {"examples": [dataclasses.asdict(EXAMPLES) | {"doc_ids": ["5"]}]},
            r"schema: examples\.0\.doc_ids\.0: Input should be a valid integer",
        ),
        (
            {"examples": [dataclasses.asdict(EXAMPLES) | {"count": -1}]},
            r"schema: examples\.0\.count: Input should be greater than or equal to 0",
        ),
        (
            {"examples": [dataclasses.asdict(EXAMPLES) | {"count": 10**11}]},
            r"schema: examples\.0\.count: Input should be less than or equal to 10000000",
        ),
        ({"examples": [dataclasses.asdict(EXAMPLES) | {"more": 1}]}, r"examples\.0\.more: Unexpected"),
        ({"examples": []}, "does not say which examples it was made from"),
    ],
)
def test_a_header_of_another_kind_is_refused(saved: Path, change: dict[str, object], says: str) -> None:
    rewrite(saved, change)
    with pytest.raises(HonesError, match=says) as caught:
        Ranking.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "\x00"])
def test_a_header_that_is_not_one_is_refused(saved: Path, text: str) -> None:
    (saved / "ranking.json").write_text(text)
    with pytest.raises(HonesError, match=r"ranking\.json is not"):
        Ranking.load(saved)


def test_a_share_of_neurons_that_is_no_number_is_refused(saved: Path) -> None:
    rewrite(saved, {"settings": {"neurons": "1 %"}})
    ranking = Ranking.load(saved)
    with pytest.raises(HonesError, match="give no fraction of neurons, but '1 %': pass --neurons"):
        ranking.neurons()
    assert len(ranking.neurons(0.1)) == 10


def test_a_header_saved_with_a_byte_order_mark_is_read(saved: Path) -> None:
    text = (saved / "ranking.json").read_text()
    (saved / "ranking.json").write_text("\ufeff" + text)
    assert Ranking.load(saved).provenance == PROVENANCE


def test_a_header_that_lost_a_field_is_refused(saved: Path) -> None:
    content = read_json(saved / "ranking.json")
    del content["method"]
    write_json(saved / "ranking.json", content)
    with pytest.raises(HonesError, match=r"ranking\.json does not fit its schema: method: Field required"):
        Ranking.load(saved)


def test_tensors_of_another_artifact_are_refused(saved: Path) -> None:
    artifact.save_artifact(saved, "ranking", PROVENANCE, {"head_scales": torch.ones(2, 3)}, {})
    with pytest.raises(HonesError, match=r"a ranking has no tensors named .*head_scales"):
        Ranking.load(saved)


# Files are written whole or not at all.


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existed", [True, False])
def test_a_write_that_is_cut_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], existed: bool
) -> None:
    file = tmp_path / "page.md"
    if existed:
        write_text(file, "before")

    def cut_off(source: str, target: Path) -> None:
        raise error("cut off")

    monkeypatch.setattr(files.os, "replace", cut_off)
    with pytest.raises(error):
        write_text(file, "after" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == (["page.md"] if existed else [])
    assert not existed or file.read_text() == "before"


def test_a_process_that_dies_before_renaming_leaves_the_old_pair(saved: Path) -> None:
    child = os.fork()
    if child == 0:
        files.os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
        artifact.write_text(saved / "ranking.json", "half")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert Ranking.load(saved).digest == make().digest


@pytest.mark.parametrize("operation", range(5))
@pytest.mark.parametrize("existed", [True, False])
def test_a_ranking_killed_at_any_file_operation_is_the_old_the_new_or_none(
    saved: Path, tmp_path: Path, operation: int, existed: bool
) -> None:
    """A child process dies just before each rename, deletion or flush in turn."""
    folder = saved if existed else tmp_path / "new"
    other = make()
    other.head_scores[0, 0] = 9.0
    child = os.fork()
    if child == 0:
        left = [operation]
        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, dying(getattr(os, name), left))
        other.save(folder)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 9
    try:
        assert Ranking.load(folder).digest in {make().digest, other.digest}
    except HonesError as error:
        assert "ranking.json does not exist" in str(error)  # noqa: PT017
    files.clear_dead_files(folder)
    other.save(folder)
    assert Ranking.load(folder).digest == other.digest
    assert sorted(path.name for path in folder.iterdir()) == ["ranking.json", "ranking.safetensors"]


def dying(function: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """The function, but the process dies at its call number `left[0]`, counted over all such functions."""

    def call(*arguments: Any, **named: Any) -> Any:
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        return function(*arguments, **named)

    return call


def test_a_changed_header_is_refused_and_version_1_is_read(saved: Path) -> None:
    """The digest covers the provenance: emptying the image hashes would blind the check for reuse."""
    emptied = [dataclasses.asdict(EXAMPLES) | {"image_hashes": []}]
    whole = (saved / "ranking.json").read_text()
    for change in ({"examples": emptied}, {"report": {}}, {"settings": {}}, {"base_model": "org/other"}):
        rewrite(saved, change, sign=False)
        with pytest.raises(HonesError, match=r"ranking\.json was changed after it was written"):
            Ranking.load(saved)
        (saved / "ranking.json").write_text(whole)
    header = json.loads(whole)
    del header["header_digest"]
    write_json(saved / "ranking.json", header)
    with pytest.raises(HonesError, match="was changed after it was written"):
        Ranking.load(saved)
    newer = ("weights", "adapter", "adapter_revision")
    for name in newer:  # a file of version 2 whose number was changed
        old = {key: value for key, value in header.items() if key not in newer or key == name}
        write_json(saved / "ranking.json", old | {"format_version": 1})
        with pytest.raises(HonesError, match=f"it says format 1, which has no '{name}'"):
            Ranking.load(saved)
    old = {key: value for key, value in header.items() if key not in newer}
    write_json(saved / "ranking.json", old | {"format_version": 1})
    with pytest.warns(UserWarning, match="digest does not cover settings, examples and image hashes"):
        assert Ranking.load(saved).provenance == PROVENANCE


def test_the_scores_of_version_1_are_covered(saved: Path) -> None:
    """What an old artifact promises: its numbers were not changed. Nothing covers its provenance."""
    header = json.loads((saved / "ranking.json").read_text())
    for name in artifact.NOT_IN_VERSION_1:
        del header[name]
    write_json(saved / "ranking.json", header | {"format_version": 1})
    save_file({"head_scores": torch.ones(2, 3)}, saved / "ranking.safetensors")
    with (
        pytest.warns(UserWarning, match="has format 1"),
        pytest.raises(HonesError, match=r"ranking\.safetensors is not the file that"),
    ):
        Ranking.load(saved)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"seed": 7', '"seed": 7, "seed": 8', "the key 'seed' is repeated"),
        ('"neurons": 0.03', '"neurons": NaN', "NaN is not a JSON number"),
        ('"neurons": 0.03', '"neurons": 1e999', "not finite"),
        ('"neurons": 0.03', '"neurons": "\\ud800"', "unpaired surrogate"),
        ('"neurons": 0.03', '"neurons": ' + "[" * 40 + "]" * 40, "nested more than 32 levels deep"),
        ('"neurons": 0.03', '"neurons": ' + "[" * 200_000 + "]" * 200_000, "nested"),
        ('"neurons": 0.03', '"neurons": ' + "9" * 5000, "integer string conversion"),
    ],
)
def test_json_that_is_not_plain_is_refused_in_a_line(saved: Path, old: str, new: str, says: str) -> None:
    path = saved / "ranking.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(HonesError, match=says) as caught:
        Ranking.load(saved)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.bfloat16, torch.float64])
def test_tensors_of_another_type_are_refused(saved: Path, dtype: torch.dtype) -> None:
    save_file({"head_scores": torch.ones(2, 3).to(dtype)}, saved / "ranking.safetensors")
    with pytest.raises(HonesError, match=r"head_scores is torch\.\w+; an artifact holds torch\.float32"):
        Ranking.load(saved)


def test_infinite_scores_are_refused(saved: Path) -> None:
    tensors = {"head_scores": torch.full((2, 3), torch.inf)}
    save_file(tensors, saved / "ranking.safetensors")
    rewrite(saved, {"digest": artifact.digest(tensors)})
    with pytest.raises(HonesError, match="head_scores holds values that are not finite"):
        Ranking.load(saved)


def test_a_file_beyond_the_limit_is_refused_before_it_is_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ARTIFACT_JSON_BYTES", 100)
    with pytest.raises(HonesError, match=r"ranking\.json is larger than 100 bytes"):
        Ranking.load(saved)
    monkeypatch.undo()
    monkeypatch.setattr(limits, "ARTIFACT_TENSOR_BYTES", 100)
    with pytest.raises(HonesError, match=r"ranking\.safetensors is larger than 100 bytes"):
        Ranking.load(saved)


@pytest.mark.parametrize(
    "settings",
    [{"x": float("nan")}, {"x": "\ud800"}, {"x": Path("a")}, {"x": torch.ones(1)}, {"x": {1, 2}}],
)
def test_settings_that_json_cannot_hold_are_refused_before_writing(
    settings: dict[str, object], tmp_path: Path
) -> None:
    made = dataclasses.replace(make(), provenance=dataclasses.replace(PROVENANCE, settings=settings))
    with pytest.raises(HonesError, match=r"the ranking cannot be stored .* nothing was written"):
        made.save(tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_dead_temporary_files_are_cleared_and_living_ones_stay(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead = tmp_path / f".x.json.{socket.gethostname()}-{child}-abc.tmp"
    living = tmp_path / f".x.json.{socket.gethostname()}-{os.getpid()}-abc.tmp"
    elsewhere = tmp_path / f".x.json.other-host-{child}-abc.tmp"
    for path in (dead, living, elsewhere, tmp_path / ".notes.tmp"):
        path.write_bytes(b"half")
    assert files.clear_dead_files(tmp_path) == [dead]
    assert not dead.exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's error for a full disk names no file; ours does. /dev/full is such a disk."""
    made = tempfile.mkstemp

    def full(**options: Any) -> tuple[int, str]:
        handle, name = made(**options)
        os.close(handle)
        return os.open("/dev/full", os.O_WRONLY), name

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(OSError, match="No space left") as caught:
        make().save(tmp_path / "r")
    assert str(caught.value.filename) == str(tmp_path / "r" / "ranking.safetensors")
    assert not list((tmp_path / "r").iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_without_numbers_that_json_has_not(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(tmp_path / "x.json", {"a": [value]})
    assert not list(tmp_path.iterdir())


def test_json_keeps_its_content_whatever_the_layout(tmp_path: Path) -> None:
    content = {
        "a": [1, -2.5e-7, True, None],
        "b": [["x", "y"], []],
        "c": {"d": "[ 1,\n 2 ]", "é": ["a b", '"']},
    }
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content


def test_the_digest_sees_names_types_shapes_and_bytes() -> None:
    x = torch.tensor([[0.0, 1.0]])
    variants = [{"a": x}, {"b": x}, {"a": x.T}, {"a": x.bfloat16()}, {"a": -x}, {"a": x, "b": x}]
    assert len({artifact.digest(one) for one in variants}) == len(variants)
    assert artifact.digest({"a": x, "b": -x}) == artifact.digest({"b": -x, "a": x})
    assert artifact.hash_of(["ab", "c"]) != artifact.hash_of(["a", "bc"])


def test_shared_images() -> None:
    other = ExampleSet("vqa", "test", 2, 0, "x", [0, 1], ["bb", "cc"])
    assert PROVENANCE.examples[0].shared_images(other) == {"bb"}


def test_a_small_file_is_read_within_little_memory(saved: Path) -> None:
    """Reading up to a limit must not reserve memory for the whole limit."""
    tracemalloc.start()
    try:
        files.read_bounded(saved / "ranking.json", 1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
