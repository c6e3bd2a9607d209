"""Every refusal that this package can see under `lmms-eval`: one line, exit status 1 and no traceback.

All command lines run in one process, through lmms-eval's own entry point.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
from datasets import Dataset, Image
from lmms_runs import LMMS_EVAL, Ended, picture, run_each, write_steering
from tiny_evaluations import UTILS

from hones_eval.core.steering import Steering

pytestmark = pytest.mark.slow


class Case(NamedTuple):
    """A command line that is refused: the task's rows and YAML, `--model_args` and flags; what is said."""

    says: str
    args: str = "pretrained={llava},device=cpu,device_map=cpu"
    model: str = "hones_llava"
    flags: tuple[str, ...] = ()
    row: dict[str, Any] = {"answer": "red"}  # noqa: RUF012  never changed
    yaml: str = ""
    target: str = "answer"
    kind: str = "texts"
    shows: bool = True


GOOD = "pretrained={llava},device=cpu,device_map=cpu"
HF = {"model": "hones_hf", "args": "pretrained={llava}"}
MESSAGES = """

def doc_to_messages(doc):
    image = {"type": "image", "url": doc["image"].convert("RGB")}
    return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]
"""
CASES = {
    "no equals sign": Case("--model_args: 'pretrained' should have the form name=value", "pretrained"),
    "comma in a value": Case("'b' should have the form name=value; a value with a comma", "pretrained=/a,b"),
    "missing comma": Case("a comma is missing before steering=", GOOD.split(",")[0] + " steering=x"),
    "misspelt": Case("has no argument 'pretraind': did you mean pretrained?", "pretraind={llava}"),
    "given twice": Case("--model_args: strength is given twice", f"{GOOD},strength=1,strength=2"),
    "batch size": Case("batch_size=auto: llava_hf takes a whole number", f"{GOOD},batch_size=auto"),
    "missing folder": Case("pretrained=/models/missing: no such folder", "pretrained=/models/missing"),
    "steering is missing": Case("no steering at '/no/steering'", f"{GOOD},steering=/no/steering"),
    "steering is a ranking": Case("is a ranking: make a steering of it with", f"{GOOD},steering={{ranking}}"),
    "steering does not fit": Case(
        "does not fit LlavaForConditionalGeneration (", f"{GOOD},steering={{other}}"
    ),
    "strength": Case("strength='strong' should be a number", f"{GOOD},strength=strong"),
    "strength too large": Case(
        "strength=1e+38 makes a scale of", f"{GOOD},steering={{steering}},strength=1e38"
    ),
    "attach": Case("attach='glue' is unknown: use hook or fold", f"{GOOD},attach=glue"),
    "no adapter": Case("peft=/no/adapter: no such folder", f"{GOOD},peft=/no/adapter"),
    "no base": Case("--model hones needs base=<an lmms-eval model>", GOOD, "hones"),
    "unknown base": Case(
        "base='lava_hf' is not a model of lmms-eval: did you", f"base=lava_hf,{GOOD}", "hones"
    ),
    "unknown task": Case("there is no task nothing", flags=("--tasks", "nothing")),
    "misspelt setting": Case(
        "--gen_kwargs temprature: no such setting", flags=("--gen_kwargs", "temprature=1")
    ),
    "setting without value": Case("--gen_kwargs: 'greedy' should have", flags=("--gen_kwargs", "greedy")),
    "list as text": Case("is not a list or mapping: write it as JSON", flags=("--gen_kwargs", "until=[a,b]")),
    "until": Case("llava_hf does not end answers there", flags=("--gen_kwargs", 'until=["e"]')),
    "temperature": Case("the task sets do_sample to false", flags=("--gen_kwargs", "temperature=3.0")),
    "temperature, hf": Case(
        "the task sets do_sample to false", flags=("--gen_kwargs", "temperature=3.0"), **HF
    ),
    "dropped setting": Case(
        "repetition_penalty=2.5 did not reach the model", flags=("--gen_kwargs", "repetition_penalty=2.5")
    ),
    "numeric answers": Case("contains numbers, which never equal an answer in words", row={"answer": 3}),
    "several references": Case(
        "bleu takes one gold answer per example", row={"answer": ["a dog", "a red dog"]}, kind="bleu"
    ),
    "numeric choices": Case(
        "should be a list of at least two texts", row={"options": [1, 2]}, kind="choices"
    ),
    "empty choice": Case("none of them empty", row={"options": ["red", ""]}, kind="choices"),
    "no image": Case("doc 0: ", shows=False),
    "own messages": Case(
        "the description, system instruction or examples 'Look closely.' are not in the messages",
        yaml="description: 'Look closely. '\ndoc_to_messages: !function utils.doc_to_messages\n",
    ),
}
HEAD = """\
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{visual}{yaml}"""
KINDS = {
    "texts": "output_type: generate_until\ndoc_to_target: answer\n"
    "generation_kwargs: {max_new_tokens: 2, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    "bleu": "output_type: generate_until\ndoc_to_target: answer\n"
    "generation_kwargs: {max_new_tokens: 2}\nmetric_list: [{metric: bleu}]\n",
    "choices": "output_type: multiple_choice\ndoc_to_target: 1\ndoc_to_choice: options\n"
    "metric_list: [{metric: acc}]\n",
}


