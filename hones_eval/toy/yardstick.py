"""How well scores of sites agree with what ablating each site really does."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

from hones_eval.errors import HonesError


class Agreement(NamedTuple):
    """A ranking beside the exhaustive ablation of the same sites.

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
    if scores.shape != truth.shape:
        raise HonesError(f"scores {tuple(scores.shape)} and truth {tuple(truth.shape)} are of other shapes")
    if not 1 <= k <= scores.numel():
        raise HonesError(f"k must be 1 to {scores.numel()}, not {k}")
    flat_scores, flat_truth = scores.flatten().double(), truth.flatten().double()
    if flat_scores.min() == flat_scores.max() or flat_truth.min() == flat_truth.max():
        raise HonesError("all scores are the same, or all true drops are: there is no order to compare")
    border = flat_truth.topk(k).values[-1]
    chosen = torch.sort(flat_scores, descending=True, stable=True).indices[:k]
    hits = (flat_truth[chosen] >= border).double().mean()
    return Agreement(k, float(hits), float(spearmanr(flat_scores, flat_truth).statistic))


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
