"""Agreement between scores of sites and the true effect of ablating each site."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

from hones_eval.errors import HonesError


class Agreement(NamedTuple):
    """A ranking compared with the exhaustive ablation of the same sites.

    `precision`: the share of the top k of the scores that are among the top k of the truth, where ties at
    the truth's border count as hits. `rank_correlation`: Spearman's, over all sites.
    """

    k: int
    precision: float
    rank_correlation: float


def agreement(scores: Tensor, truth: Tensor, k: int) -> Agreement:
    """Compare scores [L, S] with true drops [L, S].

    Raises: HonesError when shapes differ, k is impossible, or one side is constant and has no order.
    """
    _check_comparable(scores, truth, k)
    flat_scores, flat_truth = scores.flatten().double(), truth.flatten().double()
    if flat_scores.min() == flat_scores.max() or flat_truth.min() == flat_truth.max():
        raise HonesError("all scores are equal, or all true drops are: there is no order to compare")
    border = flat_truth.topk(k).values[-1]
    chosen = torch.sort(flat_scores, descending=True, stable=True).indices[:k]
    hits = (flat_truth[chosen] >= border).double().mean()
    return Agreement(k, float(hits), float(spearmanr(flat_scores, flat_truth).statistic))


class Captured(NamedTuple):
    """The share of the largest possible effect that a selection has, and its ceiling.

    `share` is 1 for the k sites with the largest true effects. `ceiling` is the share that one half of the
    examples reaches when it selects sites for the other half: no selection can be expected to exceed it by
    more than chance. It is None without split halves.
    """

    k: int
    share: float
    ceiling: float | None


def captured_effect(
    scores: Tensor, truth: Tensor, k: int, halves: tuple[Tensor, Tensor] | None = None
) -> Captured:
    """The captured effect of the k sites with the highest scores.

    `sum_{s in S} max(e_s, 0) / sum_{s in best k} max(e_s, 0)` for true effects `e`. Unlike precision, it does
    not punish swapping two sites with nearly equal effects.

    Args:
        scores: [L, S].
        truth: true drops [L, S].
        k: the number of selected sites.
        halves: true drops on two halves of the examples, each [L, S].

    Raises: HonesError when shapes differ, k is impossible, or no true drop is positive.

    Examples:
        >>> truth = torch.tensor([[4.0, 3.0, 0.0, -1.0]])
        >>> captured_effect(torch.tensor([[9.0, 0.0, 8.0, 1.0]]), truth, 2).share
        0.5714285714285714
    """
    _check_comparable(scores, truth, k)
    share = _captured(scores, truth, k)
    if halves is None:
        return Captured(k, share, None)
    first, second = halves
    return Captured(k, share, (_captured(first, second, k) + _captured(second, first, k)) / 2)


def _captured(scores: Tensor, truth: Tensor, k: int) -> float:
    effects = truth.flatten().double().clamp(min=0)
    most = effects.topk(k).values.sum()
    if not float(most) > 0:
        raise HonesError("no site has a positive true effect: this truth is flat and cannot score a ranking")
    chosen = torch.sort(scores.flatten().double(), descending=True, stable=True).indices[:k]
    return float(effects[chosen].sum() / most)


def _check_comparable(scores: Tensor, truth: Tensor, k: int) -> None:
    if scores.shape != truth.shape:
        raise HonesError(f"scores {tuple(scores.shape)} and truth {tuple(truth.shape)} have different shapes")
    if not 1 <= k <= scores.numel():
        raise HonesError(f"k must be 1 to {scores.numel()}, not {k}")


def masking_area(
    scores: Tensor, drop_of_top: Callable[[int], float], counts: Sequence[int]
) -> tuple[float, list[float]]:
    """Area under the curve 'mask the top k, measure the drop', over log k scaled to [0, 1].

    Args:
        scores: [L, S], to check `counts` against.
        drop_of_top: the metric's drop when the best k sites are masked together.
        counts: ascending numbers of sites, at least two.

    Returns: the area (the mean drop over the curve) and the drops.
    """
    if len(counts) < 2 or sorted(set(counts)) != list(counts) or counts[-1] > scores.numel() or counts[0] < 1:
        raise HonesError(f"counts must ascend from 1 to at most {scores.numel()}, and be two or more")
    drops = [drop_of_top(count) for count in counts]
    places = torch.tensor(counts, dtype=torch.float64).log()
    area = torch.trapezoid(torch.tensor(drops, dtype=torch.float64), places)
    return float(area / (places[-1] - places[0])), drops
