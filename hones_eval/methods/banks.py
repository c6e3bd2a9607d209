"""Banks: the sites that a ranking selects, and random banks to compare them with."""

from collections.abc import Sequence

import torch

from hones_eval.core.artifact import ModelShape
from hones_eval.core.ranking import Ranking
from hones_eval.core.sites import Head, Neuron, all_heads, matched_random, top_heads
from hones_eval.errors import HonesError, MisfitError

FEWEST_TRIALS, FEW_TRIALS = 2, 5


def few_trials(trials: int) -> str | None:
    """A warning when there are few random banks; None when there are enough.

    Raises: HonesError with fewer than two, whose spread cannot be estimated.
    """
    if trials < FEWEST_TRIALS:
        raise HonesError(
            f"--trials {trials}: estimating how much random banks differ needs at least {FEWEST_TRIALS} of "
            f"them, better {FEW_TRIALS} or more"
        )
    if trials < FEW_TRIALS:
        return (
            f"only {trials} random banks were masked: their spread and largest drop are weak estimates with "
            f"fewer than {FEW_TRIALS} (--trials)"
        )
    return None


def check_fits(ranking: Ranking, shape: ModelShape, name: str) -> None:
    """Raise MisfitError, naming both sides, when a ranking does not fit the model called `name`."""
    differing = ranking.provenance.shape.differences(shape)
    if differing:
        raise MisfitError(
            f"the ranking for {ranking.provenance.base_model} does not fit {name} ({'; '.join(differing)})"
        )


def neuron_banks(ranking: Ranking, neurons: float | None, trials: int, seed: int) -> dict[str, list[Neuron]]:
    """The selected neurons, and `trials` random banks with as many neurons in each layer.

    Args:
        ranking: with neuron scores.
        neurons: the share of all neurons; by default the ranking's own.
        trials: the number of random banks, called `random 1`, `random 2`, ...
        seed: of the first random bank; each further bank adds 1.
    """
    selected = ranking.neurons(neurons)
    shape = ranking.provenance.shape
    drawn = {f"random {i + 1}": matched_random(selected, shape, seed + i) for i in range(trials)}
    return {"selected": selected, **drawn}


def head_banks(ranking: Ranking, count: int, trials: int, seed: int) -> dict[str, list[Head]]:
    """The top `count` positive and negative heads with a score above 0, and as many random heads (V-SEAM 3).

    A ranking without positive and negative scores (HONES) has one bank, `selected`: its best heads. Random
    heads are drawn from the heads that are in no other bank, if enough are left. A bank may be empty.
    """
    if ranking.head_positive is not None and ranking.head_negative is not None:
        tensors = {"positive": ranking.head_positive, "negative": ranking.head_negative}
    elif ranking.head_scores is not None:
        tensors = {"selected": ranking.head_scores}
    else:
        raise HonesError("this ranking has no head scores; mask its neurons with --sites neurons")
    banks = {
        name: [head for head in top_heads(scores, count) if scores[head] > 0]
        for name, scores in tensors.items()
    }
    if not any(banks.values()):
        raise HonesError(
            "no head of this ranking has a score above 0, so there is none to mask; rank with more "
            "examples, or on a task that the model can do"
        )
    shape = ranking.provenance.shape
    everything = all_heads(shape)
    taken = {head for bank in banks.values() for head in bank}
    for i in range(trials):
        banks[f"random {i + 1}"] = _drawn(everything, taken, count, seed + i)
    return banks


def _drawn(everything: Sequence[Head], taken: set[Head], count: int, seed: int) -> list[Head]:
    others = [head for head in everything if head not in taken]
    pool = others if len(others) >= count else list(everything)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]
    return sorted(pool[i] for i in order.tolist())
