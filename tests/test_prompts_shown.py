"""The log shows the prompt that the model received: description, system instruction and examples too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_evaluations import UTILS, Evaluated, evaluated, write_small

from hones_eval.core.artifact import hash_of
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import TaskExamples, load_lmm

DESCRIPTION = "Look at the shapes closely. "
OWN_MESSAGES = """

def doc_to_messages(doc):
    image = {"type": "image", "url": doc["image"].convert("RGB")}
    content = [image, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]
"""
Run = Callable[..., Evaluated]


@pytest.fixture
def run(llava_checkpoint: Path, tmp_path: Path) -> Run:
    def one(more: str = "", utils: str = UTILS, **settings: Any) -> Evaluated:
        folder = write_small(tmp_path / "tasks", more=more, utils=utils)
        arguments = f"pretrained={llava_checkpoint}"
        return evaluated("hones_llava", arguments, folder, tmp_path / "out", **settings)

    return one


def sent(run: Evaluated) -> list[str]:
    """The hashes of the prompts that the model received."""
    return [entry["prompt_sha256"] for entry in run.manifest["requests"]["small"].values()]


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_a_description_and_a_system_instruction_reach_the_model(run: Run, simple: bool) -> None:
    plain = run(force_simple=simple)
    described = run(f"description: '{DESCRIPTION}'", force_simple=simple)
    instructed = run(system_instruction="Answer in one word. ", force_simple=simple)
    for found, before in ((described, DESCRIPTION), (instructed, "Answer in one word. ")):
        logged = [found.samples[doc_id]["arguments"][0] for doc_id in sorted(found.samples)]
        assert all(text.startswith(before.strip()) for text in logged)
        parts = (lambda text: [text]) if simple else (lambda text: ["user", "<image>", text])
        assert sent(found) == [hash_of(parts(text)) for text in logged]
        assert found.answers != plain.answers
    assert sent(described) != sent(plain)


def test_the_prompt_tokens_contain_the_description(llava_checkpoint: Path, tmp_path: Path) -> None:
    """As the ranking records them, at `generate`."""
    folder = write_small(tmp_path / "tasks", more=f"description: '{DESCRIPTION}'")
    lmm = load_lmm("hones_llava", f"pretrained={llava_checkpoint}")
    found = TaskExamples(
        lmm, "small", model_name="hones_llava", include_path=folder, metric="log_probability", target="answer"
    )
    prompt = lmm.tokenizer.decode(found[1].inputs["input_ids"][0])
    assert f"{DESCRIPTION.strip()} What colour is shape 1?" in " ".join(prompt.split())


def test_a_description_that_a_task_leaves_out_of_its_own_messages_is_refused(run: Run) -> None:
    own = f"description: '{DESCRIPTION}'\ndoc_to_messages: !function utils.doc_to_messages"
    with pytest.raises(
        HonesError, match=r"task small, doc 0: the description, .*'Look at the shapes closely.'"
    ):
        run(own, UTILS + OWN_MESSAGES)
