"""Averages over traced pairs: by layer, and by token role and layer."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hones_eval.choices import What
from hones_eval.engine.tokens import LAST
from hones_eval.methods.tracing import BY_TOKEN, Traced

OTHER = "other words"
MEASURES = ("probability_change", "logit_change", "recovered")
RARE = 0.25


class Curve(NamedTuple):
    """Means over pairs by the layer that reads what was put back, L for the final norm: [L + 1] each.

    `recovered` is the mean of the patched minus the edited logit difference over the mean of the clean minus
    the edited one; None where the edit does not lower the logit difference. The errors are standard errors of
    the means, None for a single pair.
    """

    probability_change: list[float]
    logit_change: list[float]
    recovered: list[float] | None
    probability_error: list[float] | None
    logit_error: list[float] | None


class RoleMap(NamedTuple):
    """Means over pairs of the means over a role's tokens: [roles, L] each, roles as they stand in the prompt.

    `pairs` says how many pairs have the role. Roles that few pairs have are put together as `other words`.
    `recovered` is None for a role in whose pairs the edit does not lower the logit difference.
    """

    roles: list[str]
    pairs: list[int]
    probability_change: list[list[float]]
    logit_change: list[list[float]]
    recovered: list[list[float] | None]


def changes(pair: Traced, what: What) -> Tensor:
    """Patched minus edited reading [..., 3]: probability, logit, logit difference."""
    return pair.values[what] - torch.tensor(pair.edited, dtype=torch.float64)


def recovered(pair: Traced, what: What) -> Tensor | None:
    """One pair's recovered fraction [...]; None where the edit does not lower the logit difference."""
    gap = pair.clean.difference - pair.edited.difference
    return changes(pair, what)[..., 2] / gap if gap > 0 else None


def curve(pairs: Sequence[Traced], what: What) -> Curve:
    """Average the layer-wise patches of several pairs."""
    moved = torch.stack([changes(pair, what) for pair in pairs])
    mean = moved.mean(0)
    error = moved.std(0) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    gap = lost(pairs)
    return Curve(
        probability_change=mean[:, 0].tolist(),
        logit_change=mean[:, 1].tolist(),
        recovered=(mean[:, 2] / gap).tolist() if gap > 0 else None,
        probability_error=None if error is None else error[:, 0].tolist(),
        logit_error=None if error is None else error[:, 1].tolist(),
    )


def role_map(pairs: Sequence[Traced], what: What) -> RoleMap:
    """Average the token-wise patches of several pairs by token role."""
    kept = _frequent(pairs)
    sums: dict[str, Tensor] = {}
    gaps: dict[str, float] = {}
    counts: dict[str, int] = {}
    order: dict[str, float] = {}
    for pair in pairs:
        moved = changes(pair, what)
        for role, places in _by_role(pair, kept).items():
            sums[role] = sums.get(role, 0) + moved[places].mean(0)
            gaps[role] = gaps.get(role, 0.0) + pair.clean.difference - pair.edited.difference
            counts[role] = counts.get(role, 0) + 1
            order[role] = order.get(role, 0.0) + sum(places) / len(places) / len(pair.tokens)
    roles = sorted(sums, key=lambda role: (role == LAST, order[role] / counts[role]))
    means = torch.stack([sums[role] / counts[role] for role in roles])
    fractions = [(sums[role][:, 2] / gaps[role]).tolist() if gaps[role] > 0 else None for role in roles]
    return RoleMap(
        roles=roles,
        pairs=[counts[role] for role in roles],
        probability_change=means[..., 0].tolist(),
        logit_change=means[..., 1].tolist(),
        recovered=fractions,
    )


def averages(pairs: Sequence[Traced]) -> dict[str, Any]:
    """The JSON of a category: mean readings, and a `Curve` or `RoleMap` for everything that was traced."""
    readings = {
        name: dict(zip(("probability", "logit", "logit_difference"), _mean(values), strict=True))
        for name, values in (
            ("clean", [pair.clean for pair in pairs]),
            ("edited", [pair.edited for pair in pairs]),
        )
    }
    return readings | {
        what: (role_map if what in BY_TOKEN else curve)(pairs, what)._asdict() for what in pairs[0].values
    }


def layer_table(category: str, pairs: Sequence[Traced]) -> Iterable[list[Any]]:
    """Rows of layers.csv: every pair's layer-wise changes."""
    for pair in pairs:
        for what in pair.values:
            if what in BY_TOKEN:
                continue
            fraction = recovered(pair, what)
            for layer, (p, logit, _) in enumerate(changes(pair, what).tolist()):
                yield [category, pair.key, what, layer, p, logit, _cell(fraction, (layer,))]


def token_table(category: str, pairs: Sequence[Traced]) -> Iterable[list[Any]]:
    """Rows of tokens.csv: every pair's token-wise changes."""
    for pair in pairs:
        for what in (name for name in pair.values if name in BY_TOKEN):
            fraction = recovered(pair, what)
            for place, layers in enumerate(changes(pair, what).tolist()):
                label = [category, pair.key, what, place, pair.tokens[place], pair.roles[place]]
                for layer, (p, logit, _) in enumerate(layers):
                    yield [*label, layer, p, logit, _cell(fraction, (place, layer))]


def role_table(category: str, what: str, found: RoleMap) -> Iterable[list[Any]]:
    """Rows of roles.csv: the averages of a `RoleMap`."""
    for place, (role, count) in enumerate(zip(found.roles, found.pairs, strict=True)):
        shares = found.recovered[place]
        for layer, p in enumerate(found.probability_change[place]):
            fraction = "" if shares is None else shares[layer]
            yield [category, what, role, count, layer, p, found.logit_change[place][layer], fraction]


HEADERS = {
    "layers": ["category", "pair", "what", "layer", *MEASURES],
    "tokens": ["category", "pair", "what", "position", "token", "role", "layer", *MEASURES],
    "roles": ["category", "what", "role", "pairs", "layer", *MEASURES],
}


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The text of a CSV file; an undefined value is an empty cell."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(header)
    table.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows)
    return file.getvalue()


def _frequent(pairs: Sequence[Traced]) -> set[str]:
    counts: dict[str, int] = {}
    for pair in pairs:
        for role in set(pair.roles):
            counts[role] = counts.get(role, 0) + 1
    return {role for role, count in counts.items() if count >= RARE * len(pairs)}


def _by_role(pair: Traced, kept: set[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, role in enumerate(pair.roles):
        places.setdefault(role if role in kept else OTHER, []).append(place)
    return places


def lost(pairs: Sequence[Traced]) -> float:
    """The mean drop of the logit difference that the edit causes, clean minus edited."""
    return sum(pair.clean.difference - pair.edited.difference for pair in pairs) / len(pairs)


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _cell(values: Tensor | None, place: tuple[int, ...]) -> float | str:
    return "" if values is None else float(values[place])
