"""What rankings share within a semantic level and across levels, beside chance (V-SEAM 3)."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from hones_eval.errors import HonesError
from hones_eval.jobs.compare import Overlap


class Sharing(NamedTuple):
    """The mean overlap of several pairs of banks, beside what chance would give."""

    sites: str
    """`neurons`, `heads`, or V-SEAM's `heads +` that help and `heads -` that hurt."""
    levels: str
    """`within LEVEL`, `LEVEL and LEVEL`, or all pairs `within a level` and `across levels`."""
    pairs: int
    jaccard: float
    chance: float
    chance_by_layer: float
    p: float | None
    """Of `within a level`: how often levels dealt out at random to the rankings share as much more within."""


def sharing(
    overlaps: Mapping[str, Sequence[Overlap]], levels: Mapping[str, str], seed: int = 0
) -> list[Sharing]:
    """Mean overlaps by level.

    Args:
        overlaps: of all pairs of banks, by kind of site.
        levels: the level of each ranking by its name; pairs with an empty bank do not count.
        seed: of the permutations, where there are too many rankings for all of them.
    """
    rows = []
    for sites, found in overlaps.items():
        for sign in ("", " +", " -"):
            named = {f"{name}{sign}": level for name, level in levels.items()}
            # Nothing can be shared with a bank that is empty, so chance is 0 there.
            known = [one for one in found if one.first in named and one.second in named and one.chance > 0]
            rows += _rows(f"{sites}{sign}", known, named, seed)
    return rows


def levels_of(names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """The level of each ranking, one given for each in their order.

    Raises: HonesError when their numbers differ, or when there is nothing within or nothing across levels.
    """
    if len(given) != len(names):
        raise HonesError(
            f"--levels names {len(given)} levels for {len(names)} rankings; give one for each, in their order"
        )
    if not 1 < len(set(given)) < len(given):
        raise HonesError(
            f"--levels {','.join(given)}: comparing within and across levels takes two levels or more, and "
            "two rankings of one of them"
        )
    return dict(zip(names, given, strict=True))


def _rows(sites: str, found: Sequence[Overlap], levels: Mapping[str, str], seed: int) -> list[Sharing]:
    def mean(name: str, some: Sequence[Overlap], p: float | None = None) -> Sharing:
        jaccard, chance, chance_by_layer = np.mean(
            [[one.jaccard, one.chance, one.chance_by_layer] for one in some], axis=0
        ).tolist()
        return Sharing(sites, name, len(some), jaccard, chance, chance_by_layer, p)

    def between(*pair: str) -> list[Overlap]:
        return [one for one in found if sorted((levels[one.first], levels[one.second])) == sorted(pair)]

    names = list(dict.fromkeys(levels.values()))
    parts = {f"within {name}": between(name, name) for name in names}
    parts |= {f"{one} and {other}": between(one, other) for one, other in combinations(names, 2)}
    within = [one for one in found if levels[one.first] == levels[one.second]]
    across = [one for one in found if levels[one.first] != levels[one.second]]
    if not within or not across:
        return []
    return [
        *(mean(name, some) for name, some in parts.items() if some),
        mean("within a level", within, _p_of_levels(found, levels, seed)),
        mean("across levels", across),
    ]


def _p_of_levels(found: Sequence[Overlap], levels: Mapping[str, str], seed: int) -> float:
    """One-sided permutation test: levels are dealt out again to the rankings."""
    names = sorted({name for one in found for name in (one.first, one.second)})
    pairs = np.array([[names.index(one.first), names.index(one.second)] for one in found])
    jaccard = np.array([one.jaccard for one in found])
    numbers = np.unique([levels[name] for name in names], return_inverse=True)[1]

    def more_within(dealt: Any) -> float:
        same = dealt[pairs[:, 0]] == dealt[pairs[:, 1]]
        return float(jaccard[same].mean() - jaccard[~same].mean())

    test = stats.permutation_test(
        (numbers,),
        more_within,
        permutation_type="pairings",
        alternative="greater",
        n_resamples=9999,
        rng=seed,
    )
    return float(test.pvalue)
