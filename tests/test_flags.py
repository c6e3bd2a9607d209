"""Flags that cannot be read are one line with the way out, for every command, before anything is loaded."""

import inspect
import logging
from pathlib import Path

import pytest

from hones_eval.__main__ import main
from hones_eval.commands import ARTIFACTS, BY_PLACE, COMMANDS, command
from hones_eval.commands.help_texts import choices, command_help, sections


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line by which a command refuses its flags."""
    assert main(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hones-eval: ")
    return line


def flags_of(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(command(name)).parameters)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_suggests_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in flags_of(name):
        if len(flag) < 4 or flag in ("logs", "rankings"):
            continue
        wrong = flag[:-2] + flag[-1]  # one letter is missing, as in --limt
        if wrong not in flags_of(name):
            line = complaint([name, f"--{wrong}", "1"], capsys)
            assert f"{name} has no flag --{wrong}: did you mean --" in line
    if "model_args" in flags_of(name):
        line = complaint([name, "--model-args", "a=b"], capsys)
        assert "has no flag --model-args: did you mean --model_args?" in line
    if "limit" in flags_of(name):
        assert "did you mean --limit?" in complaint([name, "--limt=3"], capsys)
    assert line_ends(complaint([name, "--xyzzy"], capsys), name)


def line_ends(line: str, name: str) -> bool:
    return line.endswith(f"(see hones-eval {name} --help)")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_flag_is_called_by_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = [flag for flag, one in flags_of(name).items() if one.default is one.empty]
    if not required:
        return
    line = complaint([name], capsys)
    for flag in required:
        assert (f"--{flag} (" in line) or (f"{flag.upper()} (" in line), flag
        assert f"{name}.{flag}" not in line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_choice_lists_the_choices(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, parameter in flags_of(name).items():
        names = choices(parameter.annotation)
        if len(names) < 2 or "list" in str(parameter.annotation):
            continue
        line = complaint([name, f"--{flag}", "honse"], capsys)
        assert all(choice in line for choice in names), line


@pytest.mark.parametrize("given", [["task", "nwe"], ["task"], ["taks", "new"], ["task-nwe"]])
def test_a_command_of_two_words_is_suggested_as_two_words(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean task new?" in complaint(given, capsys)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--damp", "1.5"], "--damp 1.5: give a scale above 0, which can be undone, and below 1"),
        (["--trials", "0"], "--trials 0: give 1 or more random controls"),
    ],
)
def test_a_damage_that_cannot_be_undone_is_refused_before_anything_is_read(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the ranking nor the model exists, and neither is complained about."""
    given = ["spike-in", "--ranking", "none", "--model", "none", "--tasks", "t", "--out", str(tmp_path / "o")]
    assert says in complaint([*given, *flags], capsys, status=1)


def test_a_folder_that_does_not_exist_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(["anatomy", "--pretrained", "/nonexistent"], capsys, status=1)
    assert line == "hones-eval: pretrained=/nonexistent: no such folder"


@pytest.mark.parametrize("name", ["torch.utils._pytree", "bitsandbytes.backends.cpu.ops"])
def test_warnings_of_libraries_about_features_that_are_not_used_are_silenced(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantization libraries that are installed are imported by others, and warn while they are."""
    complaint(["rank"], capsys)
    logger = logging.getLogger(name)
    assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.ERROR)


def test_a_misspelled_method_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(["rank", "--method", "honse"], capsys)
    assert "--method honse: did you mean hones? choose one of hones, vseam" in line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_plain_types_and_an_example(name: str) -> None:
    text = command_help(name)
    assert "Examples:" in text
    assert f"hones-eval {name}" in text
    assert not [leak for leak in ("<class", "Literal[", "typing.", "NoneType") if leak in text]
    assert all(flag in text for flag in ("--debug", "--json", "--config"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_described(name: str) -> None:
    assert set(flags_of(name)) == set(sections(command(name))[1])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--neurons", "5"], "--neurons 5: the share of neurons must lie above 0 and at most 1"),
        (["--limit", "0"], "--limit 0: at least 1 example is needed"),
        (["--offset=-1"], "--offset -1: give how many examples to skip"),
        (["--batch_size", "0"], "--batch_size 0: at least one row"),
        (["--seed=-1"], "--seed -1: a seed is 0 or more"),
        (["--race", "0.1", "--method", "vseam"], "--race and --screen only apply to --method hones"),
    ],
)
def test_numbers_without_sense_are_refused_before_the_model_is_loaded(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not exist, and is not complained about."""
    given = ["rank", "--method", "hones", "--model", "none", "--tasks", "t", "--out", str(tmp_path / "out")]
    assert says in complaint([*given, *flags], capsys, status=1)
    assert not (tmp_path / "out").exists()


def test_a_result_of_another_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranking.json").write_text("{}")
    given = ["rank", "--method", "hones", "--model", "none", "--tasks", "t", "--out", str(tmp_path)]
    line = complaint(given, capsys, status=1)
    assert "already holds ranking.json of another run: give --overwrite or --resume" in line
    for way in ("--overwrite", "--resume"):
        assert main([*given, way]) == 1
        assert "no model named 'none'" in capsys.readouterr().err
    assert (tmp_path / "ranking.json").read_text() == "{}"


REQUIRED = {
    "demo": ["--photos", "none"],
    "scale": ["--ranking", "none", "--how", "fixed"],
    "verify": ["--ranking", "none", "--model", "none", "--tasks", "t"],
    "compare": ["none", "none"],
    "trace": ["--clean", "t", "--edited", "u", "--model", "none", "--what", "last"],
    "lens": ["--model", "none", "--tasks", "t"],
    "spike-in": ["--ranking", "none", "--model", "none", "--tasks", "t"],
    "power": ["--tasks", "t"],
    "export": ["--steering", "none", "--to", "ia3"],
    "rank": ["--method", "hones", "--model", "none", "--tasks", "t"],
    "condition": ["--model", "none", "--tasks", "t", "--against", "u"],
    "pull": ["me/none"],
    "edit-sites": ["--model_args", "pretrained=none"],
}


@pytest.mark.parametrize(
    ("name", "artifact"), [(name, file) for name, files in ARTIFACTS.items() for file in files]
)
def test_no_command_overwrites_the_result_of_another_run(
    name: str, artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / artifact
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    out = [str(tmp_path)] if "out" in BY_PLACE.get(name, ()) else ["--out", str(tmp_path)]
    given = [name, *REQUIRED[name], *out]
    assert f"already holds {artifact} of another run: give --overwrite" in complaint(given, capsys, status=1)
    assert file.read_text() == "{}"
