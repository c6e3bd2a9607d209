"""Ranking and scaling through the front door, and one clear line for whatever cannot be done."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import plain
import pytest
import torch
from drawn_data import write_folder
from own_answers import write_tasks
from PIL import Image

from hones_eval import commands
from hones_eval.__main__ import main
from hones_eval.core.artifact import read_json
from hones_eval.core.ranking import Ranking
from hones_eval.core.steering import Steering
from hones_eval.methods.localization import HeadLocalization

COUNT = 4
pytestmark = pytest.mark.usefixtures("models_loaded_once")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model_args: str) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own", "llava_hf", model_args, COUNT)


@pytest.fixture(scope="module")
def rank(tasks: Path, model_args: str) -> Callable[..., list[str]]:
    """Arguments of `rank` on `own_a`, to which others can be added or given instead."""

    def arguments(out: Path, **others: Any) -> list[str]:
        given = {"method": "hones", "model": "llava_hf", "model_args": model_args, "tasks": "own_a"}
        given |= {"include_path": tasks, "heads": 4, "neurons": 0.02, "out": out} | others
        return ["rank", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]

    return arguments


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory, rank: Callable[..., list[str]]) -> Path:
    """A ranking by each method, `hones` and `vseam`."""
    folder = tmp_path_factory.mktemp("rankings")
    for method in ("hones", "vseam"):
        assert main(rank(folder / method, method=method)) == 0
    return folder


@pytest.fixture
def complains(capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run a command that has to fail; the one line on stderr by which it says why."""

    def run(arguments: list[str]) -> str:
        capfd.readouterr()
        assert main(arguments) == 1
        lines = capfd.readouterr().err.splitlines()
        (line,) = [one for one in lines if one.startswith("hones-eval:")]
        assert "Traceback" not in "\n".join(lines)
        return line

    return run


def scale(ranking: Path, how: str, out: Path, **others: Any) -> list[str]:
    given = {"ranking": ranking, "how": how, "out": out} | others
    return ["scale", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def test_ranking_by_hones_writes_what_it_says(
    rank: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str], tasks: Path
) -> None:
    assert main(rank(tmp_path / "runs" / "a", limit=3, offset=1, seed=5)) == 0
    said = capfd.readouterr().out
    assert f"wrote {tmp_path / 'runs' / 'a'}: 3 examples, replay exact" in said
    assert "exact_match 0.6667 unedited" in said
    files = sorted(path.name for path in (tmp_path / "runs" / "a").iterdir())
    assert files == ["index.html", "ranking.json", "ranking.safetensors"]
    ranking = Ranking.load(tmp_path / "runs" / "a")
    source = ranking.provenance
    assert (source.method, source.seed) == ("hones", 5)
    assert source.settings["heads"] == 4
    assert source.settings["model"] == "llava_hf"
    assert source.examples[0].doc_ids == [1, 2, 3]
    assert len(source.examples[0].image_hashes) == 3
    assert ranking.head_scores.shape == (4, 4)
    assert ranking.neuron_scores.shape == (4, 96)
    assert ranking.report["base_metric"] == pytest.approx(2 / 3)
    assert (ranking.head_scores > 0).any()


