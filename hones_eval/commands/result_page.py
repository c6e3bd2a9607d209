"""The page of a command's result, and commands that are steps of another command."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hones_eval.commands import command
from hones_eval.commands.answer import Answer
from hones_eval.commands.flags import Call, read
from hones_eval.notes import note
from hones_eval.pages.run import write_run_page

# A run that was stopped and resumed, also by another number of processes, has the page of one that was not.
_UNSEEN_WITH_VALUE = ("--devices", "--num_nodes")
_UNSEEN = ("--resume", "--overwrite", *_UNSEEN_WITH_VALUE)


def run_step(words: Sequence[str]) -> Answer:
    """Run a command as a step of another one, and write its page.

    Args:
        words: the command line after `hones-eval`, with `--out`.

    Returns: the answer, without a line that names the page.
    """
    call = read(words)
    if "model_args" in call.arguments and "torch" not in sys.modules:
        note(f"{call.name}: importing torch, transformers and lmms-eval")
    answer = command(call.name)(**call.arguments)
    assert answer is not None
    write_result_page(call, words, answer)
    return answer


def write_result_page(call: Call, given: Sequence[str], answer: Answer) -> Path:
    """Write the page of a result into its folder.

    Args:
        call: the command with its arguments.
        given: the command line that it was read from.
        answer: the command's answer.
    """
    for name, part in answer.parts.items():
        arguments = call.arguments | {"out": call.arguments["out"] / name}
        write_result_page(call._replace(arguments=arguments), given, part)
    out = call.arguments["out"]
    told = [line.removeprefix(f"wrote {out}: ") for line in answer.lines]
    lines = [line for line in told if not line.startswith("wrote ")]
    plain = [line for line in lines if not line.startswith("warning: ")]
    headline = answer.headline or next(iter(plain), call.name)
    return write_run_page(
        out,
        command=call.name,
        made_by=_made_by(given),
        lines=[line for line in lines if line != headline],
        headline=headline,
        settings={
            name: value for name, value in call.arguments.items() if f"--{name}" not in ("--out", *_UNSEEN)
        },
        tables=answer.tables,
        charts=answer.charts,
        parts=list(answer.parts),
    )


def _made_by(given: Sequence[str]) -> str:
    """The command line, without the name of the output folder and without what does not change the result."""
    words, rest = list[str](), iter(given)
    for word in rest:
        flag, equals, _ = word.partition("=")
        if flag == "--out":
            words += ["--out", "FOLDER"]
        elif flag not in _UNSEEN:
            words.append(word)
        if flag in ("--out", *_UNSEEN_WITH_VALUE) and not equals:
            next(rest, None)
    return f"hones-eval {shlex.join(words)}"
