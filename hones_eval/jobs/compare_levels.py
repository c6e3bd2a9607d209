"""Overlaps of rankings within a semantic level and across levels, compared with chance (V-SEAM 3)."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from hones_eval.errors import HonesError
from hones_eval.jobs.compare import Overlap


class Sharing(NamedTuple):
    """The mean overlap of several pairs of banks, compared with chance."""

    sites: str
    """`neurons`, `heads`, or V-SEAM's `heads +` that help and `heads -` that hurt."""
    levels: str
    """`within LEVEL` or `LEVEL and LEVEL`; for all pairs `within a level` or `across levels`."""
    pairs: int
    jaccard: float
    chance: float
    chance_by_layer: float
    p: float | None
    """For `within a level`: the permutation p-value of sharing more within levels than across them."""


def sharing(
    overlaps: Mapping[str, Sequence[Overlap]], levels: Mapping[str, str], seed: int = 0
) -> list[Sharing]:
    """Mean overlaps by level.

    Args:
        overlaps: of all pairs of banks, by kind of site.
        levels: the level of each ranking, by name. Pairs with an empty bank are left out.
        seed: of the permutations, where there are too many rankings to enumerate all of them.
    """
    rows = []
    for sites, found in overlaps.items():
        for sign in ("", " +", " -"):
            named = {f"{name}{sign}": level for name, level in levels.items()}
            # A chance of 0 means that one of the banks is empty: such pairs are left out.
            known = [
                pair for pair in found if pair.first in named and pair.second in named and pair.chance > 0
            ]
            rows += _rows(f"{sites}{sign}", known, named, seed)
    return rows


def levels_of(names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """The level of each ranking by name, from levels given in the order of the rankings.

    Raises: HonesError when the numbers differ, or when no pair is within a level or none is across levels.
    """
    if len(given) != len(names):
        raise HonesError(
            f"--levels names {len(given)} levels for {len(names)} rankings; give one per ranking, in order"
        )
    if not 1 < len(set(given)) < len(given):
        raise HonesError(
            f"--levels {','.join(given)}: comparing within and across levels needs two levels or more, "
            "and two rankings of one level"
        )
    return dict(zip(names, given, strict=True))


def _rows(sites: str, found: Sequence[Overlap], levels: Mapping[str, str], seed: int) -> list[Sharing]:
    def mean(name: str, some: Sequence[Overlap], p: float | None = None) -> Sharing:
        jaccard, chance, chance_by_layer = np.mean(
            [[pair.jaccard, pair.chance, pair.chance_by_layer] for pair in some], axis=0
        ).tolist()
        return Sharing(sites, name, len(some), jaccard, chance, chance_by_layer, p)

    def between(*wanted: str) -> list[Overlap]:
        return [pair for pair in found if sorted((levels[pair.first], levels[pair.second])) == sorted(wanted)]

    names = list(dict.fromkeys(levels.values()))
    parts = {f"within {name}": between(name, name) for name in names}
    parts |= {f"{first} and {second}": between(first, second) for first, second in combinations(names, 2)}
    within = [pair for pair in found if levels[pair.first] == levels[pair.second]]
    across = [pair for pair in found if levels[pair.first] != levels[pair.second]]
    if not within or not across:
        return []
    return [
        *(mean(name, some) for name, some in parts.items() if some),
        mean("within a level", within, _p_of_levels(found, levels, seed)),
        mean("across levels", across),
    ]


def _p_of_levels(found: Sequence[Overlap], levels: Mapping[str, str], seed: int) -> float:
    """One-sided permutation test: the levels are reassigned to the rankings at random."""
    names = sorted({name for pair in found for name in (pair.first, pair.second)})
    pairs = np.array([[names.index(pair.first), names.index(pair.second)] for pair in found])
    jaccard = np.array([pair.jaccard for pair in found])
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
