"""Prompts and generation settings with every model that this package adds to lmms-eval.

What the user and the task ask for reaches the model, or the run is refused, or its manifest says so.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
from tiny_evaluations import Evaluated, evaluated, write_small

from hones_eval.core.artifact import hash_of
from hones_eval.errors import HonesError
from hones_eval.model_wrappers import registry
from hones_eval.model_wrappers.watch import WatchedGenerate

DESCRIPTION = "Look at the shapes closely. "
INSTRUCTION = "Answer in one word. "
FAMILIES = {
    **{f"hones_{name}": name for name in registry.FAMILIES if name != "hf"},
    "hones_hf": "qwen2_5_vl",
    "hones": "llava",
}
Run = Callable[..., Evaluated]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: families.save_checkpoint(name, folder / name))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(model: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> Run:
    """Evaluate the small task with one model; keywords are of the task's file or of lmms-eval."""
    family = FAMILIES[model]
    stock, on_cpu = families.WRAPPERS[family]
    arguments = f"pretrained={checkpoint(family)},{'dtype=float32' if model == 'hones_hf' else on_cpu}"
    if model == "hones":
        arguments = f"base={stock},{arguments}"

    def once(
        generation: dict[str, Any] | None = None, more: str = "", count: int = 1, **settings: Any
    ) -> Evaluated:
        wanted = {"max_new_tokens": 8, "min_new_tokens": 6} | (generation or {})
        folder = write_small(tmp_path / "tasks", generation=wanted, more=more, count=count)
        return evaluated(model, arguments, folder, tmp_path / "out", **settings)

    return once


@pytest.fixture
def prompts(model: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of the prompts that reach `generate`, decoded from their tokens."""
    seen: list[str] = []
    call, tokenizer = WatchedGenerate.__call__, families.build(FAMILIES[model]).tokenizer

    def listening(self: WatchedGenerate, *args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        seen.append(words(tokenizer.decode(tokens[0])))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(WatchedGenerate, "__call__", listening)
    return seen


def words(text: str) -> str:
    return " ".join(text.split())


def test_description_and_system_instruction_reach_the_model_and_the_log(run: Run, prompts: list[str]) -> None:
    for before, given in (
        (DESCRIPTION, {"more": f"description: '{DESCRIPTION}'"}),
        (INSTRUCTION, {"system_instruction": INSTRUCTION}),
    ):
        prompts.clear()
        found = run(**given)
        whole = f"{words(before)} What colour is shape 0?"
        assert prompts
        assert all(whole in prompt for prompt in prompts)
        assert words(found.samples[0]["arguments"][0]) == whole
        (entry,) = found.manifest["requests"]["small"].values()
        text = found.samples[0]["arguments"][0]
        assert entry["prompt_sha256"] in (hash_of([text]), hash_of(["user", "<image>", text]))


def test_until_is_obeyed_or_the_manifest_says_that_it_is_not(run: Run) -> None:
    whole = run(count=4).answers
    stop = next(letter for answer in whole for letter in answer.strip()[1:] if letter.strip())
    found = run({"until": [stop]}, count=4)
    ended = not any(stop in answer for answer in found.answers)
    assert found.manifest["until"] == {"small": {"strings": [stop], "obeyed": ended}}
    assert found.answers == [answer.split(stop)[0].strip() if ended else answer for answer in whole]
    if ended:
        assert run(gen_kwargs=f'until=["{stop}"]', count=4).answers == found.answers
    else:
        with pytest.raises(HonesError, match=r"--gen_kwargs until=.* does not end answers there"):
            run(gen_kwargs=f'until=["{stop}"]')


def test_settings_of_the_user_reach_the_model_or_are_refused(run: Run) -> None:
    with pytest.raises(HonesError, match=r"temperature=3.0: the task sets do_sample to false"):
        run({"do_sample": False}, gen_kwargs="temperature=3.0")
    found = run({"do_sample": False}, gen_kwargs="max_new_tokens=2,temperature=0")
    reached = found.manifest["generation"]["small"]
    assert (reached["max_new_tokens"], bool(reached["do_sample"])) == (2, False)
    for name, value in (("repetition_penalty", 2.5), ("num_beams", 2)):
        refused = ""
        try:
            found = run({"do_sample": False}, gen_kwargs=f"{name}={value}")
        except HonesError as error:
            refused = str(error)
        if refused:
            assert f"--gen_kwargs {name}={value} did not reach the model" in refused
        else:
            assert found.manifest["generation"]["small"][name] == value
