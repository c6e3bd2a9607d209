"""The Java programs behind lmms-eval's caption metrics, started when needed instead of for every metric.

A caption metric of lmms-eval tokenizes all captions and all answers in two Java programs, and starts a third,
METEOR, with its 60 MB of paraphrases, whether it is METEOR's turn or not: an evaluation with the usual seven
metrics starts 21, and heads that are ranked by BLEU-4 three each. Here captions that were tokenized before
are remembered, and one METEOR serves the process. The values stay what they are.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
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

    def remembered(self: Any, captions: Captions) -> Tokens:
        asked = tuple((key, tuple(one["caption"] for one in said)) for key, said in captions.items())
        if asked not in known:
            known[asked] = tokenize(self, captions)
            if len(known) > REMEMBERED_CALLS:
                known.popitem(last=False)
        known.move_to_end(asked)
        return {key: list(tokens) for key, tokens in known[asked].items()}

    return remembered


def _share_meteor(meteor: Any) -> None:
    """One Java program for all METEOR scorers of the process, from the first that computes a score.

    It ends with the process, when its input closes; a scorer that fails may leave half of an answer in it,
    and the next starts another one.
    """
    start, end, score = meteor.__init__, meteor.__del__, meteor.compute_score
    running: list[Any] = []

    def __init__(self: Any) -> None:
        pass

    def __getattr__(self: Any, name: str) -> Any:
        if name == "lock":  # taken before the program is asked for, and kept by a scorer that fails
            self.lock = threading.Lock()
            return self.lock
        if name != "meteor_p":
            raise AttributeError(name)
        if not running:
            running.append(SimpleNamespace())
            start(running[0])
        return running[0].meteor_p

    def compute_score(self: Any, *args: Any) -> Any:
        try:
            return score(self, *args)
        except BaseException:
            while running:
                end(running.pop())
            raise

    meteor._shared_by_hones_eval = True
    meteor.__init__, meteor.__getattr__, meteor.compute_score = __init__, __getattr__, compute_score
    del meteor.__del__
