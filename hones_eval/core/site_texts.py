"""Heads and neurons with values given by hand: on the command line, as in `head 3.5=0`, or in a CSV file."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hones_eval.core.files import read_bounded
from hones_eval.errors import HonesError
from hones_eval.limits import LARGEST_SCALE

KINDS = ("head", "neuron")
COLUMNS = ("kind", "layer", "site", "scale")
TABLE_BYTES = 32 << 20
_SITE = re.compile(r"(?P<kind>[A-Za-z]+)\s+(?P<layer>\d+)\.(?P<site>\d+)\s*(?P<sign>\+?=)\s*(?P<value>\S+)")


class GivenSite(NamedTuple):
    """A value given by hand: a scale, or with `is_shift` a number to add, of one head or neuron.

    `where` says where it was given, for messages.
    """

    kind: str
    layer: int
    site: int
    value: float
    is_shift: bool
    where: str


class GivenSites(NamedTuple):
    """Scales and shifts given by hand, by (layer, site)."""

    heads: Mapping[tuple[int, int], float]
    neurons: Mapping[tuple[int, int], float]
    neuron_shifts: Mapping[tuple[int, int], float]


def read_sites(texts: Iterable[str], table: Path | None = None) -> GivenSites:
    """Read sites from texts such as `head 3.5=0`, and from a CSV file.

    Args:
        texts: `head LAYER.HEAD=SCALE`, `neuron LAYER.NEURON=SCALE` or `neuron LAYER.NEURON+=SHIFT`.
        table: a file with the columns kind, layer, site and scale, as `Steering.to_pandas` has them, and
            optionally shift.

    Raises: HonesError for a text or a row that cannot be read, a site that is given twice, or none at all.
    """
    given = [_parsed(text) for text in texts]
    given += [] if table is None else _rows(table)
    if not given:
        raise HonesError('no site is given: use --set "head LAYER.HEAD=SCALE", or --csv FILE')
    found: dict[tuple[str, bool], dict[tuple[int, int], float]] = {}
    for item in given:
        values = found.setdefault((item.kind, item.is_shift), {})
        if (item.layer, item.site) in values:
            raise HonesError(f"{item.where}: {item.kind} {item.layer}.{item.site} is given twice")
        values[item.layer, item.site] = item.value
    return GivenSites(
        found.get(("head", False), {}), found.get(("neuron", False), {}), found.get(("neuron", True), {})
    )


def _parsed(text: str) -> GivenSite:
    where = f"--set {text!r}"
    match = _SITE.fullmatch(text.strip())
    if match is None:
        raise HonesError(
            f'{where} should have the form "head LAYER.HEAD=SCALE", "neuron LAYER.NEURON=SCALE" or "neuron '
            'LAYER.NEURON+=SHIFT", as in "head 3.5=0"'
        )
    is_shift = match["sign"] == "+="
    return _checked(match["kind"], match["layer"], match["site"], match["value"], is_shift, where)


def _checked(kind: str, layer: str, site: str, value: str, is_shift: bool, where: str) -> GivenSite:
    kind = kind.strip().lower().removesuffix("s")
    if kind not in KINDS:
        raise HonesError(f"{where}: {kind!r} is no kind of site: use head or neuron")
    if is_shift and kind == "head":
        raise HonesError(
            f"{where}: the shift of a head is a vector, one number per feature; here only neurons can be "
            "shifted, heads with Steering.by_hand in Python"
        )
    if not (layer.strip().isdecimal() and site.strip().isdecimal()):
        raise HonesError(f"{where}: layer {layer!r} and site {site!r} should be whole numbers from 0")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not abs(number) <= LARGEST_SCALE:
        raise HonesError(f"{where}: {value!r} should be a number of at most {LARGEST_SCALE:g}")
    return GivenSite(kind, int(layer), int(site), number, is_shift, where)


def _rows(table: Path) -> list[GivenSite]:
    """The scales, and shifts where there are some, of every row of a CSV file."""
    try:
        text = read_bounded(table, TABLE_BYTES).decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise HonesError(f"{table} is not a CSV file in UTF-8: {error}") from None
    names = [name.strip().lower() for name in rows[0]] if rows else []
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise HonesError(
            f"{table} has no column {', '.join(missing)}: its first line should be {','.join(COLUMNS)}"
        )
    return [
        given
        for number, row in enumerate(rows[1:], start=2)
        if any(cell.strip() for cell in row)
        for given in _row(names, row, f"{table}, line {number}")
    ]


def _row(names: Sequence[str], row: Sequence[str], where: str) -> list[GivenSite]:
    if len(row) != len(names):
        raise HonesError(f"{where} has {len(row)} cells, and the first line {len(names)}")
    cells = dict(zip(names, row, strict=True))
    site = (cells["kind"], cells["layer"], cells["site"])
    found = [_checked(*site, cells["scale"], False, where)] if cells["scale"].strip() else []
    if (shift := cells.get("shift", "")).strip():
        found.append(_checked(*site, shift, True, where))
    if not found:
        raise HonesError(f"{where} has no scale")
    return found
