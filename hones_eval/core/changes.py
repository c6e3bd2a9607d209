"""What a steering changes: for each linear layer, the scales and shifts of its input features."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hones_eval.core.anatomy import Anatomy
from hones_eval.core.edits import Scaling
from hones_eval.core.hooks import Edit, Site
from hones_eval.core.steering import Steering


class SiteChange(NamedTuple):
    """A linear layer whose input `z` becomes `scales * z + shifts`.

    `scales` and `shifts` have one number per input feature; `shifts` is None where nothing is added.
    """

    site: Site
    scales: Tensor
    shifts: Tensor | None = None


def site_changes(anatomy: Anatomy, steering: Steering) -> list[SiteChange]:
    """List the linear layers whose inputs a steering changes; it leaves all others as they are."""
    everything = []
    for layer, site in enumerate(anatomy.heads_in):
        shifts = None if steering.head_shifts is None else steering.head_shifts[layer]
        scales = anatomy.head_features(steering.head_scales[layer], layer)
        everything.append(
            SiteChange(site, scales, None if shifts is None else anatomy.head_shift_features(shifts, layer))
        )
    for layer, site in enumerate(anatomy.neurons_in):
        shifts = None if steering.neuron_shifts is None else steering.neuron_shifts[layer]
        scales = anatomy.neuron_features(steering.neuron_scales[layer], layer)
        everything.append(
            SiteChange(site, scales, None if shifts is None else anatomy.neuron_features(shifts, layer))
        )
    plain = [change._replace(shifts=_or_none(change.shifts)) for change in everything]
    return [c for c in plain if c.shifts is not None or not bool((c.scales == 1).all())]


def _or_none(shifts: Tensor | None) -> Tensor | None:
    return shifts if shifts is not None and bool((shifts != 0).any()) else None


def row_edits(anatomy: Anatomy, steerings: Sequence[Steering]) -> list[tuple[Site, Edit]]:
    """Edits that steer row `i` of a batch by steering `i`; none for no steerings."""
    by_site: dict[str, dict[int, SiteChange]] = {}
    for row, steering in enumerate(steerings):
        for change in site_changes(anatomy, steering):
            by_site.setdefault(change.site.name, {})[row] = change
    found: list[tuple[Site, Edit]] = []
    for changes in by_site.values():
        site, ones = next(iter(changes.values())).site, torch.ones(1)
        width = next(iter(changes.values())).scales.shape[-1]
        rows = [changes.get(row) for row in range(len(steerings))]
        scales = torch.stack([ones.expand(width) if row is None else row.scales for row in rows])
        shifts = [row.shifts for row in rows if row is not None and row.shifts is not None]
        if not shifts:
            found.append((site, Scaling(scales)))
            continue
        zeros = torch.zeros(width)
        added = [zeros if row is None or row.shifts is None else row.shifts for row in rows]
        found.append((site, Scaling(scales, torch.stack(added))))
    return found
