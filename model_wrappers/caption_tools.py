"""The Java programs behind lmms-eval's caption metrics, started when needed instead of for every metric.

A caption metric of lmms-eval tokenizes all captions and all answers in two Java programs, and starts a third,
METEOR, with its 60 MB of paraphrases, whether it is METEOR's turn or not: an evaluation with the usual seven
metrics starts 21, and heads that are ranked by BLEU-4 three each. Here captions that were tokenized before
are remembered, and one METEOR serves the process. The values stay what they are.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

REMEMBERED_CALLS = 32  # of thousands of captions each
Captions = Mapping[Any, Sequence[Mapping[str, str]]]
Tokens = dict[Any, list[str]]


def share_caption_tools(module: ModuleType) -> None:
    """Change the tokenizer and METEOR of `pycocoevalcap.eval`; safe to call twice."""
    if not hasattr(module.Meteor, "_shared_by_hones_eval"):
        module.PTBTokenizer.tokenize = _remembering(module.PTBTokenizer.tokenize)
        _share_meteor(module.Meteor)


def _remembering(tokenize: Callable[[Any, Captions], Tokens]) -> Callable[[Any, Captions], Tokens]:
    """Remember whole calls: a sentence's tokens may depend on the line that follows."""
    known: OrderedDict[tuple[Any, ...], Tokens] = OrderedDict()
    one_at_a_time = threading.Lock()

    def remembered(self: Any, captions: Captions) -> Tokens:
        asked = tuple((key, tuple(one["caption"] for one in said)) for key, said in captions.items())
        with one_at_a_time:
            tokens = known.get(asked)
        if tokens is None:
            tokens = tokenize(self, captions)
            if tokens.keys() != captions.keys():  # Java said too little: the next call is to ask again
                return tokens
        with one_at_a_time:
            known[asked] = tokens
            known.move_to_end(asked)
            if len(known) > REMEMBERED_CALLS:
                known.popitem(last=False)
        return {key: list(said) for key, said in tokens.items()}

    return remembered


def _share_meteor(meteor: Any) -> None:
    """One Java program for all METEOR scorers of a process, from the first that computes a score.

    It serves one scorer at a time, and ends with the process, when its input closes. A scorer that fails may
    leave half of an answer in it, and a forked process would share the pipes: both start another one.
    """
    start, end, score = meteor.__init__, meteor.__del__, meteor.compute_score
    running: dict[int, Any] = {}
    one_at_a_time = threading.Lock()

    def __init__(self: Any) -> None:
        pass

    def __getattr__(self: Any, name: str) -> Any:
        if name == "lock":  # taken before the program is asked for, and kept by a scorer that fails
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
        with one_at_a_time:
            try:
                return score(self, *args)
            except BaseException:
                self.lock = threading.Lock()
                if os.getpid() in running:
                    with suppress(OSError):  # of a pipe whose program is gone
                        end(running.pop(os.getpid()))
                raise

    meteor._shared_by_hones_eval = True
    meteor.__init__, meteor.__getattr__, meteor.compute_score = __init__, __getattr__, compute_score
    del meteor.__del__
