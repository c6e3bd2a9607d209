"""The `hones-eval` command."""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

from hones_eval.commands import ARTIFACTS, COMMANDS, PAGED, TWO_WORDS, command
from hones_eval.commands.answer import print_as_json, show
from hones_eval.errors import HonesError, UsageError, printable
from hones_eval.notes import note
from hones_eval.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; by default those of the process. `--debug` anywhere
            shows the trace of an error that is otherwise one line; `--json` anywhere keeps standard output
            for one JSON document.

    Returns: 0; 1 when the command failed, 2 when its flags cannot be read, 130 when it was interrupted, 143
        when it was stopped by SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, as_json = "--debug" in given, "--json" in given
    given = _joined([word for word in given if word not in ("--debug", "--json")])
    _answer_about_itself(given)
    _quiet_libraries()
    print_as_json(as_json)
    before = _handle_sigterm()
    try:
        _run(given, as_json)
    except (HonesError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(printable(f"hones-eval: {_one_line(error)}{_way_out(error, given)}"), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns an interrupt of a pass into an exit without a message.
        if KeyboardInterrupt not in (type(error), type(error.__context__)):
            raise
        by_signal = _Terminated.happened
        print(
            f"hones-eval: {'stopped by SIGTERM' if by_signal else 'interrupted'}{_how_to_go_on(given)}",
            file=sys.stderr,
        )
        return 128 + signal.SIGTERM if by_signal else 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if several := sys.modules.get("hones_eval.runs.processes"):
            several.leave_others()
    return 0


def _joined(given: list[str]) -> list[str]:
    """Join the two words of a command such as `task new`, which is the command `task-new`."""
    both = "-".join(given[:2])
    return [both, *given[2:]] if len(given) > 1 and both in TWO_WORDS else given


class _Terminated:
    happened = False


def _handle_sigterm() -> Any:
    """Let SIGTERM end the command like an interrupt, after a running pass has saved its progress.

    Returns: the handler that was there before; None where there can be none, outside the main thread.
    """
    _Terminated.happened = False
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(number: int, frame: object) -> None:
        _Terminated.happened = True
        checkpoint = sys.modules.get("hones_eval.runs.checkpoint")
        if checkpoint is None or not checkpoint.stop_after_example():
            raise KeyboardInterrupt

    return signal.signal(signal.SIGTERM, stop)


def _answer_about_itself(given: Sequence[str]) -> None:
    """Print the version or a help text and exit, before anything heavy is imported."""
    if given[:1] == ["--version"]:
        print(f"hones-eval {__version__}")
        raise SystemExit(0)
    if not {"-h", "--help"} & set(given):
        return
    from hones_eval.commands.help_texts import command_help, program_help

    print(command_help(given[0]) if given[0] in COMMANDS else program_help())
    raise SystemExit(0)


def _run(given: Sequence[str], as_json: bool) -> None:
    from hones_eval.commands.flags import read

    call = read(given)
    _check_numbers(call.arguments)
    _check_out(call.name, call.arguments, call.overwrite)
    if "model_args" in call.arguments and "torch" not in sys.modules:
        note(f"{call.name}: importing torch, transformers and lmms-eval")
    with _sole_writer(call.arguments.get("out")):
        answer = command(call.name)(**call.arguments)
        several = sys.modules.get("hones_eval.runs.processes")
        is_first = several is None or several.is_first()
        if answer is not None and is_first and call.name in PAGED:
            from hones_eval.commands.result_page import write_result_page

            answer.lines.append(f"see {write_result_page(call, given, answer)}")
    if several is not None:
        several.wait_for_others()
    if answer is not None and is_first:  # the first process shows the answer for all of them
        show(answer)
        if as_json:
            print(json.dumps(answer.data, indent=1, default=str))


def _sole_writer(out: object) -> AbstractContextManager[None]:
    """Hold the lock of the output folder while a command runs."""
    if not isinstance(out, Path):
        return nullcontext()
    from hones_eval.core.lock import only_writer

    return only_writer(out)


def _check_numbers(arguments: dict[str, Any]) -> None:
    """Refuse numbers that no model and no task could make sense of, before anything is loaded."""
    for flag, least, why in _LEAST:
        value = arguments.get(flag)
        if isinstance(value, int) and value < least:
            raise HonesError(f"--{flag} {value}: {why}")
    share = arguments.get("neurons")
    if isinstance(share, int | float) and not 0 < share <= 1:
        raise HonesError(
            f"--neurons {share:g}: the share of neurons must lie above 0 and at most 1, 0.01 for one percent"
        )


_LEAST = (
    ("seed", 0, "a seed is 0 or more"),
    ("limit", 1, "at least 1 example is needed"),
    ("test_limit", 1, "at least 1 example is needed"),
    ("offset", 0, "give how many examples to skip, 0 or more"),
    ("batch_size", 1, "at least one row has to be run at once"),
)


def _check_out(name: str, arguments: dict[str, Any], overwrite: bool) -> None:
    """Refuse an `--out` that cannot be written to, or that holds the result of another run."""
    out = arguments.get("out")
    if not isinstance(out, Path):
        return
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise HonesError(f"--out {out}: {existing} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise HonesError(f"--out {out}: cannot write in {existing} ({error.strerror})") from None
    artifacts = [*ARTIFACTS.get(name, ())]
    if name == "rank" and "," in arguments["tasks"]:
        artifacts += [f"{task.strip()}/ranking.json" for task in arguments["tasks"].split(",")]
    there = [artifact for artifact in artifacts if (out / artifact).is_file()]
    if there and not (overwrite or arguments.get("resume")):
        ways = "--overwrite or --resume" if "resume" in arguments else "--overwrite"
        raise HonesError(
            f"--out {out} already holds {there[0]} of another run: give {ways}, or another --out"
        )


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _way_out(error: Exception, given: Sequence[str]) -> str:
    """Errors name the way out themselves; for flags it is the help text."""
    if not isinstance(error, UsageError):
        return ""
    name = f" {given[0]}" if given and given[0] in COMMANDS else ""
    return f" (see hones-eval{name} --help)"


def _how_to_go_on(given: Sequence[str]) -> str:
    """How an interrupted command is continued."""
    resumable = given[:1] and given[0] in COMMANDS and "resume" in signature(command(given[0])).parameters
    return "; with --resume the same command goes on from what was measured" if resumable else ""


def _quiet_libraries() -> None:
    """Switch off start-up banners, and progress bars without a terminal, which would bury our own lines.

    Quantization libraries that are installed are imported by others, and then warn about features that are
    not used here.
    """
    for chatty in ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


if __name__ == "__main__":
    sys.exit(main())