def write_task(folder: Path, name: str, case: Case) -> None:
    rows = [{"image": picture(i), "question": f"What is shape {i}?", **case.row} for i in range(2)]
    file = io.BytesIO()
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(file)
    (folder / f"{name}.parquet").write_bytes(file.getvalue())
    visual = "doc_to_visual: !function utils.doc_to_visual\n" if case.shows else ""
    head = HEAD.format(name=name, data=folder / f"{name}.parquet", visual=visual, yaml=case.yaml)
    (folder / f"{name}.yaml").write_text(head + KINDS[case.kind])


MADE_ELSEWHERE = "a steering for another base model"
FINE = list(CASES).index("misspelt")  # of this task only the command line is refused


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("refused")
    names = {"llava": families.save_checkpoint("llava", folder / "llava"), "ranking": folder / "ranking"}
    names |= {"steering": folder / "steering", "other": folder / "other"}
    write_steering(names["llava"], names["steering"], 1)
    write_steering(families.save_checkpoint("qwen2_vl", folder / "qwen2_vl"), names["other"], 1)
    names["ranking"].mkdir()
    (names["ranking"] / "ranking.json").write_text("{}")
    (folder / "utils.py").write_text(UTILS + MESSAGES)
    commands = []
    for number, case in enumerate(CASES.values()):
        write_task(folder, f"task_{number}", case)
        given = ["--model", case.model, "--model_args", case.args.format(**names), "--batch_size", "1"]
        task = [] if "--tasks" in case.flags else ["--tasks", f"task_{number}"]
        given += [*task, *case.flags, "--include_path", str(folder), "--output_path", str(folder / "logs")]
        commands.append(given)
    elsewhere = Steering.load(names["steering"])
    made_for = replace(elsewhere.provenance, base_model="org/other")
    replace(elsewhere, provenance=made_for).save(folder / "elsewhere")
    arguments = f"{GOOD.format(**names)},steering={folder / 'elsewhere'}"
    commands.append(["--model", "hones_llava", "--model_args", arguments, "--tasks", f"task_{FINE}"])
    commands[-1] += ["--include_path", str(folder), "--limit", "1", "--output_path", str(folder / "fine")]
    *found, warned = run_each(LMMS_EVAL, commands, folder, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert not list((folder / "logs").rglob("*_results.json"))
    assert list((folder / "fine").rglob("*_results.json"))
    return dict(zip(CASES, found, strict=True)) | {MADE_ELSEWHERE: warned}


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_under_lmms_eval_is_one_line(name: str, ended: dict[str, Ended]) -> None:
    status, stderr, _ = ended[name]
    last = stderr.rstrip().splitlines()[-1]
    assert status == 1
    assert last.startswith("hones-eval: "), stderr[-2000:]
    assert CASES[name].says in last
    assert "Traceback" not in stderr


def test_a_steering_made_for_another_base_model_is_told_under_lmms_eval(ended: dict[str, Ended]) -> None:
    status, _, log = ended[MADE_ELSEWHERE]  # lmms-eval's log is on stdout
    assert status == 0
    assert "this steering was made for org/other, but the model is " in log
    assert "it has the same shape, but its heads and neurons may do other things" in log
