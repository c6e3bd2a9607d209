"""What a page shows beside text: tables and heat maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows with the same keys, under a title."""

    title: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class HeatMap:
    """A matrix `[rows][columns]` of scores, under a title; None where there is no site.

    `neutral` is the value without an effect: 0 for scores, 1 for scales.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    row: str
    column: str
    neutral: float = 0.0