def test_several_tasks_get_a_ranking_each(
    rank: Callable[..., list[str]], rankings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are those of one task at a time; what is there is refused, and kept with --resume."""
    arguments = rank(tmp_path / "both", tasks="own_a,own_b")
    assert main(["--json", *arguments]) == 0
    told = json.loads(capfd.readouterr().out)
    assert list(told["tasks"]) == ["own_a", "own_b"]
    alone = Ranking.load(rankings / "hones")
    made = {name: Ranking.load(tmp_path / "both" / name) for name in ("own_a", "own_b")}
    assert torch.equal(made["own_a"].head_scores, alone.head_scores)
    assert made["own_b"].provenance.examples[0].task == "own_b"
    page = (tmp_path / "both" / "index.html").read_text()
    for name in made:
        assert f'href="{name}/index.html"' in page
        assert f"matter most for {name}" in (tmp_path / "both" / name / "index.html").read_text()
    assert main(arguments) == 1
    assert "already holds own_a/ranking.json" in capfd.readouterr().err
    (tmp_path / "both" / "own_b" / "ranking.safetensors").unlink()
    before = (tmp_path / "both" / "own_a" / "ranking.safetensors").stat().st_mtime_ns
    assert main([*arguments, "--resume"]) == 0
    assert (tmp_path / "both" / "own_a" / "ranking.safetensors").stat().st_mtime_ns == before
    again = Ranking.load(tmp_path / "both" / "own_b")
    assert torch.equal(again.head_scores, made["own_b"].head_scores)


def test_ranking_by_vseam(rankings: Path) -> None:
    ranking = Ranking.load(rankings / "vseam")
    assert ranking.provenance.method == "vseam"
    for scores in (ranking.head_positive, ranking.head_negative):
        assert scores is not None
        assert (scores >= 0).all()
    assert ranking.neuron_scores is None
    assert ranking.report["correct_examples"] + ranking.report["incorrect_examples"] == COUNT


def test_scaling_neurons_by_a_factor(
    rankings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(scale(rankings / "hones", "fixed", tmp_path / "s", factor=1.5)) == 0
    assert f"wrote {tmp_path / 's'}: 0 heads and 8 neurons are scaled" in capfd.readouterr().out
    ranking, steering = Ranking.load(rankings / "hones"), Steering.load(tmp_path / "s")
    expected = torch.ones(4, 96)
    best = torch.sort(ranking.neuron_scores.flatten(), descending=True, stable=True).indices[:8]
    expected.view(-1)[best] = 1.5
    assert torch.equal(steering.neuron_scales, expected)
    assert (steering.head_scales == 1).all()
    source = steering.provenance
    assert source.ranking["digest"] == ranking.digest
    assert source.settings == {"how": "fixed", "factor": 1.5, "count": 8}
    assert source.examples == ranking.provenance.examples
    assert source.shape == ranking.provenance.shape


def test_scaling_heads_by_their_signed_scores(rankings: Path, tmp_path: Path) -> None:
    scores = Ranking.load(rankings / "vseam").head_scores.double()
    # The largest score is cut off, the smaller half ignored.
    strength, epsilon = float(1.5 / scores.abs().max()), float(scores.abs().median())
    assert main(scale(rankings / "vseam", "signed", tmp_path / "s", strength=strength, epsilon=epsilon)) == 0
    scales = Steering.load(tmp_path / "s").head_scales
    kept = torch.where(scores.abs() < epsilon, 0.0, scores)
    torch.testing.assert_close(scales.double(), torch.clip(1 + strength * kept, 0, 2), atol=1e-6, rtol=0)
    assert 0 < (scales != 1).sum() < 16
    assert float((scales - 1).abs().max()) == 1
    assert scales.unique().numel() > 2


def test_scaling_the_best_and_the_worst_heads(rankings: Path, tmp_path: Path) -> None:
    assert main(scale(rankings / "vseam", "topk", tmp_path / "s", heads=9, enhance=0.25, suppress=0.75)) == 0
    ranking, scales = Ranking.load(rankings / "vseam"), Steering.load(tmp_path / "s").head_scales
    assert ranking.head_positive is not None
    assert ranking.head_negative is not None
    lists = []
    for scores in (ranking.head_positive.flatten(), ranking.head_negative.flatten()):
        best = torch.sort(scores, descending=True, stable=True).indices[:9]
        lists.append({int(i): float(scores[i]) for i in best if scores[i] > 0})
    up, down = lists
    expected, both = torch.ones(4, 4), len(up.keys() & down.keys())
    for i in up.keys() | down.keys():  # a head of both lists goes by the larger of its two scores
        if up.get(i, 0.0) != down.get(i, 0.0):
            expected.view(-1)[i] = 1.25 if up.get(i, 0.0) > down.get(i, 0.0) else 0.25
    assert torch.equal(scales, expected)
    assert set(scales.unique().tolist()) == {0.25, 1.0, 1.25}
    assert both > 0


def test_a_config_file_that_is_not_yaml(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("ranking: [\n")
    assert main(["scale", "--config", str(tmp_path / "bad.yaml")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "config" in line


def test_a_config_file_that_is_not_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["scale", "--config", str(tmp_path / "bad.yaml")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "the file that --config names is not UTF-8 text" in line


def test_flags_from_a_file_and_the_command_line_wins(
    rankings: Path, tmp_path: Path, rank: Callable[..., list[str]]
) -> None:
    config = tmp_path / "scale.yaml"
    config.write_text(f"ranking: {rankings / 'hones'}\nhow: fixed\nout: {tmp_path / 's'}\nfactor: 3.0\n")
    assert main(["scale", "--config", str(config)]) == 0
    assert Steering.load(tmp_path / "s").neuron_scales.max() == 3
    assert main(["scale", "--config", str(config), "--factor", "4", "--out", str(tmp_path / "t")]) == 0
    assert Steering.load(tmp_path / "t").neuron_scales.max() == 4


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_explains_its_flags(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    shown = " ".join(capfd.readouterr().out.split())
    function = commands.command(name)
    first = " ".join(str(function.__doc__).split("\n\n")[0].split())
    assert first in shown
    assert "--config" in shown
    for flag in function.__annotations__:
        assert flag == "return" or flag in shown


def test_the_list_of_commands(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capfd.readouterr().out
    assert all(name in shown for name in commands.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rank", "--metod", "hones"], "metod"),
        (["rank", "--method", "magic"], "magic"),
        (["rank", "--method", "hones"], "model"),
        (["rnak"], "rnak"),
        (["scale", "--ranking", "x", "--how", "fixed", "--out", "y", "--factor", "big"], "factor"),
        (["scale", "--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["scale", "--ranking", "x", "--how", "fixed", "--out", "y", "--factor", "inf"], "factor"),
        (["scale", "--ranking", "x", "--out", "y"], "how"),
        (["rank", "--limit", "two"], "--limit two: a whole number is expected (see"),
        (["rank", "--limit", ""], "--limit '': a whole number is expected (see"),
        (["rank", "--batch_size", "all"], "--batch_size all: a whole number or auto is expected (see"),
        (
            ["edit", "--level", "animal"],
            "animal: choose one of object, attribute, relation (see",
        ),
        ([], "subcommand"),
    ],
)
def test_flags_that_cannot_be_read(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("hones-eval: ")
    assert says in line
    assert line.endswith("--help)")


# What cannot be done: one line each, and nothing written


BAD_RANKS: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"tasks": "own_q"}, "no task named 'own_q': did you mean .*own_a"),
    "model": ({"model": "lava_hf"}, "no model named 'lava_hf': did you mean llava_hf"),
    "checkpoint": ({"model_args": "pretrained=/nowhere"}, "pretrained=/nowhere: no such folder"),
    "model_args": ({"model_args": "pretrained"}, "should have the form name=value"),
    "the same task twice": ({"tasks": "own_a,own_a"}, "a task is named twice"),
    "no second task": ({"tasks": "own_a,own_z"}, "own_z"),
    "group": ({"tasks": "vqav2"}, "vqav2.* group of several tasks; choose one of: vqav2_test, vqav2_val"),
    "limit": ({"limit": 0}, "--limit 0: at least 1 example is needed"),
    "offset": ({"offset": 4}, "own_a.* 4 examples; offset=4 leaves none"),
    "metric": ({"metric": "blue"}, "has no metric 'blue'; it has exact_match"),
    "target": (
        {"target": "colour"},
        "could not find the gold answer.*--target; the columns are .*answer",
    ),
    "include_path": ({"include_path": "/nowhere"}, "/nowhere is not a folder"),
    "heads": ({"heads": 99}, r"--heads 99: cannot choose 99 of 16 heads \(4 layers of 4\): ask for 1 to 16"),
    "no heads": ({"heads": 0}, "cannot choose 0 of 16"),
    "neurons": ({"neurons": 0}, "share of neurons must lie above 0"),
    "many neurons": ({"neurons": 2}, "--neurons 2: the share of neurons must lie above 0 and at most 1"),
    "batch": ({"batch_size": 0}, "--batch_size 0: at least one row has to be run at once"),
    "sampling": ({"gen_kwargs": "do_sample=True,temperature=0.7"}, "do_sample=True.*--gen_kwargs"),
    "beams": ({"gen_kwargs": "num_beams=3"}, "num_beams=3|beams"),
    "no tokens": ({"gen_kwargs": "max_new_tokens=0"}, "max_new_tokens"),
    "no setting": (
        {"gen_kwargs": "max_new_tokens"},
        "--gen_kwargs: .max_new_tokens. should have the form name=value",
    ),
    "devices": ({"limit": 2, "devices": 3}, "2 examples cannot be shared by 3 processes"),
    "no devices": ({"devices": 0}, "--devices 0 --num_nodes 1: each is 1 or more"),
    "tokens in words": (
        {"gen_kwargs": "max_new_tokens=x"},
        "generate rejects .* change them with --gen_kwargs",
    ),
    "target template": ({"target": "{{colour}}"}, "not a template .*'colour' is undefined.*the columns are"),
}


@pytest.mark.parametrize(("others", "says"), BAD_RANKS.values(), ids=BAD_RANKS)
def test_a_rank_that_cannot_be_done(
    others: dict[str, Any],
    says: str,
    rank: Callable[..., list[str]],
    complains: Callable[[list[str]], str],
    tmp_path: Path,
) -> None:
    line = complains(rank(tmp_path / "out", **others))
    assert re.search(says, line), line
    assert not (tmp_path / "out").exists()


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_folder(tmp_path / "drawn", 3)
    monkeypatch.setenv("HONES_EVAL_DATA", str(folder))
    return folder


def cut_picture(folder: Path) -> None:
    picture = folder / "images" / "drawn_1.png"
    picture.write_bytes(picture.read_bytes()[:100])


def empty_picture(folder: Path) -> None:
    (folder / "images" / "drawn_1.png").write_bytes(b"")


def no_picture(folder: Path) -> None:
    (folder / "images" / "drawn_1.png").unlink()


def no_answers(folder: Path) -> None:
    content = json.loads((folder / "drawn.json").read_text())
    content["data"][1]["vqa"] = {"question": "What?"}
    (folder / "drawn.json").write_text(json.dumps(content))


def no_json(folder: Path) -> None:
    (folder / "drawn.json").write_text("{")


def no_entries(folder: Path) -> None:
    (folder / "drawn.json").write_text('{"data": []}')


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_picture, "drawn_1.png cannot be read"),
        (empty_picture, "drawn_1.png cannot be read"),
        (no_picture, "its image drawn_1.png is neither in"),
        (no_answers, r"entry 1 \(drawn_1.png\): its vqa has neither answers"),
        (no_json, "HONES_EVAL_DATA|not valid JSON"),
        (no_entries, "HONES_EVAL_DATA|at least one entry"),
        (no_folder, "there is no such file or folder"),
    ],
)
def test_damaged_data(
    damage: Callable[[Path], None],
    says: str,
    drawn: Path,
    rank: Callable[..., list[str]],
    complains: Callable[[list[str]], str],
    tmp_path: Path,
) -> None:
    damage(drawn)
    line = complains(rank(tmp_path / "out", tasks="hones_vqa", gen_kwargs="max_new_tokens=2"))
    assert re.search(says, line), line
    assert not (tmp_path / "out" / "ranking.json").exists()


def test_a_yaml_error_in_a_task(
    tasks: Path, rank: Callable[..., list[str]], complains: Callable[[list[str]], str], tmp_path: Path
) -> None:
    shutil.copytree(tasks, tmp_path / "tasks")
    (tmp_path / "tasks" / "own_c.yaml").write_text("task: own_c\nmetric_list: [\n")
    line = complains(rank(tmp_path / "out", include_path=tmp_path / "tasks"))
    assert "own_c.yaml, line 3: not valid YAML" in line


def test_a_task_without_targets(
    tasks: Path, rank: Callable[..., list[str]], complains: Callable[[list[str]], str], tmp_path: Path
) -> None:
    shutil.copytree(tasks, tmp_path / "tasks")
    text = (tasks / "own_a.yaml").read_text().replace("doc_to_target: answer", "doc_to_target: question")
    text = text.replace("task: own_a", "task: own_untold").replace("exact_match", "strange")
    text = text.replace("metric_list:", "process_results: !function utils.results\nmetric_list:")
    (tmp_path / "tasks" / "own_untold.yaml").write_text(text)
    with (tmp_path / "tasks" / "utils.py").open("a") as utils:
        utils.write("\n\ndef results(doc, answers):\n    return {'strange': 0.0}\n")
    line = complains(rank(tmp_path / "out", include_path=tmp_path / "tasks", tasks="own_untold"))
    assert "could not find the gold answer of task own_untold" in line
    assert "--target" in line


def test_a_model_whose_anatomy_is_refused(
    rank: Callable[..., list[str]], complains: Callable[[list[str]], str], tmp_path: Path
) -> None:
    """A LLaVA whose last attention writes nothing, as its own stock wrapper loads it."""
    folder = families.save_checkpoint("llava", tmp_path / "silent")
    model = families.build("llava").model
    plain.layers(model)[-1].self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(folder)
    line = complains(rank(tmp_path / "out", model_args=f"pretrained={folder}"))
    assert "LlavaForConditionalGeneration: zeroing layers.3.self_attn.o_proj changes no logit" in line
    assert not (tmp_path / "out").exists()


BAD_SCALES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "nowhere": ("nowhere", "fixed", {}, r"nowhere/ranking\.json does not exist"),
    "no neurons": ("vseam", "fixed", {}, "no neuron scores: rank with --method hones"),
    "no signs": ("hones", "topk", {}, "rank with --method vseam"),
    "nothing": ("hones", "fixed", {"factor": 1}, "every scale is 1.*not written"),
    "weak": ("vseam", "signed", {"strength": 0}, "every scale is 1"),
    "share": ("hones", "fixed", {"neurons": 0}, "share of neurons must lie above 0"),
    "too many": ("vseam", "topk", {"heads": 17}, "cannot choose 17 of 16"),
    "no model": ("hones", "grid", {}, "give --model, --model_args and --tasks"),
    "strength of fixed": (
        "hones",
        "fixed",
        {"strength": 3},
        "--strength only applies .*signed, signed_neurons and mean_difference, not to fixed",
    ),
    "factor of signed": (
        "vseam",
        "signed",
        {"factor": 3},
        "--factor only applies .*fixed, not to signed",
    ),
    "heads of signed": (
        "vseam",
        "signed",
        {"heads": 3},
        "--heads only applies .*topk, halving and mean_difference, not",
    ),
    "against of fixed": ("hones", "fixed", {"against": "own_b"}, "--against only applies .*mean_difference"),
    "no task": ("hones", "mean_difference", {}, "give --model, --model_args and --tasks"),
    "rates of fixed": (
        "hones",
        "fixed",
        {"rates": [0.1]},
        "--rates only applies to --how tuned, not to fixed",
    ),
    "groups of grid": ("hones", "grid", {"groups": 2}, "--groups only applies .*search and halving, not to"),
    "neurons of signed": ("vseam", "signed", {"neurons": 0.1}, "--neurons only applies .*, not to signed"),
    "beta of learned_no_kl": (
        "hones",
        "learned_no_kl",
        {"beta": 0.1},
        "--beta only applies .*learned and random, not to learned_no_kl",
    ),
    "epochs of tuned": ("hones", "tuned", {"epochs": 3}, "--epochs only applies .*learned"),
    "learning rate of tuned": ("hones", "tuned", {"learning_rate": 0.1}, "--learning_rate only applies "),
    "sites of grid": (
        "hones",
        "grid",
        {"tuned_sites": "heads"},
        "--tuned_sites only applies .*tuned and halving",
    ),
    "strengths alone": (
        "vseam",
        "signed",
        {"strengths": [1]},
        "--strengths are tried on development examples",
    ),
}


@pytest.mark.parametrize(("ranking", "how", "others", "says"), BAD_SCALES.values(), ids=BAD_SCALES)
def test_a_scale_that_cannot_be_done(
    ranking: str,
    how: str,
    others: dict[str, Any],
    says: str,
    rankings: Path,
    complains: Callable[[list[str]], str],
    tmp_path: Path,
) -> None:
    line = complains(scale(rankings / ranking, how, tmp_path / "out", **others))
    assert re.search(says, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["fixed", "grid"])
def test_places_that_cannot_be_written_to_are_told_before_any_work(
    how: str,
    rankings: Path,
    rank: Callable[..., list[str]],
    complains: Callable[[list[str]], str],
    tmp_path: Path,
) -> None:
    """Before a model is loaded: none of these has one."""
    (tmp_path / "file").write_text("")
    for out, says in (
        (tmp_path / "file", "file is a file, not a folder"),
        (tmp_path / "file" / "deep" / "out", f"{tmp_path / 'file'} is a file, not a folder"),
        (Path("/proc/out"), "cannot write in /proc"),
    ):
        for given in (
            scale(rankings / "hones", how, out),
            rank(out, model="none"),
            ["demo", "--out", str(out)],
        ):
            line = complains(given)
            assert f"--out {out}: " in line
            assert says in line


def test_files_in_place_of_folders_and_seeds_below_0(
    rankings: Path, complains: Callable[[list[str]], str], tmp_path: Path
) -> None:
    file = rankings / "hones" / "ranking.json"
    assert f"{file / 'ranking.json'} does not exist" in complains(scale(file, "fixed", tmp_path / "out"))
    line = complains(scale(rankings / "hones", "fixed", tmp_path / "out", seed=-1))
    assert "--seed -1: a seed is 0 or more" in line
    (tmp_path / "r" / "ranking.json").mkdir(parents=True)
    line = complains(scale(tmp_path / "r", "fixed", tmp_path / "out"))
    assert line == f"hones-eval: {tmp_path / 'r' / 'ranking.json'} is not a regular file"
    assert not (tmp_path / "out").exists()


def test_a_truncated_ranking(rankings: Path, complains: Callable[[list[str]], str], tmp_path: Path) -> None:
    shutil.copytree(rankings / "hones", tmp_path / "r")
    file = tmp_path / "r" / "ranking.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert "ranking.safetensors is not a safetensors file" in complains(
        scale(tmp_path / "r", "fixed", tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


def test_a_steering_for_another_model(
    rankings: Path,
    rank: Callable[..., list[str]],
    complains: Callable[[list[str]], str],
    tmp_path: Path,
    model_args: str,
) -> None:
    """Named on both sides, by the steered model that it was given to."""
    assert main(scale(rankings / "hones", "fixed", tmp_path / "s")) == 0
    steering = Steering.load(tmp_path / "s")
    shape = dataclasses.replace(steering.provenance.shape, hidden=65)
    source = dataclasses.replace(steering.provenance, shape=shape)
    Steering(steering.head_scales, steering.neuron_scales, source).save(tmp_path / "other")
    steered = f"{model_args},steering={tmp_path / 'other'}"
    line = complains(rank(tmp_path / "out", model="hones_llava", model_args=steered))
    assert "does not fit LlavaForConditionalGeneration (hidden: 65 here, 64 there)" in line
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_trace(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--debug", *scale(tmp_path / "nowhere", "fixed", tmp_path / "out")]) == 1
    shown = capfd.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("hones-eval: ")


@pytest.mark.parametrize("where", [(Ranking, "save"), (HeadLocalization, "measure")])
def test_an_interrupted_ranking_leaves_no_ranking_and_says_how_to_go_on(
    where: tuple[type, str],
    rank: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """At the end, and in a pass, where Lightning sees the interrupt first."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, interrupted)
    assert main(rank(tmp_path / "out")) == 130
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == (
        "hones-eval: interrupted; with --resume the same command goes on from what was measured"
    )
    assert "Traceback" not in "\n".join(lines)
    assert not (tmp_path / "out" / "ranking.json").exists()


def test_photographs(
    photos: Path, rank: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way from real pictures to a steering."""
    monkeypatch.setenv("HONES_EVAL_DATA", str(photos))
    settings = {"tasks": "hones_vqa", "limit": 3, "gen_kwargs": "max_new_tokens=4"}
    assert main(rank(tmp_path / "r", **settings)) == 0
    assert main(scale(tmp_path / "r", "fixed", tmp_path / "s")) == 0
    header = read_json(tmp_path / "s" / "steering.json")
    assert header["scaled_neurons"] == 8
    assert header["examples"][0]["task"] == "hones_vqa"
    with Image.open(next((photos / "images").glob("coco_*.jpg"))) as picture:
        assert picture.size[0] > 100
