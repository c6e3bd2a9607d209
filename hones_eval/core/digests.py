"""Comparing digests of weights, without torch: the leaderboard needs no more."""


def weights_differ(first: str | None, second: str | None) -> bool:
    """Whether two digests show different weights; False where they cannot be compared.

    Digests of other forms or floating-point types, and missing ones, cannot be compared.
    """
    if first is None or second is None:
        return False
    return first.rpartition("-")[0] == second.rpartition("-")[0] and first != second
