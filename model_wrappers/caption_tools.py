"""Starts the Java programs behind lmms-eval's caption metrics when they are needed, not for every metric.

Every caption metric of lmms-eval tokenizes all captions and all answers in two Java programs. It also starts
a third, METEOR, with its 60 MB of paraphrases, even for other metrics. An evaluation with the usual seven
metrics starts 21 programs, and a ranking by BLEU-4 starts three per head. Here tokenized captions are
remembered, and one METEOR serves the process. All values stay the same.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

REMEMBERED_CALLS = 32  # each with thousands of captions
Captions = Mapping[Any, Sequence[Mapping[str, str]]]
Tokens = dict[Any, list[str]]


def share_caption_tools(module: ModuleType) -> None:
    """Patch the tokenizer and METEOR of `pycocoevalcap.eval`; safe to call twice."""
    if not hasattr(module.Meteor, "_shared_by_hones_eval"):
        module.PTBTokenizer.tokenize = _remembering(module.PTBTokenizer.tokenize)
        _share_meteor(module.Meteor)


def _remembering(tokenize: Callable[[Any, Captions], Tokens]) -> Callable[[Any, Captions], Tokens]:
    """Remember whole calls, as a sentence's tokens may depend on the line that follows."""
    known: OrderedDict[tuple[Any, ...], Tokens] = OrderedDict()
    lock = threading.Lock()

    def remembered(self: Any, captions: Captions) -> Tokens:
        key = tuple(
            (image, tuple(caption["caption"] for caption in group)) for image, group in captions.items()
        )
        with lock:
            tokens = known.get(key)
        if tokens is None:
            tokens = tokenize(self, captions)
            if tokens.keys() != captions.keys():  # incomplete output of Java is not kept
                return tokens
        with lock:
            known[key] = tokens
            known.move_to_end(key)
            if len(known) > REMEMBERED_CALLS:
                known.popitem(last=False)
        return {image: list(group) for image, group in tokens.items()}

    return remembered


def _share_meteor(meteor: Any) -> None:
    """Share one Java program among all METEOR scorers of a process, from the first that computes a score.

    It serves one scorer at a time, and ends with the process, when its input closes. A scorer that fails may
    leave half of an answer in the pipe, and a forked process would share the pipes; both start another one.
    """
    start, end, score = meteor.__init__, meteor.__del__, meteor.compute_score
    running: dict[int, Any] = {}
    lock = threading.Lock()

    def __init__(self: Any) -> None:
        pass

    def __getattr__(self: Any, name: str) -> Any:
        if name == "lock":  # scorers lock before they use the program
            self.lock = threading.Lock()
            return self.lock
        if name != "meteor_p":
            raise AttributeError(name)
        if os.getpid() not in running:
            program = SimpleNamespace()
            start(program)
            running[os.getpid()] = program
        return running[os.getpid()].meteor_p

    def compute_score(self: Any, *args: Any) -> Any:
        with lock:
            try:
                return score(self, *args)
            except BaseException:
                self.lock = threading.Lock()
                if os.getpid() in running:
                    with suppress(OSError):  # the program may already have ended
                        end(running.pop(os.getpid()))
                raise

    meteor._shared_by_hones_eval = True
    meteor.__init__, meteor.__getattr__, meteor.compute_score = __init__, __getattr__, compute_score
    del meteor.__del__
