"""`hones-eval scale`."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from hones_eval.commands.shared import say
from hones_eval.errors import HonesError
from hones_eval.methods import scaling
from hones_eval.ranking import Ranking
from hones_eval.steering import Steering


def scale(
    ranking: Path,
    how: Literal["fixed", "signed", "topk"],
    out: Path,
    factor: float = 2.0,
    neurons: float | None = None,
    strength: float = 1.0,
    epsilon: float = 0.0,
    heads: int = 10,
    enhance: float = 0.5,
    suppress: float = 0.5,
) -> None:
    """Turn the scores of a ranking into the scales of a steering.

    Args:
        ranking: a folder that rank wrote.
        how: fixed (one factor for the selected neurons), signed (heads by 1 + strength * score, clipped to
            0..2) or topk (the best heads times 1 + enhance, the worst times 1 - suppress).
        out: the folder to write steering.json and steering.safetensors to.
        factor: fixed: what the selected neurons are multiplied by.
        neurons: fixed: the share of all neurons to scale; by default the share of the ranking.
        strength: signed: lambda in 1 + lambda * score.
        epsilon: signed: scores smaller than this are ignored.
        heads: topk: how many heads to enhance, and how many to suppress.
        enhance: topk: a in 1 + a.
        suppress: topk: b in 1 - b.
    """
    scores = Ranking.load(ranking)
    choices: dict[str, Callable[[], Steering]] = {
        "fixed": lambda: scaling.fixed(scores, factor, neurons),
        "signed": lambda: scaling.signed(scores, strength, epsilon),
        "topk": lambda: scaling.topk(scores, heads, enhance, suppress),
    }
    steering = choices[how]()
    if steering.is_noop:
        raise HonesError("every scale is 1: this steering would change nothing, so it was not written")
    steering.save(out)
    scaled_heads = int((steering.head_scales != 1).sum())
    scaled_neurons = int((steering.neuron_scales != 1).sum())
    say(f"wrote {out}: {scaled_heads} heads and {scaled_neurons} neurons are scaled")
